"""`llama2 convert`, `shard`, `verify`, and the documented script."""

import json
import re
from pathlib import Path

import pytest
import torch
from cli.conftest import Run
from tiny import tiny_model

import llama2.checkpoint as checkpoint
from llama2 import AutoTokenizer
from llama2 import convert_llama_weights_to_hf as script
from llama2.cli import main
from llama2.errors import CheckpointError
from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE
from llama2.tokenizer.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, SentencePieceModel

pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer", "ignore:.*the parts differ by one row")


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    tiny_model(torch.bfloat16).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_convert_there_and_back(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta, gguf, back = (str(tmp_path / name) for name in ("meta", "x.gguf", "back"))
    assert main(["convert", str(hf), meta, "--to", "meta", "--shards", "2"]) == 0
    assert "meta, 0.00 GB of weights" in capsys.readouterr().out
    assert main(["info", meta]) == 0 and "Meta's .pth, 2 file(s)" in capsys.readouterr().out
    assert main(["convert", meta, gguf]) == 0  # the suffix says the format
    assert main(["convert", gguf, back, "--shard-size", "50KB", "--dtype", "keep"]) == 0
    a, b = checkpoint.open(hf), checkpoint.open(back)
    assert all(torch.equal(a.read(name), b.read(name)) for name in a.tensors)
    capsys.readouterr()
    assert main(["verify", back]) == 0 and "files match" in capsys.readouterr().out
    (Path(back) / "config.json").write_text("{}")
    assert main(["verify", back]) == 2 and "config.json differs" in capsys.readouterr().err


def test_shard(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shard", str(hf), str(tmp_path / "many"), "--size", "50KB"]) == 0
    assert main(["shard", str(tmp_path / "many"), str(tmp_path / "one"), "--size", "1GB"]) == 0
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert main(["shard", str(hf), str(tmp_path / "x")]) == 2
    assert "--size" in capsys.readouterr().err


def test_mistakes_are_explained(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (["convert", str(hf)], "a source and a target, but 1"),
        (["convert", str(hf), str(hf)], "is the source"),
        (["convert", str(hf), str(tmp_path / "y"), "--dtype", "q4_0"], "need --to gguf"),
        (["convert", str(tmp_path / "none"), str(tmp_path / "y")], "does not exist"),
        (["convert", str(hf), str(tmp_path / "y"), "--kv-heads", "3"], "cannot be pooled to 3"),
        (["verify"], "0 paths"),
        (["verify", str(hf)], "SHA256SUMS does not exist"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err, words
    assert not (tmp_path / "y").exists()


def test_a_tokenizer_one_folder_up(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where Meta's download script leaves it: info, the tokenizer and the conversion find it there."""
    meta = tmp_path / "llama" / "llama-2-7b-chat"
    assert main(["convert", str(hf), str(meta), "--to", "meta"]) == 0
    letters = [*(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a"]
    pieces = ["<unk>", "<s>", "</s>", *letters]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * 3]
    model = SentencePieceModel(tuple(pieces), tuple(-float(i) for i in range(len(pieces))), tuple(types))
    (meta.parent / "tokenizer.model").write_bytes(model.to_bytes())
    capsys.readouterr()
    assert main(["info", "-m", str(meta)]) == 0
    assert "tokenizer.model, one folder up" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(meta).encode("a") == [1, 261]
    assert main(["convert", str(meta), str(tmp_path / "back")]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == LLAMA2_CHAT_TEMPLATE
    (meta / "params.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer.model or tokenizer.json in"):
        AutoTokenizer.from_pretrained(meta)


def test_the_documented_script(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = tmp_path / "llama" / "7B"
    assert main(["convert", str(hf), str(meta), "--to", "meta"]) == 0
    (meta / "huggingface_config.json").unlink()  # as Meta's own folders are
    words = ["--input_dir", str(meta.parent), "--model_size", "7B", "--output_dir"]
    assert script.main([*words, str(tmp_path / "out"), "--safe_serialization"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["torch_dtype"], config["max_position_embeddings"]) == ("bfloat16", 4096)
    assert script.main([*words, str(tmp_path / "one"), "--llama_version", "1"]) == 0
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["max_position_embeddings"] == 2048
    capsys.readouterr()
    for extra, said in (
        (["--num_shards", "2"], "holds 1 shards, but the options say 2"),
        (["--special_tokens", "a"], "Llama 3's"),
    ):
        assert script.main([*words, str(tmp_path / "no"), *extra]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_requantize_tells_the_loss(run: Run, smollm2: Path, tmp_path: Path) -> None:
    """Weights by their types, and both models on a text."""
    code, _, err = run("convert", smollm2, tmp_path / "x.gguf", "--dtype", "q4_k_m", "--quiet")
    assert code == 2 and "210 matrices" in err and "give --requantize" in err and not (tmp_path / "x.gguf").exists()
    words = ["convert", smollm2, tmp_path / "x.gguf", "--dtype", "q4_k_m", "--quiet", "--requantize"]
    code, _, err = run(*words, "--eval-tokens", "4")
    assert code == 2 and "--eval-tokens is 4; give 16 at least, or 0" in err
    code, out, _ = run(*words, "--eval-tokens", "128")
    assert code == 0 and "quantised again: 166 of Q4_1 as Q5_0, " in out
    found = re.search(
        r"measured: perplexity ([\d.]+) before, ([\d.]+) after \((\S+) ± \S+ %\), mean KL divergence (\S+)", out
    )
    assert found is not None, out
    before, after, percent, kl = map(float, found.groups())
    assert abs(after / before - 1 - percent / 100) < 1e-3 and 0.005 < kl < 0.5
