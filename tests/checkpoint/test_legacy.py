"""Files before GGUF, packed by hand: llama.cpp's GGML in each version and type, llama2.c's .bin in each version."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_ids, tiny_model

import llama2.checkpoint as checkpoint
from llama2 import AutoTokenizer, LlamaForCausalLM
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.names import hf_to_meta, rotated_heads, to_pairs
from llama2.errors import CheckpointError

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2,
                         "vocab_size": 300}  # fmt: skip
IDS = tiny_ids(1, 8)
pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer")


def paired(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The weights in Meta's order of rows, by Hugging Face names."""
    c, found = model.config, {}
    for name, tensor in model.state_dict().items():
        heads = rotated_heads(name, c.num_attention_heads, c.num_key_value_heads)
        found[name] = tensor.float() if heads is None else to_pairs(tensor.float(), heads)
    return found


def words() -> list[tuple[bytes, float]]:
    text = [b"<unk>", b"<s>", b"</s>", *(bytes([i]) for i in range(256)), b" ", b" t", b"he", b" the"]
    return [(word, -float(i)) for i, word in enumerate([*text, *(b"w%d" % i for i in range(300 - len(text)))])]


def blocks(x: np.ndarray, kind: str, pairs: bool, wide: bool) -> tuple[bytes, np.ndarray]:
    """Rows of one type: the bytes, and what they mean."""
    runs = x.reshape(-1, 32).astype(np.float32)
    size = np.float32 if wide else np.float16
    out, means = b"", np.empty_like(runs)
    for i, run in enumerate(runs):
        if kind == "Q8_0":
            d = size(np.abs(run).max() / 127)
            q = np.clip(np.rint(run / np.float32(d)), -127, 127)
            out, means[i] = out + d.tobytes() + q.astype(np.int8).tobytes(), q * np.float32(d)
            continue
        if kind == "Q4_0":
            d = size(np.abs(run).max() / 7)
            q = np.clip(np.rint(run / np.float32(d)) + 8, 0, 15).astype(np.uint8)
            out, means[i] = out + d.tobytes(), (q.astype(np.float32) - 8) * np.float32(d)
        else:
            m = size(run.min())
            d = size((run.max() - np.float32(m)) / 15)
            q = np.clip(np.rint((run - np.float32(m)) / np.float32(d)), 0, 15).astype(np.uint8)
            out, means[i] = out + d.tobytes() + m.tobytes(), q.astype(np.float32) * np.float32(d) + np.float32(m)
        out += bytes(q[0::2] | q[1::2] << 4) if pairs else bytes(q[:16] | q[16:] << 4)
    return out, means.reshape(x.shape)


def ggml(path: Path, magic: str, version: int, kind: str) -> dict[str, torch.Tensor]:
    """A GGML file; returns the weights that it means."""
    model = tiny_model(torch.float32, **SIZES)
    c, meant = model.config, {}
    data = {"ggml": b"lmgg", "ggmf": b"fmgg", "ggjt": b"tjgg"}[magic]
    data += b"" if magic == "ggml" else struct.pack("<I", version)
    data += struct.pack("<7I", c.vocab_size, c.hidden_size, 32, c.num_attention_heads, c.num_hidden_layers, 16, 2)
    for word, score in words():
        data += struct.pack("<I", len(word)) + word + (b"" if magic == "ggml" else struct.pack("<f", score))
    new, pairs = magic == "ggjt" and version == 3, not (magic == "ggjt" and version >= 2)
    for name, tensor in paired(model).items():
        x = tensor.numpy()
        number = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8}[kind] if x.ndim == 2 else 0
        if x.ndim == 1 or kind == "F32":
            raw, means = x.astype(np.float32).tobytes(), x
        elif kind == "F16":
            raw, means = x.astype(np.float16).tobytes(), x.astype(np.float16).astype(np.float32)
        else:
            raw, means = blocks(x, kind, pairs, not new)
        said = (hf_to_meta(name) or "").encode()
        data += struct.pack("<3I", x.ndim, len(said), number) + struct.pack(f"<{x.ndim}I", *reversed(x.shape)) + said
        data += bytes(-len(data) % 32) if magic == "ggjt" else b""
        data += raw
        meant[name] = torch.from_numpy(means)
    path.write_bytes(data)
    return meant


