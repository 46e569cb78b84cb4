"""Conversion: round trips bit for bit, interruptions, damage, manifests."""

import errno
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_ids, tiny_model

import llama2.checkpoint as checkpoint
from llama2 import LlamaForCausalLM
from llama2.checkpoint import convert as engine
from llama2.checkpoint import writer as target_module
from llama2.checkpoint.convert import ConversionSettings, convert, verify
from llama2.checkpoint.gguf import GgufFile, read_metadata
from llama2.checkpoint.gqa_pooling import PooledCheckpoint
from llama2.checkpoint.tokenizer_files import gguf_keys, write_folder
from llama2.cli import main
from llama2.errors import CheckpointError, InputError, MismatchError
from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE, from_gguf, load
from llama2.tokenizer.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, SentencePieceModel

pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer", "ignore:.*the parts differ by one row")

SHAPES: dict[str, dict[str, Any]] = {
    "mha": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "gqa": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "70b": {"num_attention_heads": 16, "num_key_value_heads": 8, "rope_theta": 1e6},
    "tied": {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
}
DTYPES = {"mha": torch.float16, "gqa": torch.bfloat16, "70b": torch.float32, "tied": torch.bfloat16}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors in several blocks, as large models have them."""
    monkeypatch.setattr(target_module, "BLOCK_BYTES", 4096)


def save(folder: Path, shape: str = "gqa", **changes: Any) -> Path:
    tiny_model(DTYPES[shape], **{**SHAPES[shape], **changes}).save_pretrained(folder)
    return folder


def same(a: Path, b: Path) -> None:
    """The same tensors, bit for bit, and the same architecture."""
    ours, theirs = checkpoint.open(a), checkpoint.open(b)
    assert set(ours.tensors) == set(theirs.tensors)
    for name in ours.tensors:
        x, y = ours.read(name), theirs.read(name)
        assert x.dtype == y.dtype and torch.equal(x, y), name
    for key in ("hidden_size", "intermediate_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta"):
        assert getattr(ours.config, key) == getattr(theirs.config, key), key
    for key in ("tie_word_embeddings", "max_position_embeddings", "rope_parameters", "vocab_size"):
        assert getattr(ours.config, key) == getattr(theirs.config, key), key


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("shape", SHAPES)
def test_hf_meta_hf(tmp_path: Path, shape: str) -> None:
    source = save(tmp_path / "hf", shape)
    before = tree(source)
    for shards in (1, 2, 8):
        meta, back = tmp_path / f"meta{shards}", tmp_path / f"back{shards}"
        convert(source, meta, ConversionSettings("meta", shards=shards))
        assert len(list(meta.glob("consolidated.*.pth"))) == shards
        same(source, meta)
        convert(meta, back, ConversionSettings("hf", shard_size=60_000))
        assert len(list(back.glob("*.safetensors"))) > 1
        same(source, back)
        assert checkpoint.open(back).config.to_dict() == checkpoint.open(source).config.to_dict()
    assert tree(source) == before


@pytest.mark.parametrize("shape", SHAPES)
def test_hf_gguf_hf(tmp_path: Path, shape: str) -> None:
    source = save(tmp_path / "hf", shape)
    convert(source, tmp_path / "x.gguf", ConversionSettings("gguf"))
    convert(tmp_path / "x.gguf", tmp_path / "back", ConversionSettings("hf"))
    same(source, tmp_path / "back")
    convert(tmp_path / "x.gguf", tmp_path / "meta", ConversionSettings("meta", shards=2))
    convert(tmp_path / "meta", tmp_path / "y.gguf", ConversionSettings("gguf"))
    same(tmp_path / "x.gguf", tmp_path / "y.gguf")


@pytest.mark.parametrize("rope", ["linear", "yarn", "llama3"])
def test_rope_settings_pass_through_gguf(tmp_path: Path, rope: str) -> None:
    settings = {
        "linear": {"rope_type": "linear", "factor": 2.0},
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "llama3": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_theta": 500000.0,
        },
    }
    source = save(tmp_path / "hf", rope_scaling=settings[rope])
    convert(source, tmp_path / "x.gguf", ConversionSettings("gguf"))
    convert(tmp_path / "x.gguf", tmp_path / "back", ConversionSettings())
    same(source, tmp_path / "back")


@pytest.mark.parametrize(
    ("settings", "stored", "back"),
    [
        # llama.cpp multiplies yarn's own 0.1 ln(4) + 1 = 1.1386294 by attn_factor.
        ({"attention_factor": 1.5}, 1.5 / 1.1386294, 1.5),
        ({"attention_factor": 1.0}, 1.0 / 1.1386294, 1.0),
        ({"attention_factor": 1.1386294361119891}, None, None),
        ({"mscale": 1.0, "mscale_all_dim": 0.5}, 1 / 1.0693147, 1.138629436 / 1.069314718),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1 / 1.1386294, 1.0),
    ],
)
def test_yarns_attention_factor_passes_through_gguf(
    tmp_path: Path, settings: dict[str, float], stored: float | None, back: float | None
) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    source = save(tmp_path / "hf", rope_scaling={**rope, **settings})
    convert(source, tmp_path / "x.gguf", ConversionSettings("gguf"))
    key = read_metadata(tmp_path / "x.gguf").get("llama.rope.scaling.attn_factor")
    assert key == (None if stored is None else pytest.approx(stored, rel=1e-6))
    found = checkpoint.open(tmp_path / "x.gguf").config.rope_scaling
    assert found == {**rope, **({} if back is None else {"attention_factor": pytest.approx(back, rel=5e-7)})}
    before, after = (LlamaForCausalLM.from_pretrained(path) for path in (source, tmp_path / "x.gguf"))
    with torch.no_grad():
        assert torch.allclose(before(tiny_ids()).logits.float(), after(tiny_ids()).logits.float(), rtol=1e-3, atol=1e-3)


def test_yarns_betas_are_written_and_told(tmp_path: Path) -> None:
    """llama.cpp's loader reads them of other architectures alone (test_rope_in_llama_cpp.py)."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    source = save(tmp_path / "hf", rope_scaling={**rope, "beta_fast": 16.0, "beta_slow": 2.0})
    with pytest.warns(
        UserWarning, match="beta_fast and beta_slow .*run it there with --yarn-beta-fast 16 --yarn-beta-slow 2,"
    ):
        convert(source, tmp_path / "x.gguf", ConversionSettings("gguf"))
    found = checkpoint.open(tmp_path / "x.gguf").config.rope_scaling
    assert found == {**rope, "beta_fast": 16.0, "beta_slow": 2.0}
    save(tmp_path / "quiet", rope_scaling={**rope, "beta_fast": 32.0, "beta_slow": 1.0})  # the defaults
    convert(tmp_path / "quiet", tmp_path / "quiet.gguf", ConversionSettings("gguf"))


def test_biases_and_head_width(tmp_path: Path) -> None:
    source = save(tmp_path / "hf", attention_bias=True, mlp_bias=True, head_dim=24)
    convert(source, tmp_path / "x.gguf", ConversionSettings("gguf"))
    convert(tmp_path / "x.gguf", tmp_path / "back", ConversionSettings())
    same(source, tmp_path / "back")
    with pytest.raises(InputError, match="no place for .*bias"):
        convert(source, tmp_path / "meta", ConversionSettings("meta"))
    assert not (tmp_path / "meta").exists()


def test_meta_files_are_plain_torch_archives(tmp_path: Path) -> None:
    """Python's zip checks every checksum; torch maps the tensors, whose data starts at multiples of 64."""
    source = save(tmp_path / "hf")
    convert(source, tmp_path / "meta", ConversionSettings("meta", shards=2))
    file = tmp_path / "meta" / "consolidated.01.pth"
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        for entry in archive.infolist():
            head = file.read_bytes()[entry.header_offset :]
            name_length, extra_length = struct.unpack_from("<2H", head, 26)
            assert (entry.header_offset + 30 + name_length + extra_length) % 64 == 0, entry.filename
    mapped = torch.load(file, mmap=True, weights_only=True)
    read = torch.load(file, weights_only=True)
    embedding = checkpoint.open(source).read("model.embed_tokens.weight")
    assert torch.equal(mapped["tok_embeddings.weight"], embedding[:, 32:])
    assert all(torch.equal(mapped[name], read[name]) for name in read)
    assert json.loads((tmp_path / "meta/params.json").read_text()).keys() <= {
        *("dim", "multiple_of", "ffn_dim_multiplier", "n_heads", "n_kv_heads", "n_layers"),
        *("norm_eps", "vocab_size", "rope_theta"),
    }


def test_dtypes(tmp_path: Path) -> None:
    source = save(tmp_path / "hf", "70b")
    convert(source, tmp_path / "half", ConversionSettings(dtype="float16"))
    half = checkpoint.open(tmp_path / "half")
    assert half.config.dtype is torch.float16
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(half.read(name), checkpoint.open(source).read(name).half())
    convert(source, tmp_path / "x.gguf", ConversionSettings("gguf", dtype="q8_0"))
    file = checkpoint.open(tmp_path / "x.gguf")
    assert file.tensors[name].type == "Q8_0" and file.tensors["model.norm.weight"].type == "F32"
    error = (file.read(name) - checkpoint.open(source).read(name)).abs().max()
    assert 0 < error < 1.5 / 127 / 2  # half a step; the weights are below 1.5
    convert(tmp_path / "x.gguf", tmp_path / "y.gguf", ConversionSettings("gguf"))  # packed rows are copied
    same(tmp_path / "x.gguf", tmp_path / "y.gguf")
    convert(source, tmp_path / "k.gguf", ConversionSettings("gguf", dtype="q4_k"))  # 64 columns: no super-block fits
    assert checkpoint.open(tmp_path / "k.gguf").tensors[name].type == "Q5_0"


def test_a_tied_head_must_be_the_embedding(tmp_path: Path) -> None:
    source = save(tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(MismatchError, match="ties lm_head.weight"):
        convert(source, tmp_path / "out", ConversionSettings())
    assert not (tmp_path / "out").exists()
    model = LlamaForCausalLM.from_pretrained(source, tie_word_embeddings=False)
    state = {**model.state_dict(), "lm_head.weight": model.model.embed_tokens.weight.detach().clone()}
    model.save_pretrained(tmp_path / "equal", state_dict=state)
    (tmp_path / "equal" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert "lm_head.weight" in checkpoint.open(tmp_path / "equal").tensors
    convert(tmp_path / "equal", tmp_path / "once", ConversionSettings())
    assert set(checkpoint.open(tmp_path / "once").tensors) == set(state) - {"lm_head.weight"}


def test_pooled_heads_are_means(tmp_path: Path) -> None:
    source = save(tmp_path / "hf", "mha")
    convert(source, tmp_path / "pooled", ConversionSettings(kv_heads=2))
    ours, theirs = checkpoint.open(source), checkpoint.open(tmp_path / "pooled")
    assert theirs.config.num_key_value_heads == 2 and theirs.config.num_attention_heads == 8
    for letter in "kv":
        name = f"model.layers.1.self_attn.{letter}_proj.weight"
        whole, pooled = ours.read(name).float(), theirs.read(name)
        assert pooled.shape == (16, 64)
        assert torch.equal(PooledCheckpoint(ours, 2).read_rows(name, 9, 14), pooled[9:14])
        assert torch.equal(PooledCheckpoint(ours, 2).read(name), pooled)
        for head in range(2):
            mean = sum(whole[8 * (4 * head + i) : 8 * (4 * head + i + 1)] for i in range(4)) / 4
            torch.testing.assert_close(pooled[8 * head : 8 * head + 8].float(), mean, rtol=1e-3, atol=1e-4)
    LlamaForCausalLM.from_pretrained(tmp_path / "pooled")(tiny_ids())
    with pytest.raises(InputError, match="8 key and value heads cannot be pooled to 3"):
        convert(source, tmp_path / "three", ConversionSettings(kv_heads=3))


def test_equal_heads_pool_to_the_same_model(tmp_path: Path) -> None:
    """A model whose grouped heads were repeated gives its own logits back."""
    grouped = tiny_model(torch.float32, **SHAPES["gqa"])
    state = grouped.state_dict()
    for name in list(state):
        if "k_proj" in name or "v_proj" in name:
            state[name] = state[name].unflatten(0, (2, 1, 8)).expand(-1, 4, -1, -1).flatten(0, 2).contiguous()
    full = LlamaForCausalLM(tiny_config(**SHAPES["mha"]))
    full.load_state_dict(state)
    full.save_pretrained(tmp_path / "mha")
    convert(tmp_path / "mha", tmp_path / "gqa", ConversionSettings(kv_heads=2))
    pooled = LlamaForCausalLM.from_pretrained(tmp_path / "gqa")
    for name, tensor in pooled.state_dict().items():
        torch.testing.assert_close(tensor, grouped.state_dict()[name], rtol=0, atol=1e-6)


# -- interruptions -----------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from llama2.checkpoint import convert as engine
from llama2.checkpoint import writer
engine.SYNC_BYTES, writer.BLOCK_BYTES = 20_000, 4096
calls = 0
def progress(done, total, name):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
if {rename}:
    rename = os.rename
    def die(a, b):
        rename(a, b)
        if str(b).endswith(("safetensors", "pth", "gguf")):
            os.kill(os.getpid(), signal.SIGKILL)
    os.rename = die
engine.convert({source!r}, {target!r}, engine.ConversionSettings(**{options!r}), progress)
"""


@pytest.mark.parametrize(
    ("options", "target", "call", "rename"),
    [
        ({"to": "hf", "shard_size": 60_000}, "out", 12, False),
        ({"to": "meta", "shards": 2}, "out", 12, False),
        ({"to": "gguf", "dtype": "q8_0"}, "out.gguf", 12, False),
        ({"to": "hf", "shard_size": 60_000}, "out", -1, True),
    ],
    ids=["hf", "meta", "gguf", "renaming"],
)
def test_kill_and_resume(tmp_path: Path, options: dict[str, Any], target: str, call: int, rename: bool) -> None:
    source, path, whole = save(tmp_path / "hf"), tmp_path / target, tmp_path / "whole" / target
    (tmp_path / "whole").mkdir()
    convert(source, whole, ConversionSettings(**options))
    script = KILLED.format(source=str(source), target=str(path), options=options, call=call, rename=rename)
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    if path.suffix == ".gguf":
        assert not path.exists()
    else:
        assert not (path / "config.json").exists() and not (path / "params.json").exists()
        with pytest.raises(CheckpointError, match="interrupted; give the same `llama2 convert` command again"):
            checkpoint.open(path)
    if not rename:
        with pytest.raises(CheckpointError, match="another source or with other options"):
            convert(source, path, ConversionSettings(**{**options, "dtype": "float32"}))
    result = convert(source, path, ConversionSettings(**options))
    assert result.resumed_bytes > 20_000
    verify(path)
    if path.is_dir():
        assert tree(path) == tree(whole)
    else:
        assert path.read_bytes() == whole.read_bytes()
        assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out.gguf", "out.gguf.sha256", "whole"]


def test_full_disk_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, path = save(tmp_path / "hf"), tmp_path / "out"
    monkeypatch.setattr(engine, "SYNC_BYTES", 20_000)
    write, room = target_module.Appender.write, [60_000]

    def limited(self: Any, data: Any) -> None:
        room[0] -= len(data) if isinstance(data, bytes) else data.nbytes
        if room[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(target_module.Appender, "write", limited)
        with pytest.raises(CheckpointError, match=r"disk of .* is full; free some space and give the same command"):
            convert(source, path, ConversionSettings())
    assert not (path / "config.json").exists()
    assert convert(source, path, ConversionSettings()).resumed_bytes > 20_000
    same(source, path)


def test_a_file_larger_than_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As `ulimit -f` allows; a FAT disk says the same at 4 GB. Python ignores the signal that comes with it."""
    source, path = save(tmp_path / "hf"), tmp_path / "out"
    command = ["convert", str(source), str(path)]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 1024, before[1]))
    try:
        code = main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and "allows no file of the size that is needed" in capsys.readouterr().err
    assert not (path / "config.json").exists()
    assert main(command) == 0
    same(source, path)


def test_space_is_checked_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "hf")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(CheckpointError, match="GB free"):
        convert(source, tmp_path / "out", ConversionSettings())
    assert not (tmp_path / "out").exists()


