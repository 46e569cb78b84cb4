"""generate, tokenize, info and perplexity on a tiny checkpoint and on the real one."""

import json
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
import torch

import llama2.checkpoint
from llama2 import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from llama2.cli import info

Run = Callable[..., tuple[int, str, str]]


# -- generate ----------------------------------------------------------------------------------------------------


def expected(checkpoint: Path, text: str, **settings: object) -> str:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = tokenizer.encode(text)
    new = model.generate(torch.tensor([ids]), **settings)[0, len(ids) :]
    return str(tokenizer.decode(new, skip_special_tokens=True))


def test_generate_prints_what_generate_returns(run: Run, checkpoint: Path) -> None:
    code, out, err = run("generate", "-m", checkpoint, "Hi", "there", "-n", "9")
    assert (code, out) == (0, expected(checkpoint, "Hi there", max_new_tokens=9) + "\n")
    assert err.startswith("[model loaded in ") and "prompt 8 tokens" in err and "answer 9 tokens" in err
    assert "\x1b" not in err


def test_generate_samples_by_its_settings(run: Run, checkpoint: Path) -> None:
    argv = ["-m", checkpoint, "Hi", "-n", "9", "--seed", "5", "--top-p", "0.9"]
    wanted = expected(checkpoint, "Hi", max_new_tokens=9, do_sample=True, temperature=1.5, top_p=0.9, seed=5)
    assert run("generate", *argv, "--temperature", "1.5")[1] == wanted + "\n"
    assert run("generate", *argv, "--temperature", "0.2")[1] != wanted + "\n"


def test_generate_stops_at_text(run: Run, checkpoint: Path) -> None:
    whole = expected(checkpoint, "Hi", max_new_tokens=9)
    at = next(i for i, character in enumerate(whole) if character.isascii() and i > 0)
    _, out, err = run("generate", "-m", checkpoint, "Hi", "-n", "9", "--stop", whole[at])
    assert at < 8 and out == whole[: at + 1] + "\n" and "cut at" not in err


def test_generate_reads_the_standard_input(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("Hi there"))
    assert run("generate", "-m", checkpoint, "-", "-n", "5")[1] == (
        expected(checkpoint, "Hi there", max_new_tokens=5) + "\n"
    )


def test_generate_with_the_chat_template(run: Run, checkpoint: Path) -> None:
    prompt = "<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>"
    _, out, _ = run("generate", "-m", checkpoint, "Hi", "--chat", "--system", "Be kind.", "-n", "5")
    assert out == expected(checkpoint, prompt, max_new_tokens=5) + "\n"