def llama2c(path: Path, version: int, tied: bool) -> dict[str, torch.Tensor]:
    model = tiny_model(torch.float32, **SIZES, num_key_value_heads=2, tie_word_embeddings=tied)
    c, held, meant = model.config, paired(model), {}
    vocabulary = c.vocab_size if tied or version else -c.vocab_size
    sizes = struct.pack("<7i", c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads,
                        c.num_key_value_heads, vocabulary, 64)  # fmt: skip
    group = 32
    data = sizes if version == 0 else b"24ka" + struct.pack("<i", version) + sizes + bytes([tied])
    data += struct.pack("<i", group) if version == 2 else b""
    data += b"" if version == 0 else bytes(256 - len(data))

    def add(name: str) -> bytes:
        x = held[name].numpy()
        if version < 2 or x.ndim == 1:
            meant[name] = held[name]
            return x.astype(np.float32).tobytes()
        runs = x.reshape(-1, group)
        s = (np.abs(runs).max(1) / 127).astype(np.float32)
        q = np.rint(runs / s[:, None]).astype(np.int8)
        meant[name] = torch.from_numpy((q.astype(np.float32) * s[:, None]).reshape(x.shape))
        return q.tobytes() + s.tobytes()

    def layers(part: str) -> bytes:
        return b"".join(add(f"model.layers.{i}.{part}.weight") for i in range(c.num_hidden_layers))

    attention = [f"self_attn.{p}_proj" for p in "qkvo"]
    mlp = [f"mlp.{p}_proj" for p in ("gate", "down", "up")]
    if version == 0:
        data += add("model.embed_tokens.weight") + layers("input_layernorm") + b"".join(map(layers, attention))
        data += layers("post_attention_layernorm") + b"".join(map(layers, mlp)) + add("model.norm.weight")
        data += bytes(4 * 64 * c.head_dim)
    else:
        data += layers("input_layernorm") + layers("post_attention_layernorm") + add("model.norm.weight")
        data += add("model.embed_tokens.weight") + b"".join(map(layers, [*attention, *mlp]))
    path.write_bytes(data + (b"" if tied else add("lm_head.weight")))
    return meant


def check(path: Path, meant: dict[str, torch.Tensor], tmp_path: Path) -> None:
    source = checkpoint.open(path)
    c = source.config
    model = tiny_model(torch.float32, **{**SIZES, "num_key_value_heads": c.num_key_value_heads,
                                         "tie_word_embeddings": c.tie_word_embeddings}).eval()  # fmt: skip
    for name, tensor in meant.items():
        heads = rotated_heads(name, c.num_attention_heads, c.num_key_value_heads)
        want = tensor if heads is None else tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        assert torch.equal(source.read(name).float(), want), name
        model.get_parameter(name).data = want.clone()
    loaded = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert loaded.config.max_position_embeddings in (64, 4096) and loaded.config.rms_norm_eps == 1e-5
    model.config.rms_norm_eps = 1e-5
    with torch.inference_mode():
        want = model(IDS).logits
        torch.testing.assert_close(loaded(IDS).logits, want, rtol=1e-4, atol=1e-4)
    for to in ("hf", "gguf"):
        out = tmp_path / ("out" if to == "hf" else "out.gguf")
        convert(path, out, ConversionSettings(to, "float32"))
        again = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
        with torch.inference_mode():
            torch.testing.assert_close(again(IDS).logits, loaded(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize(("magic", "version"), [("ggml", 0), ("ggmf", 1), ("ggjt", 1), ("ggjt", 2), ("ggjt", 3)])
def test_ggml(magic: str, version: int, kind: str, tmp_path: Path) -> None:
    check(tmp_path / "x.bin", ggml(tmp_path / "x.bin", magic, version, kind), tmp_path)


def test_the_vocabulary_of_a_ggml_file(tmp_path: Path) -> None:
    ggml(tmp_path / "x.bin", "ggjt", 3, "F16")
    convert(tmp_path / "x.bin", tmp_path / "out", ConversionSettings())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("the é", add_special_tokens=False)) == "the é"
    assert tokenizer.convert_tokens_to_ids("<0x41>") == 3 + 0x41 and tokenizer.bos_token_id == 1


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1, 2])
def test_llama2c(version: int, tied: bool, tmp_path: Path) -> None:
    check(tmp_path / "x.bin", llama2c(tmp_path / "x.bin", version, tied), tmp_path)


def test_tokenizer_bin(tmp_path: Path) -> None:
    llama2c(tmp_path / "x.bin", 1, True)
    entries = b"".join(struct.pack("<fi", score, len(word)) + word for word, score in words())
    (tmp_path / "tokenizer.bin").write_bytes(struct.pack("<i", 8) + entries)
    convert(tmp_path / "x.bin", tmp_path / "out", ConversionSettings())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("the é", add_special_tokens=False)) == "the é"


@pytest.mark.parametrize("cut", [3, 30, 500, 20_000, -7])
def test_cut_files(cut: int, tmp_path: Path) -> None:
    for make in (lambda p: ggml(p, "ggjt", 3, "Q4_0"), lambda p: llama2c(p, 2, True)):
        make(tmp_path / "x.bin")
        data = (tmp_path / "x.bin").read_bytes()
        (tmp_path / "x.bin").write_bytes(data[:cut])
        with pytest.raises(CheckpointError):
            checkpoint.open(tmp_path / "x.bin")
