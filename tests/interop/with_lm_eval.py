"""lm-eval's HFLM over these models, which asks for transformers' tokenizer class; and its own command line with
--model llama2, on a quantised GGUF file and with adapters."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from product import BYTES, byte_model, byte_tokenizer, demo, tiny_config, tiny_model


def _loglikelihood(lm: Any, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found: list[tuple[float, bool]] = lm.loglikelihood(asked, disable_tqdm=True)
    return found


def _expected(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    before, ids = tokenizer.encode(context), tokenizer.encode(context + continuation)
    logits = model(torch.tensor([ids])).logits.float().log_softmax(-1)[0]
    return float(sum(logits[i - 1, ids[i]] for i in range(len(before), len(ids))))


def _check(model: Any, tokenizer: Any) -> None:
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=2, device="cpu")
    pairs = [("The sky is", " blue"), ("The sea is", " a good deal deeper than that")]
    with torch.no_grad():
        for (score, _), pair in zip(_loglikelihood(lm, pairs), pairs, strict=True):
            assert abs(score - _expected(model, tokenizer, *pair)) < 1e-2
    asked = [Instance("generate_until", {}, ("The sky is", {"until": ["\n"], "max_gen_toks": 4}), 0)]
    assert isinstance(lm.generate_until(asked, disable_tqdm=True)[0], str)
    rolling = [Instance("loglikelihood_rolling", {}, ("The sky is blue today.",), 0)]
    assert lm.loglikelihood_rolling(rolling, disable_tqdm=True)[0] < 0


def case_tiny(folder: Path) -> None:
    _check(byte_model(), byte_tokenizer(folder).to_transformers())


def case_demo_model(folder: Path) -> None:
    model, tokenizer = demo()
    _check(model, tokenizer.to_transformers())


TASK = """task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
"""
# What the installed package does when Python starts; here it lies beside the source.
HOOK = Path(__file__).resolve().parents[2] / "src" / "llama2_lm_eval.pth"


def _command_line(folder: Path, *words: str) -> list[float]:
    """The log-likelihoods of every choice, from `lm_eval` in a process of its own."""
    tasks = folder / "tasks"
    if not tasks.exists():
        tasks.mkdir()
        rows = [{"question": f"Letter {i}:", "choices": [" a", " b c"], "answer": i % 2} for i in range(6)]
        (tasks / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tasks / "letters.yaml").write_text(TASK.replace("FILE", str(tasks / "rows.jsonl")))
    out = folder / f"out{len(list(folder.glob('out*')))}"
    start = f"import product\n{HOOK.read_text()}\nfrom lm_eval.__main__ import cli_evaluate\ncli_evaluate()"
    given = [*words, "--tasks", "letters", "--include_path", str(tasks), "--output_path", str(out), "--log_samples"]
    ran = subprocess.run([sys.executable, "-c", start, *given], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    (samples,) = out.rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return [float(found[0][0]) for line in sorted(lines, key=lambda line: line["doc_id"]) for found in line["resps"]]


def case_command_line(folder: Path) -> None:
    """A folder, a quantised GGUF file of it, and an adapter as peft and as llama.cpp write it: equal to the merged."""
    from checkpoint.adapter_files import tensors_for, write_adapter

    from llama2.checkpoint.convert import ConversionSettings, convert
    from llama2.checkpoint.convert_adapter import convert_adapter

    plain, config = folder / "plain", tiny_config(**BYTES)
    tiny_model(torch.float32, **BYTES).save_pretrained(plain)
    byte_tokenizer(plain)
    adapter = write_adapter(folder / "adapter", tensors_for(config, ("q_proj", "v_proj")))
    convert_adapter(adapter, folder / "adapter.gguf", config)
    convert(plain, folder / "merged", ConversionSettings(adapter=str(adapter)))
    byte_tokenizer(folder / "merged")
    convert(plain, folder / "small.gguf", ConversionSettings("gguf", "q8_0"))

    def scores(model: Path, more: str = "") -> list[float]:
        args = f"pretrained={model},precision=exact{more}"
        return _command_line(folder, "--model", "llama2", "--model_args", args)

    def apart(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) for x, y in zip(a, b, strict=True))

    base, merged, small = scores(plain), scores(folder / "merged"), scores(folder / "small.gguf")
    effect = apart(base, merged)
    assert len(base) == 12 and effect > 0.05
    assert 0 < apart(base, small) < 0.05 * max(map(abs, base)), apart(base, small)
    for form in (adapter, folder / "adapter.gguf"):
        assert apart(scores(plain, f",adapter={form}"), merged) < 1e-3 * max(map(abs, merged))
    assert abs(apart(scores(folder / "small.gguf", f",adapter={folder / 'adapter.gguf'}"), small) / effect - 1) < 0.3