def test_a_changed_source_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, path = save(tmp_path / "hf"), tmp_path / "out"
    monkeypatch.setattr(engine, "SYNC_BYTES", 20_000)

    def stop(done: int, total: int, name: str) -> None:
        if done > 60_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, path, ConversionSettings(), stop)
    tiny_model(DTYPES["gqa"], seed=7, **SHAPES["gqa"]).save_pretrained(source)
    with pytest.raises(CheckpointError, match="interrupted conversion of another source"):
        convert(source, path, ConversionSettings())


def test_a_file_beside_its_source_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden parts in the source's own folder do not make it another source."""
    source = save(tmp_path / "hf")
    monkeypatch.setattr(engine, "SYNC_BYTES", 20_000)

    def stop(done: int, total: int, name: str) -> None:
        if done > 60_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, source / "x.gguf", ConversionSettings("gguf"), stop)
    assert convert(source, source / "x.gguf", ConversionSettings("gguf")).resumed_bytes > 20_000
    assert verify(source / "x.gguf") == ["x.gguf"]


def test_targets_that_are_taken(tmp_path: Path) -> None:
    source = save(tmp_path / "hf")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        convert(source, tmp_path / "taken", ConversionSettings())
    (tmp_path / "x.gguf").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        convert(source, tmp_path / "x.gguf", ConversionSettings("gguf"))
    for target, options, match in (
        (source, ConversionSettings(), "is the source"),
        (tmp_path / "x", ConversionSettings("gguf"), "ends in .gguf"),
        (tmp_path / "x", ConversionSettings("onnx"), "not one of hf, meta, gguf"),
        (tmp_path / "x", ConversionSettings(shards=2), "Meta's format"),
        (tmp_path / "x", ConversionSettings("meta", shard_size="1GB"), "is for hf"),
        (tmp_path / "x", ConversionSettings("meta", shards=3), "do not divide into 3 shards"),
        (tmp_path / "x", ConversionSettings(dtype="q4_0"), "need --to gguf"),
        (tmp_path / "x.gg.gguf", ConversionSettings("gguf", dtype="iq2_s"), "cannot be written"),
    ):
        with pytest.raises(InputError, match=match):
            convert(source, target, options)
    assert not (tmp_path / "x").exists()


