"""--adapter on every runner, and merge-adapter: the same text from the adapter beside the weights and in them."""

import json
from pathlib import Path

import pytest
import torch
from checkpoint.adapter_files import tensors_for, write_adapter
from cli.conftest import Run

import llama2.checkpoint as files
from llama2 import cpu

PARTS = ("q_proj", "v_proj", "gate_proj", "down_proj")
WORDS = ["-n", "24", "--greedy", "Hello there"]


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llama2 import LlamaConfig

    config = LlamaConfig.from_pretrained(checkpoint)
    tensors = {name: 3 * tensor for name, tensor in tensors_for(config, PARTS).items()}
    return write_adapter(tmp_path_factory.mktemp("adapter"), tensors, target_modules=list(PARTS))


def test_generate_with_an_adapter_equals_the_merged_model(
    run: Run, checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    code, plain, _ = run("generate", "-m", checkpoint, *WORDS)
    assert code == 0
    code, attached, err = run("generate", "-m", checkpoint, "--adapter", adapter, *WORDS)
    assert code == 0 and attached != plain and "merged" not in err
    code, torch_text, err = run("generate", "-m", checkpoint, "--adapter", adapter, "--runner", "torch", *WORDS)
    assert code == 0 and "for torch the adapter was merged into the weights (float32 sums, kept as float32)" in err
    assert torch_text == attached
    code, out, _ = run("merge-adapter", checkpoint, adapter, tmp_path / "merged")
    assert code == 0 and "hf, 0.00 GB of weights" in out
    assert run("generate", "-m", tmp_path / "merged", *WORDS)[1] == attached


@pytest.mark.skipif(not cpu.available(), reason="the native module is not built")
def test_a_gguf_file_stays_packed(run: Run, smollm2: Path, tmp_path: Path) -> None:
    tensors = tensors_for(files.open(smollm2).config, ("o_proj",), dtype=torch.bfloat16)
    folder = write_adapter(tmp_path, {k: 0.4 * t for k, t in tensors.items()}, target_modules=["o_proj"])
    words = ["generate", "-m", smollm2, "-n", "8", "--greedy", "The capital of France is"]
    plain = run(*words)[1]
    code, found, err = run(*words, "--adapter", folder)
    assert code == 0 and found != plain and "Paris" in plain and "merged" not in err and "torch runs" not in err


def test_perplexity_and_chat_take_an_adapter(run: Run, checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("How well a model predicts a text. " * 8)
    words = ["perplexity", "-m", str(checkpoint), "-f", str(text), "--window", "32", "--json"]
    plain = json.loads(run(*words)[1])["rows"][0]["value"]
    values = [
        json.loads(run(*words, "--adapter", adapter, "--runner", runner)[1])["rows"][0]["value"]
        for runner in ("auto", "torch")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-3) and abs(values[0] / plain - 1) > 0.01
    conversation = tmp_path / "c.json"
    conversation.write_text(json.dumps([{"role": "user", "content": "Hi"}]))
    answers = [
        run("chat", "-m", checkpoint, "--greedy", "-n", "16", "--load", conversation, *more)[1]
        for more in ([], ["--adapter", adapter], ["--adapter", adapter, "--runner", "torch"])
    ]
    assert answers[0] != answers[1] == answers[2]


def test_a_gguf_adapter_does_what_the_folder_does(run: Run, checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    code, out, _ = run("convert", adapter, tmp_path / "a.gguf", "--as-adapter", "--base", checkpoint)
    assert code == 0 and "a.gguf: GGUF adapter of 8 modules" in out
    want = run("generate", "-m", checkpoint, "--adapter", adapter, *WORDS)[1]
    assert want != run("generate", "-m", checkpoint, *WORDS)[1]
    for more in ([], ["--runner", "torch"]):
        assert run("generate", "-m", checkpoint, "--adapter", tmp_path / "a.gguf", *more, *WORDS)[1] == want
    assert run("convert", checkpoint, tmp_path / "base.gguf", "--quiet")[0] == 0
    assert run("generate", "-m", tmp_path / "base.gguf", "--adapter", tmp_path / "a.gguf", *WORDS)[1] == want
    assert run("merge-adapter", checkpoint, tmp_path / "a.gguf", tmp_path / "merged", "--quiet")[0] == 0
    assert run("generate", "-m", tmp_path / "merged", *WORDS)[1] == want
    code, _, err = run("convert", tmp_path / "a.gguf", tmp_path / "back", "--as-adapter")
    assert code == 2 and "does not say which model it is for; give that model with --base" in err
    assert (
        run("convert", tmp_path / "a.gguf", tmp_path / "back", "--as-adapter", "--base", tmp_path / "base.gguf")[0] == 0
    )
    assert run("generate", "-m", checkpoint, "--adapter", tmp_path / "back", *WORDS)[1] == want
    code, out, _ = run("info", tmp_path / "a.gguf")
    assert code == 0 and "GGUF LoRA adapter" in out and "of attn_q, attn_v, ffn_down, ffn_gate" in out
    for wrong, said in (
        (["generate", "-m", tmp_path / "a.gguf", *WORDS], "give the model with -m and this file with --adapter"),
        (["convert", tmp_path / "a.gguf", tmp_path / "m"], "not 'model'; give the model's file with -m"),
        (["generate", "-m", checkpoint, "--adapter", tmp_path / "base.gguf", *WORDS], "of a model, not an adapter"),
        (["convert", adapter, tmp_path / "b.gguf", "--as-adapter", "--dtype", "q8_0"], "--dtype is for models"),
        (["convert", checkpoint, tmp_path / "b.gguf", "--base", checkpoint], "it goes with --as-adapter"),
    ):
        code, _, err = run(*wrong)
        assert code == 2 and said in err, err


def test_mistakes_are_explained(run: Run, checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    code, _, err = run("generate", "-m", checkpoint, "--adapter", tmp_path / "none", *WORDS)
    assert code == 2 and "does not exist" in err
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    code, _, err = run("generate", "-m", checkpoint, "--adapter", wrong, *WORDS)
    assert code == 2 and "holds neither adapter_model.safetensors" in err
    code, _, err = run("merge-adapter", checkpoint, tmp_path / "merged")
    assert code == 2 and "a base, an adapter and a target, but 2" in err
    code, _, err = run("merge-adapter", checkpoint, wrong, tmp_path / "merged")
    assert code == 2 and not (tmp_path / "merged").exists()


def test_merge_adapter_takes_a_dtype(run: Run, checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    assert run("merge-adapter", checkpoint, adapter, tmp_path / "half", "--dtype", "bfloat16")[0] == 0
    found = files.open(tmp_path / "half").read("model.layers.0.mlp.down_proj.weight")
    assert found.dtype == torch.bfloat16
