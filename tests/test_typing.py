"""What a type checker, an editor and `inspect` learn of the public interface."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llama2
from llama2.call_options import AsStored, ConfigOptions, GenerationSettings, TokenizerOptions
from llama2.checkpoint import load, quantized, save
from llama2.checkpoint.source import HUB_OPTIONS
from llama2.generation.call_settings import CALL_ARGUMENTS
from llama2.generation.config import DEFAULTS
from llama2.generation.loop import compute_transition_scores, generate
from llama2.model_methods import LOAD_DEFAULTS, LoadOptions, ModelMethods
from llama2.tokenizer import LlamaTokenizer, LlamaTokenizerFast

ROOT = Path(__file__).resolve().parent.parent

# Mistakes stand in the lines that end in a comment with the words mypy must say.
SCRIPT = """\
import torch

from llama2 import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM, TextStreamer

model = AutoModelForCausalLM.from_pretrained("folder", dtype=torch.bfloat16, device_map="cpu", num_hidden_layers=2)
tokenizer = AutoTokenizer.from_pretrained("folder", padding_side="left")
encoding = tokenizer(["Hello", "world"], return_tensors="pt", padding=True)
settings = GenerationConfig(do_sample=True, temperature=0.7, max_new_tokens=20)
model.generate(**encoding, generation_config=settings, streamer=TextStreamer(tokenizer), seed=[1, 2], top_p=0.9)
model.generate(**encoding, max_new_token=20)  # "max_new_token"
LlamaForCausalLM.from_pretrained("folder", dtype=16)  # "int"
pair = LlamaForCausalLM.from_pretrained("folder", output_loading_info=True, load_in_4bit=True)
missing: list[str] = pair[1]["missing_keys"]
pair[0].save_pretrained("out", max_shard_size="5GB")
words: int = tokenizer.decode([1, 2])  # "str"
"""


def _mypy(script: Path, cache: Path) -> list[str]:
    """The messages of `mypy --strict` about this file, notes left out."""
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", f"--cache-dir={cache}",
         "--no-error-summary", str(script)],
        capture_output=True, text=True, cwd=script.parent, env={**os.environ, "MYPYPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert not run.stderr, run.stderr
    return [line for line in run.stdout.splitlines() if ": error:" in line]


@pytest.mark.timeout(1200)
def test_mypy_strict_finds_the_three_mistakes_of_a_script(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    planted = {i: line.split("# ")[1].strip('"') for i, line in enumerate(SCRIPT.splitlines(), 1) if "# " in line}
    messages = _mypy(script, ROOT / ".mypy_cache" / "scripts")
    found = {int(message.split(":")[1]): message for message in messages}
    assert sorted(found) == sorted(planted) and len(messages) == 3, messages
    assert all(word in found[line] for line, word in planted.items()), messages


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def test_generate_shows_every_parameter() -> None:
    """Those of the function behind it, with the same defaults; every argument of a call, every setting."""
    declared, real = _parameters(llama2.LlamaForCausalLM.generate), _parameters(generate)
    for name in list(real)[1:-1]:
        assert declared[name].default == real[name].default, name
    assert {*list(real)[1:-1], *CALL_ARGUMENTS, *DEFAULTS, "self"} == set(declared)
    assert {name: declared[name].default for name in DEFAULTS} == DEFAULTS
    assert set(GenerationSettings.__annotations__) == set(DEFAULTS)


def test_from_pretrained_of_models_shows_every_parameter() -> None:
    declared, real = _parameters(llama2.LlamaForCausalLM.from_pretrained), _parameters(load.from_pretrained)
    own = [name for name in real if name not in ("cls", "model_args", "kwargs")]
    for name in own:
        assert declared[name].default == real[name].default, name
    fields = {name for name, parameter in declared.items() if isinstance(parameter.default, AsStored)}
    assert set(declared) == {*own, *HUB_OPTIONS, *fields, "model_args", "kwargs", "disable_mmap"}
    assert fields == set(ConfigOptions.__annotations__) - set(HUB_OPTIONS)
    assert all(hasattr(llama2.LlamaConfig(), name) for name in fields)
    assert set(LOAD_DEFAULTS) == set(LoadOptions.__annotations__) - fields
    auto = _parameters(llama2.AutoModelForCausalLM.from_pretrained)
    assert {n: p.default for n, p in auto.items()} == {n: p.default for n, p in declared.items()}


@pytest.mark.parametrize("kind", [LlamaTokenizer, LlamaTokenizerFast])
def test_from_pretrained_of_tokenizers_shows_every_parameter(kind: Any) -> None:
    """Every argument of the constructors; what both classes share stands in `_setup`."""
    internal = {"self", "tokens", "ends", "template", "max_len", "extra", "unknown", "kwargs", "name_or_path"}
    files = {"vocab_file", "tokenizer_file", "tokenizer_object"}
    made = {*_parameters(kind.__init__), *_parameters(kind._setup)} - internal - files
    shown = set(_parameters(kind.from_pretrained))
    assert made <= shown and set(TokenizerOptions.__annotations__) <= shown
    assert shown - made <= {*HUB_OPTIONS, "pretrained_model_name_or_path", "init_inputs", "kwargs", *_parameters(
        LlamaTokenizer.__init__
    ), "from_slow"}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "function"),
    [
        (ModelMethods.save_pretrained, save.save_pretrained),
        (ModelMethods.push_to_hub, save.push_to_hub),
        (ModelMethods.dequantize, quantized.dequantize),
        (ModelMethods.compute_transition_scores, compute_transition_scores),
    ],
)
def test_a_declaration_is_the_function_behind_it(method: Any, function: Any) -> None:
    declared, real = list(_parameters(method).values())[1:], list(_parameters(function).values())[1:]
    assert [(p.name, p.kind, p.default) for p in declared] == [(p.name, p.kind, p.default) for p in real]


@pytest.mark.parametrize(
    "function",
    [
        llama2.LlamaForCausalLM.generate,
        llama2.LlamaForCausalLM.from_pretrained,
        llama2.LlamaForCausalLM.save_pretrained,
        llama2.AutoModelForCausalLM.from_pretrained,
        llama2.AutoTokenizer.from_pretrained,
        llama2.LlamaTokenizer.from_pretrained,
        llama2.LlamaTokenizerFast.from_pretrained,
        llama2.GenerationConfig.from_pretrained,
        llama2.LlamaConfig.from_pretrained,
        llama2.AutoConfig.from_pretrained,
    ],
)
def test_the_docstring_names_arguments_and_errors(function: Any) -> None:
    doc = inspect.getdoc(function) or ""
    assert "Args:" in doc and "Raises:" in doc
    for name, parameter in _parameters(function).items():
        assert parameter.annotation is not inspect.Parameter.empty or name == "self", name