def test_verify(tmp_path: Path) -> None:
    source = save(tmp_path / "hf")
    convert(source, tmp_path / "out", ConversionSettings())
    assert set(verify(tmp_path / "out")) == {"config.json", "generation_config.json", "model.safetensors"}
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    (tmp_path / "out" / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match="generation_config.json is missing; model.safetensors differs"):
        verify(tmp_path / "out")
    with pytest.raises(CheckpointError, match="only checkpoints that `llama2 convert` wrote"):
        verify(source)


# -- tokenizers --------------------------------------------------------------------------------------------------


def tiny_spm() -> SentencePieceModel:
    letters = ["▁", "a", "b", "▁a", "ab", "▁ab"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(letters)]
    scores = [0.0] * 259 + [-float(i) for i in range(len(letters))]
    return SentencePieceModel(tuple(pieces), tuple(scores), tuple(types))


def test_tokenizer_through_every_format(tmp_path: Path) -> None:
    source = save(tmp_path / "llama-2-7b-chat", vocab_size=270)
    meta = tmp_path / "llama-2-chat"
    (source / "tokenizer.model").write_bytes(tiny_spm().to_bytes())
    convert(source, meta, ConversionSettings("meta"))
    assert (meta / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    convert(meta, tmp_path / "hf", ConversionSettings())
    assert {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} <= {
        file.name for file in (tmp_path / "hf").iterdir()
    }
    tokenizer = load(tmp_path / "hf")
    ids = tokenizer.encode("ab ba é")
    assert ids[0] == 1 and tokenizer.chat_template == LLAMA2_CHAT_TEMPLATE
    convert(tmp_path / "hf", tmp_path / "x.gguf", ConversionSettings("gguf"))
    metadata = GgufFile(tmp_path / "x.gguf").metadata
    assert len(metadata["tokenizer.ggml.tokens"]) == 270  # padded to the embedding
    assert metadata["tokenizer.ggml.tokens"][265:] == [f"[PAD{i}]" for i in range(265, 270)]
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert metadata["tokenizer.chat_template"] == LLAMA2_CHAT_TEMPLATE
    again = from_gguf(metadata)
    assert again.encode("ab ba é") == ids
    convert(tmp_path / "x.gguf", tmp_path / "back", ConversionSettings())
    assert load(tmp_path / "back").encode("ab ba é") == ids
    same(source, tmp_path / "back")


def test_byte_level_tokenizer_to_gguf_again(tmp_path: Path, smollm2: Path) -> None:
    """From the real file's keys to tokenizer.json and back: the same keys, but for two that only one side states."""
    keys = read_metadata(smollm2)
    write_folder(keys, tmp_path, chat=False)
    made = gguf_keys(tmp_path, 49152, chat=False)
    for key in set(made) - {"tokenizer.ggml.add_eos_token"}:
        assert made[key] == keys[key], key
    assert len(made["tokenizer.ggml.merges"]) > 48000 and made["tokenizer.ggml.pre"] == "smollm"
    with pytest.raises(CheckpointError, match="49152 tokens, the model only 49151"):
        gguf_keys(tmp_path, 49151, chat=False)
    padded = gguf_keys(tmp_path, 49154, chat=False)["tokenizer.ggml.tokens"]
    assert padded[49151:] == [keys["tokenizer.ggml.tokens"][-1], "[PAD49152]", "[PAD49153]"]
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="GGUF has no name for the way it cuts words"):
        gguf_keys(tmp_path, 49152, chat=False)


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    source = save(tmp_path / "hf")
    (source / "tokenizer.model").write_bytes(tiny_spm().to_bytes())
    with pytest.raises(CheckpointError, match="265 tokens, the model only 97"):
        convert(source, tmp_path / "x.gguf", ConversionSettings("gguf"))


def test_a_bad_tokenizer_is_told_before_the_weights(tmp_path: Path) -> None:
    source = save(tmp_path / "hf")
    (source / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        convert(source, tmp_path / "out", ConversionSettings())
    assert not list((tmp_path / "out").rglob("*.partial"))
