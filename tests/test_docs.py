"""Every Python example of README.md and docs/ runs, on a tiny model in the place of the one it names."""

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_model

from llama2 import AutoModelForCausalLM, AutoTokenizer, LoraConfig, lora
from llama2.checkpoint.convert import ConversionSettings, convert

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Those of docs/tutorials run with their shell commands: test_tutorials.py.
_TEXTS = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "coming-from").glob("*.md"))
PAGES = sorted(page for page in _TEXTS if FENCE.search(page.read_text()))
HUB_ID = "meta-llama/Llama-2-7b-chat-hf"
PROMPT = [40, 41, 42]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of an example: a model under the name on the hub, as a GGUF file, and an adapter."""
    folder = tmp_path / HUB_ID
    model = tiny_model(torch.float32, vocab_size=264, max_position_embeddings=256)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    convert(folder, tmp_path / "model.gguf", ConversionSettings(to="gguf"))
    torch.manual_seed(0)
    lora.add_adapter(model, LoraConfig(r=4, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter-folder")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _names(page: str, home: Path) -> dict[str, Any]:
    """What the text around the examples of a page takes for granted."""
    folder = str(home / HUB_ID)
    names: dict[str, Any] = {"path": folder, "folder": folder, "out": str(home / "trained"), "prompt_ids": PROMPT}
    if page in ("engine.md", "interop.md"):
        names["model"] = AutoModelForCausalLM.from_pretrained(folder)
        names["tokenizer"] = AutoTokenizer.from_pretrained(folder)
    names["rows"] = [{"prompt": "a b", "completion": " c d"}] * 4
    if page == "interop.md" and importlib.util.find_spec("datasets"):
        from datasets import Dataset

        names["dataset"] = Dataset.from_list(names["rows"])
    return names


def _missing(code: str) -> list[str]:
    """Packages that an example imports and that are not installed here."""
    wanted = re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)
    return [name for name in wanted if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page: Path, home: Path) -> None:
    names = _names(page.name, home)
    examples = FENCE.findall(page.read_text())
    compiled = [compile(code, str(page), "exec") for code in examples]
    if missing := [name for code in examples for name in _missing(code)]:
        pytest.skip(f"{page.name} needs {', '.join(missing)} (make interop installs them)")
    with warnings.catch_warnings():
        if page.name == "interop.md":
            warnings.simplefilter("default")  # other libraries' own
        for code in compiled:
            exec(code, names)
    assert {"README.md": "model", "native.md": "logits", "training.md": "result"}.get(page.name, "path") in names


def test_every_page_with_an_example_is_found() -> None:
    assert {"README.md", "engine.md", "interop.md", "native.md", "quantisation.md", "training.md"} <= {
        page.name for page in PAGES
    }


def test_the_index_of_the_log_leads_somewhere() -> None:
    """Every link of docs/LOG.md is a heading's, and every heading has one; an entry that a later one replaces is marked
    in the index and below."""
    text = (ROOT / "docs" / "LOG.md").read_text()
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"): heading for heading in headings}
    index = text[text.index("## Index") : text.index("## Dependencies")]
    entries = re.findall(r"^- \[(.+)\]\(#(.+)\)(, superseded)?$", index, re.MULTILINE)
    assert len(entries) > 60 and all(anchors[anchor] == heading for heading, anchor, _ in entries)
    assert sorted(heading for heading, _, _ in entries) == sorted(set(headings) - {"Index"})
    marked = re.findall(r"^## (.+)\n\nSuperseded by \[(.+)\]\(#(.+)\)", text, re.MULTILINE)
    assert {heading for heading, _, mark in entries if mark} == {heading for heading, _, _ in marked}
    assert marked and all(anchors[anchor] == later for _, later, anchor in marked)
