"""Hub ids over a cache as huggingface_hub lays it out, without a network: models--OWNER--NAME/{refs,snapshots}."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from checkpoint import gguf_package
from checkpoint.adapter_files import tensors_for, write_adapter
from huggingface_hub import constants
from tiny import tiny_ids, tiny_model

from llama2 import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.hub import _kind
from llama2.checkpoint.quantized import packed_layers
from llama2.checkpoint.source import hub_id, locate
from llama2.cli import main
from llama2.cli.loading import RunOptions, load
from llama2.errors import CheckpointError, InputError
from llama2.runners.native import native_weights

pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer", "ignore:the tokenizer has no tokenizer.model")
SIZES: dict[str, Any] = {"vocab_size": 260}
GGUF_SIZES: dict[str, Any] = {"vocab_size": 40, "intermediate_size": 96, "rope_theta": 50000.0}
Make = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that huggingface_hub uses, offline."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def snapshot(cache: Path) -> Make:
    def make(repo: str, revision: str = "main", commit: str = "a" * 40) -> Path:
        """The folder of a snapshot of a repository, to be filled."""
        place = cache / f"models--{repo.replace('/', '--')}"
        (place / "refs").mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(commit)
        folder = place / "snapshots" / commit
        folder.mkdir(parents=True)
        return folder

    return make


def fill(folder: Path, seed: int = 0) -> torch.Tensor:
    """A model with a tokenizer; its logits."""
    model = tiny_model(torch.float32, seed, **SIZES)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model(tiny_ids()).logits


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("gpt2", ("gpt2", None, None)),
        ("who/tiny", ("who/tiny", None, None)),
        ("who/tiny-GGUF:Q4_K_M", ("who/tiny-GGUF", None, "Q4_K_M")),
        ("who/tiny/tiny.Q4_0.gguf", ("who/tiny", "tiny.Q4_0.gguf", None)),
        ("who/tiny/deep/tiny-00001-of-00002.gguf", ("who/tiny", "deep/tiny-00001-of-00002.gguf", None)),
        ("hf.co/who/tiny:q8_0", ("who/tiny", None, "q8_0")),
        ("https://huggingface.co/who/tiny", ("who/tiny", None, None)),
        ("folder/model.gguf", None),
        ("./who/tiny", None),
        ("who/tiny/model", None),
        ("model.safetensors", None),
    ],
)
def test_what_a_hub_id_says(text: str, wanted: tuple[str, str | None, str | None] | None) -> None:
    found = hub_id(text)
    assert (found and (found.repo, found.file, found.tag)) == wanted


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama-2-7b.Q4_K_M.gguf", "Q4_K_M"),
        ("Llama-2-7B-IQ2_XXS.gguf", "IQ2_XXS"),
        ("model-q8_0.gguf", "Q8_0"),
        ("ggml-model-f16.gguf", "F16"),
        ("x-BF16-00001-of-00003.gguf", "BF16"),
        ("model.gguf", None),
    ],
)
def test_types_in_names(name: str, kind: str | None) -> None:
    assert _kind(name) == kind


def test_revisions(snapshot: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_logits = fill(snapshot("who/tiny"))
    old_logits = fill(snapshot("who/tiny", "v1", "b" * 40), seed=3)
    assert torch.equal(LlamaForCausalLM.from_pretrained("who/tiny")(tiny_ids()).logits, main_logits)
    model = LlamaForCausalLM.from_pretrained("who/tiny", revision="v1")
    assert torch.equal(model(tiny_ids()).logits, old_logits) and model.config.name_or_path == "who/tiny"
    assert main(["convert", "who/tiny", str(tmp_path / "out"), "--revision", "v1", "--quiet"]) == 0
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "out")(tiny_ids()).logits, old_logits)
    assert (tmp_path / "out/tokenizer.json").exists()
    made, tokenizer = load(RunOptions(model="who/tiny", revision="v1", runner="torch"))
    assert torch.equal(made(tiny_ids()).logits, old_logits) and tokenizer.encode("a")  # type: ignore[operator]
    assert main(["tokenize", "-m", "who/tiny", "--revision", "v1", "--ids", "ab"]) == 0
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "x"), "--revision", "v1"]) == 2
    assert "leave --revision out" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="who/tiny"):
        LlamaForCausalLM.from_pretrained("who/tiny", revision="v2")


def test_finetuning_a_revision(snapshot: Make, tmp_path: Path) -> None:
    """What is trained is that revision, and the adapter says so: loading it, and training on it, take it again."""
    fill(snapshot("who/tiny"))
    old = fill(snapshot("who/tiny", "v1", "b" * 40), seed=3)
    (tmp_path / "rows.jsonl").write_text('{"text": "red sky"}\n' * 4)
    common = ["--max-steps", "1", "--quiet", "--learning-rate", "1e-9", "--device", "cpu"]
    words = ["finetune", "sft", "who/tiny", str(tmp_path / "rows.jsonl"), str(tmp_path / "out"), "--lora-r", "2"]
    assert main([*words, "--revision", "v1", *common]) == 0
    settings = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("who/tiny", "v1")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(trained(tiny_ids()).logits, old)
    shutil.copytree(tmp_path / "out", snapshot("me/adapter", "v7"), dirs_exist_ok=True)
    words[2], words[4:] = "me/adapter", [str(tmp_path / "more"), "--revision", "v7"]
    assert main([*words, *common]) == 0
    assert json.loads((tmp_path / "more/adapter_config.json").read_text())["revision"] == "v1"
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "more")(tiny_ids()).logits, old)


def test_sharding_a_revision(snapshot: Make, tmp_path: Path) -> None:
    fill(snapshot("who/tiny"))
    old = fill(snapshot("who/tiny", "v1", "b" * 40), seed=3)
    out = tmp_path / "out"
    assert main(["shard", "who/tiny", str(out), "--size", "1MB", "--revision", "v1", "--quiet"]) == 0
    assert torch.equal(LlamaForCausalLM.from_pretrained(out)(tiny_ids()).logits, old)


def test_metas_own_repositories(snapshot: Make, tmp_path: Path) -> None:
    logits = fill(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "meta", ConversionSettings("meta", shards=2))
    folder = snapshot("meta-llama/Llama-2-tiny")
    for file in (tmp_path / "meta").iterdir():
        if file.name != "SHA256SUMS":
            shutil.copy(file, folder)
    assert torch.equal(LlamaForCausalLM.from_pretrained("meta-llama/Llama-2-tiny")(tiny_ids()).logits, logits)
    convert("meta-llama/Llama-2-tiny", tmp_path / "out", ConversionSettings())
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "out")(tiny_ids()).logits, logits)
    for file in folder.glob("consolidated.*"):  # a configuration is known without the weights
        file.unlink()
    (folder / "huggingface_config.json").unlink()
    (folder / "params.json").write_text(
        '{"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1}'
    )
    config = AutoConfig.from_pretrained("meta-llama/Llama-2-tiny")
    assert (config.intermediate_size, config.vocab_size, config.num_parameters) == (11008, 32000, 6738415616)


def test_adapters(snapshot: Make, tmp_path: Path) -> None:
    """The adapter of one repository on the model of another, with its own revision."""
    base = fill(snapshot("who/base", "v1"))
    model = tiny_model(torch.float32, **SIZES)
    tensors = tensors_for(model.config, ("q_proj",))
    write_adapter(snapshot("me/adapter"), tensors, target_modules=["q_proj"], base_model_name_or_path="who/base",
                  revision="v1")  # fmt: skip
    adapted = LlamaForCausalLM.from_pretrained("me/adapter")(tiny_ids()).logits
    assert not torch.allclose(adapted, base)
    convert(locate("who/base", {"revision": "v1"}), tmp_path / "out", ConversionSettings(adapter="me/adapter"))
    assert torch.allclose(LlamaForCausalLM.from_pretrained(tmp_path / "out")(tiny_ids()).logits, adapted, atol=1e-4)
    made, _ = load(RunOptions(model="who/base", revision="v1", adapter="me/adapter", runner="torch"))
    assert torch.allclose(made(tiny_ids()).logits, adapted, atol=1e-4)  # type: ignore[operator]


@pytest.fixture
def ggufs(snapshot: Make) -> torch.Tensor:
    """who/tiny-GGUF with a Q8_0 and a split F32 file, and a companion that is no model; the logits of F32."""
    folder = snapshot("who/tiny-GGUF")
    model = tiny_model(torch.float32, **GGUF_SIZES)
    gguf_package.write(folder / "tiny.Q8_0.gguf", model.state_dict(), quantise="Q8_0")
    gguf_package.write(folder / "tiny.F32.gguf", model.state_dict(), split=8)
    (folder / "mmproj-tiny-F16.gguf").write_bytes(b"GGUF")
    return model(tiny_ids() % 40).logits


def test_gguf_repositories(ggufs: torch.Tensor, snapshot: Make, tmp_path: Path) -> None:
    ids = tiny_ids() % 40
    by_tag = AutoModelForCausalLM.from_pretrained("who/tiny-GGUF:f32")
    assert torch.allclose(by_tag(ids).logits, ggufs, atol=1e-4) and by_tag.config.name_or_path == "who/tiny-GGUF:f32"
    by_name = AutoModelForCausalLM.from_pretrained("who/tiny-GGUF/tiny.F32-00002-of-00003.gguf")
    assert torch.equal(by_name(ids).logits, by_tag(ids).logits)
    assert AutoConfig.from_pretrained("who/tiny-GGUF:Q8_0").hidden_size == 64
    convert("who/tiny-GGUF:Q8_0", tmp_path / "x.gguf", ConversionSettings("gguf"))
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF files; choose one by its type, such as who/tiny-GGUF:F32"):
        AutoModelForCausalLM.from_pretrained("who/tiny-GGUF")
    with pytest.raises(CheckpointError, match=r"who/tiny-GGUF:Q4_K_M means 0 files; .*tiny.Q8_0.gguf"):
        AutoModelForCausalLM.from_pretrained("who/tiny-GGUF:Q4_K_M")
    with pytest.raises(CheckpointError, match="holds no 'none.gguf'"):
        AutoModelForCausalLM.from_pretrained("who/tiny-GGUF/none.gguf")
    shutil.copy(tmp_path / "x.gguf", snapshot("who/one-GGUF") / "one.Q8_0.gguf")
    assert AutoModelForCausalLM.from_pretrained("who/one-GGUF").config.vocab_size == 40


@pytest.mark.usefixtures("ggufs")
def test_gguf_files_of_the_hub_stay_packed(snapshot: Make, tmp_path: Path) -> None:
    from llama2 import cpu

    if not cpu.available():
        pytest.skip("the native engine is not built")
    fill(tmp_path / "hf")
    folder = snapshot("who/chat-GGUF")
    convert(tmp_path / "hf", folder / "chat.Q8_0.gguf", ConversionSettings("gguf", "q8_0"))
    model, tokenizer = load(RunOptions(model="who/chat-GGUF:Q8_0", device="cpu"))
    assert isinstance(model, cpu.CpuModel)
    torchs = AutoModelForCausalLM.from_pretrained("who/chat-GGUF:Q8_0")
    assert packed_layers(torchs) and native_weights(torchs) is not None
    assert tokenizer("ab").input_ids == AutoTokenizer.from_pretrained("who/chat-GGUF").encode("ab")


def test_revision_of_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a local path, which has no revision 'v1'"):
        load(RunOptions(model=str(tmp_path), revision="v1"))