def test_generate_with_a_template_of_ones_own(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain.jinja"
    file.write_text("Q: {{ messages[0]['content'] }} A:")
    _, out, _ = run("generate", "-m", checkpoint, "Hi", "--chat", "--chat-template", file, "-n", "5")
    assert out == expected(checkpoint, "Q: Hi A:", max_new_tokens=5) + "\n"


def test_generate_takes_a_single_file(run: Run, checkpoint: Path) -> None:
    wanted = run("generate", "-m", checkpoint, "Hi", "-n", "5")[1]
    assert run("generate", "-m", checkpoint / "model.safetensors", "Hi", "-n", "5")[1] == wanted


def test_the_default_model_answers(run: Run, smollm2: Path) -> None:
    code, out, _ = run("generate", "The capital of France is", "-n", "2", "--greedy")
    assert code == 0 and "Paris" in out


def test_a_gguf_file_is_unpacked_where_an_option_asks_for_it(run: Run, smollm2: Path) -> None:
    words = ("generate", "The capital of France is", "-n", "2", "--greedy")
    for options, dtype, reason in (
        (("--runner", "torch"), "bfloat16", "--runner torch and --attn-implementation run it in torch"),
        (("--dtype", "float32"), "float32", "--dtype asks for that"),
    ):
        code, out, err = run(*words, *options)
        assert code == 0 and "Paris" in out
        assert f"llama2: this file's blocks are unpacked to {dtype}: {reason}\n" in err
    assert "unpacked" not in run(*words)[2]


# -- tokenize ----------------------------------------------------------------------------------------------------


def test_tokenize(run: Run, checkpoint: Path) -> None:
    ids = AutoTokenizer.from_pretrained(checkpoint).encode("Hi é")
    assert run("tokenize", "-m", checkpoint, "Hi", "é", "--ids")[1] == " ".join(map(str, ids)) + "\n"
    assert run("tokenize", "-m", checkpoint, "Hi é", "--count")[1] == f"{len(ids)}\n"
    shown = json.loads(run("tokenize", "-m", checkpoint, "Hi é", "--json")[1])
    assert shown == {"ids": ids, "pieces": ["H", "i", "Ġ", "Ã", "©"], "count": 5}
    table = run("tokenize", "-m", checkpoint, "Hi é")[1].splitlines()
    assert table[0].split() == ["0", str(ids[0]), "H"] and table[-1] == "5 tokens"
    assert table[2].split('"')[1] == " "


def test_tokenize_decodes(run: Run, checkpoint: Path) -> None:
    ids = AutoTokenizer.from_pretrained(checkpoint).encode("Hi é")
    assert run("tokenize", "-m", checkpoint, "--decode", *ids)[1] == "Hi é\n"
    assert run("tokenize", "-m", checkpoint, "--decode", str(ids))[1] == "Hi é\n"


def test_tokenize_with_the_real_vocabulary(run: Run, tokenizer_model: Path) -> None:
    assert run("tokenize", "-m", tokenizer_model, "Hello world", "--ids")[1] == "1 15043 3186\n"
    assert run("tokenize", "-m", tokenizer_model, "Hello world", "--ids", "--no-special-tokens")[1] == "15043 3186\n"


# -- info --------------------------------------------------------------------------------------------------------


def described(path: Path) -> dict[str, tuple[int, int]]:
    """type -> (tensors, weights) as the loader sees the file."""
    found: dict[str, tuple[int, int]] = {}
    for stored in llama2.checkpoint.open(path).tensors.values():
        tensors, weights = found.get(stored.type, (0, 0))
        found[stored.type] = tensors + 1, weights + int(torch.Size(stored.shape).numel())
    return found


def test_info_of_a_folder(run: Run, checkpoint: Path) -> None:
    shown = json.loads(run("info", "-m", checkpoint, "--json")[1])
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert shown["parameters"] == shown["parameters_by_config"] == model.num_parameters()
    assert shown["file_bytes"] == (checkpoint / "model.safetensors").stat().st_size
    types = {kind: (t["tensors"], t["parameters"]) for kind, t in shown["tensor_types"].items()}
    assert types == described(checkpoint)
    assert shown["tensor_types"]["F32"]["bytes"] == 4 * model.num_parameters()
    assert shown["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 2  # keys and values, layers, heads, width, bytes
    assert shown["kv_bytes_full_context"] == 96 * 128
    assert (shown["tokenizer"], shown["chat_template"], shown["licence"]) == ("tokenizer.json", True, None)


def test_info_of_the_real_file(run: Run, smollm2: Path) -> None:
    shown = json.loads(run("info", smollm2, "--json")[1])
    types = {kind: (t["tensors"], t["parameters"]) for kind, t in shown["tensor_types"].items()}
    assert types == described(smollm2)
    assert shown["parameters"] == 134_515_008 and shown["licence"] == "apache-2.0" and shown["chat_template"]
    # the tensors' bytes and the header make up the file
    assert 0 < smollm2.stat().st_size - sum(t["bytes"] for t in shown["tensor_types"].values()) < 2_000_000
    text = run("info")[1]
    for part in ("134,515,008", "mostly Q4_1", "9 heads of 64 (3 for keys and values)", "byte-level BPE", "tied head"):
        assert part in text


@pytest.mark.parametrize(
    ("preset", "parameters", "kv_bytes"),  # Touvron et al. 2023: 6.7B, 13.0B, 68.9B; grouped heads for 70B
    [("7b", 6_738_415_616, 524_288), ("13b", 13_015_864_320, 819_200), ("70b", 68_976_648_192, 327_680)],
)
def test_info_of_a_preset(run: Run, preset: str, parameters: int, kv_bytes: int) -> None:
    shown = json.loads(run("info", "-m", preset, "--json")[1])
    assert (shown["parameters"], shown["kv_bytes_per_token"]) == (parameters, kv_bytes)
    assert shown["weight_bytes"]["bfloat16"] == 2 * parameters
    assert parameters < shown["weight_bytes"]["int8"] < 1.1 * parameters


def test_info_counts_linear_layers_as_the_model_has_them() -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=50)  # fmt: skip
    model = LlamaForCausalLM(config)
    linear = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    assert info.linear_parameters(config) == linear


def test_info_of_two_models_is_refused(run: Run, checkpoint: Path) -> None:
    assert run("info", "-m", checkpoint, checkpoint)[0] == 2


@pytest.mark.parametrize(("count", "text"), [(999, "999 bytes"), (98_362_432, "98.4 MB"), (999_700_000, "1 GB")])
def test_sizes(count: int, text: str) -> None:
    assert info.size(count) == text


# -- perplexity --------------------------------------------------------------------------------------------------


def test_perplexity(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Some text to be predicted, long enough for two windows of it.")
    code, out, _ = run("perplexity", "-m", checkpoint, "-f", file, "--window", "40", "--json")
    shown = json.loads(out)["rows"][0]
    assert code == 0 and shown["details"]["tokens"] == len(file.read_text()) - 2
    assert (
        f"perplexity {shown['value']:.4f} ± {shown['error']:.4f}"
        in run("perplexity", "-m", checkpoint, "-f", file, "--window", "40")[1]
    )
