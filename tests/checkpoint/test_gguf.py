"""GGUF: the container by hand-written bytes, the configuration, the tensors, and everything malformed."""

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.gguf_bytes import gguf, interleave, llama_metadata, llama_tensors, rope_freqs, text
from hypothesis import given, settings
from hypothesis import strategies as st

import llama2.checkpoint as checkpoint
from llama2.checkpoint.gguf import GgufFile, read_metadata
from llama2.checkpoint.names import GGUF, gguf_to_hf, hf_to_gguf, to_half_split, to_pairs
from llama2.classifiers import LlamaForSequenceClassification
from llama2.config import LlamaConfig
from llama2.errors import CheckpointError, Llama2Error, MismatchError
from llama2.model import LlamaForCausalLM


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
        architectures=["LlamaForCausalLM"],
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.fixture(scope="module")
def tiny_bytes(tiny: LlamaForCausalLM) -> bytes:
    return gguf(llama_metadata(), llama_tensors(tiny.state_dict()))


# -- container ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
def test_hand_written_file(tmp_path: Path, version: int) -> None:
    data = b"GGUF" + struct.pack("<IQQ", version, 1, 4)
    data += text("a") + struct.pack("<Ib", 1, -3)
    data += text("b") + struct.pack("<Id", 12, 0.1)
    data += text("c") + struct.pack("<IIQ", 9, 8, 2) + text("é") + text("")
    data += text("d") + struct.pack("<IIQ3h", 9, 3, 3, 1, -2, 3)
    data += text("t") + struct.pack("<IQQIQ", 2, 3, 2, 0, 0)  # ne[0] = 3 columns, ne[1] = 2 rows
    data += b"\0" * (-len(data) % 32) + struct.pack("<6f", *range(6))
    file = GgufFile(write(tmp_path / "x", data))
    assert file.metadata == {"a": -3, "b": 0.1, "c": ["é", ""], "d": [1, -2, 3]}
    assert file.tensors["t"].shape == (2, 3)
    assert file.floats("t") == (0, 1, 2, 3, 4, 5)


def test_metadata_needs_no_torch(tmp_path: Path, tiny_bytes: bytes) -> None:
    path = write(tmp_path / "x.gguf", tiny_bytes)
    code = (
        "import sys; from llama2.checkpoint.gguf import read_metadata, GgufFile\n"
        f"assert read_metadata({str(path)!r})['tokenizer.ggml.tokens'][3] == 'é'\n"
        f"assert GgufFile({str(path)!r}).config.hidden_size == 64\n"
        "assert not {'torch', 'numpy', 'huggingface_hub', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + bytes(40), "not b'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(8), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(8), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "announces 1152921504606846976 keys"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "announces 1152921504606846976 tensors"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(16), "bytes of text"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<I", 99), "value type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 1), "arrays of arrays"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 2**61), "strings"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQQ", 9, 8, 1, 2**40), "ends at byte"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IQ", 8, 2) + b"\xff\xfe", "not UTF-8"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (text("k") + struct.pack("<II", 4, 1)), "twice"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("t") + struct.pack("<IQQ", 9, 1, 1), "9 axes"),
        (b"GGUF", "has 4 bytes"),
    ],
)
def test_malformed_container(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        _ = GgufFile(write(tmp_path / "x", data)).tensors


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_metadata(tmp_path / "none.gguf")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_truncation_anywhere_is_our_error(tmp_path_factory: Any, tiny_bytes: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(tiny_bytes) - 1))
    path = write(tmp_path_factory.mktemp("cut") / "x.gguf", tiny_bytes[:cut])
    with pytest.raises(CheckpointError):
        checkpoint.open(path)


@pytest.mark.filterwarnings("ignore:.*are not known", "ignore:.*outside the")
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_in_the_header_never_crashes(tmp_path_factory: Any, tiny_bytes: bytes, data: st.DataObject) -> None:
    header = 3000  # metadata and directory of this file
    damaged = bytearray(tiny_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(4, header))] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.mktemp("bad") / "x.gguf", bytes(damaged))
    try:
        opened = checkpoint.open(path)
        for name in opened.tensors:
            opened.read(name)
    except Llama2Error:
        pass


# -- configuration -----------------------------------------------------------------------------------------------


def test_config(tmp_path: Path, tiny_bytes: bytes, tiny: LlamaForCausalLM) -> None:
    config = checkpoint.open(write(tmp_path / "x", tiny_bytes)).config
    assert config == tiny.config
    assert (config.rms_norm_eps, config.rope_theta) == (1e-5, 50000.0)


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"llama.rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 8.0,
                "llama.rope.scaling.original_context_length": 16,
            },
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16},
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, metadata: dict[str, Any], expected: dict[str, Any]) -> None:
    file = GgufFile(write(tmp_path / "x", gguf(llama_metadata(**metadata), {})))
    assert file.config.rope_scaling == expected


def test_llama3_frequency_table(tmp_path: Path) -> None:
    table = rope_freqs(16, 500000.0, 32.0, 1.0, 4.0, 8192)
    metadata = llama_metadata(**{"llama.rope.freq_base": 500000.0})
    file = GgufFile(write(tmp_path / "x", gguf(metadata, {"rope_freqs.weight": (table, "F32")})))
    assert file.config.rope_scaling == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    table[3] *= 1.1
    file = GgufFile(write(tmp_path / "y", gguf(metadata, {"rope_freqs.weight": (table, "F32")})))
    with pytest.raises(CheckpointError, match="not the table of Llama 3.1"):
        _ = file.config


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture is 'qwen2'"),
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.attention.sliding_window": 4096}, "sliding windows"),
        ({"llama.rope.dimension_count": 8}, "only a part of each head"),
        ({"llama.attention.head_count": [4, 2]}, "one int is needed"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope' is not supported"),
        ({"llama.attention.head_count_kv": 3}, "not a multiple of num_key_value_heads 3"),
    ],
)
def test_foreign_and_impossible_models(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "x", gguf(llama_metadata(**metadata), {}))
    with pytest.raises(Llama2Error, match=message):
        checkpoint.open(path)


def test_missing_key(tmp_path: Path) -> None:
    metadata = llama_metadata()
    del metadata["llama.block_count"]
    with pytest.raises(CheckpointError, match="llama.block_count is missing"):
        checkpoint.open(write(tmp_path / "x", gguf(metadata, {})))


# -- tensors -----------------------------------------------------------------------------------------------------


def test_names_map_both_ways() -> None:
    for ours, theirs in GGUF.items():
        assert hf_to_gguf(ours.replace("{i}", "31")) == theirs.replace("{i}", "31")
        assert gguf_to_hf(theirs.replace("{i}", "31")) == ours.replace("{i}", "31")
    assert gguf_to_hf("blk.0.ffn_gate_exps.weight") is None


def test_permutation_by_hand() -> None:
    # one head of width 6: the file holds pairs (a0 b0) (a1 b1) (a2 b2); Hugging Face wants a0 a1 a2 b0 b1 b2
    rows = torch.tensor([[0], [3], [1], [4], [2], [5]])
    assert to_half_split(rows, 1).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    weights = torch.randn(24, 5)
    assert torch.equal(to_half_split(interleave(weights, 3), 3), weights)
    assert torch.equal(to_pairs(weights, 3), interleave(weights, 3))


def test_loads_bit_for_bit(tmp_path: Path, tiny: LlamaForCausalLM, tiny_bytes: bytes) -> None:
    model = LlamaForCausalLM.from_pretrained(write(tmp_path / "no-suffix", tiny_bytes))
    assert model.dtype == torch.float32 and not model.training
    for (name, ours), theirs in zip(model.state_dict().items(), tiny.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, tiny(ids).logits)
    assert model.generation_config.eos_token_id == 2


def test_quantised_blocks_stay_permutable(tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    path = write(tmp_path / "q.gguf", gguf(llama_metadata(), llama_tensors(tiny.state_dict(), "Q8_0")))
    opened = checkpoint.open(path)
    assert opened.auto_dtype == "bfloat16"
    name = "model.layers.1.self_attn.k_proj.weight"
    raw = opened.raw(name)
    assert (raw.type, raw.shape, tuple(raw.rows.shape)) == ("Q8_0", (32, 64), (32, 68))
    original = tiny.state_dict()[name]
    assert (opened.read(name) - original).abs().max() <= original.abs().max() / 127
    model = LlamaForCausalLM.from_pretrained(path, dequantize=False)
    assert model.dtype == torch.float32 == model.config.dtype
    assert torch.equal(model.state_dict()[f"{name}.Q8_0"], raw.rows)
    model = LlamaForCausalLM.from_pretrained(path, dequantize=True)
    assert model.dtype == torch.bfloat16 == model.config.dtype
    assert torch.equal(model.state_dict()[name], opened.read(name, torch.bfloat16))
    assert LlamaForCausalLM.from_pretrained(path, dtype="float32").dtype == torch.float32


def test_tied_head_where_output_is_absent(tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    tensors = llama_tensors(tiny.state_dict())
    del tensors["output.weight"]
    model = LlamaForCausalLM.from_pretrained(write(tmp_path / "x", gguf(llama_metadata(), tensors)))
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight


def test_a_classifier_gets_a_fresh_head(tmp_path: Path, tiny_bytes: bytes) -> None:
    path = write(tmp_path / "x", tiny_bytes)
    with pytest.warns(UserWarning, match=r"score.weight .*newly initialised"):
        model = LlamaForSequenceClassification.from_pretrained(path, num_labels=5)
    assert model.score.weight.shape == (5, 64) and bool(model.score.weight.isfinite().all())


def test_foreign_missing_and_misplaced_tensors(tmp_path: Path, tiny: LlamaForCausalLM) -> None:
    tensors = llama_tensors(tiny.state_dict())
    extra = {**tensors, "blk.0.ffn_gate_inp.weight": (torch.zeros(8, 64), "F32")}
    with pytest.raises(CheckpointError, match="'blk.0.ffn_gate_inp.weight'"):
        checkpoint.open(write(tmp_path / "a", gguf(llama_metadata(), extra)))
    del tensors["blk.1.ffn_up.weight"]
    with pytest.raises(MismatchError, match=r"missing: model.layers.1.mlp.up_proj.weight \(96, 64\)"):
        LlamaForCausalLM.from_pretrained(write(tmp_path / "b", gguf(llama_metadata(), tensors)))


def test_smollm2(smollm2: Path) -> None:
    opened = checkpoint.open(smollm2)
    config = opened.config
    preset = LlamaConfig.preset("smollm2-135m", pad_token_id=2, rms_norm_eps=1e-5)
    assert config == preset
    assert len(opened.tokenizer_source["tokenizer.ggml.merges"]) == 48900  # type: ignore[index]
    assert {stored.type for stored in opened.tensors.values()} == {"F32", "Q4_1", "Q8_0"}
    for dtype, dequantize in ((torch.float32, False), (torch.bfloat16, True)):
        model = LlamaForCausalLM.from_pretrained(smollm2, dequantize=dequantize)
        assert model.dtype == dtype and model.num_parameters() == config.num_parameters
        assert (model.get_memory_footprint() < 100e6) is not dequantize


@pytest.mark.parity
def test_smollm2_equals_gguf_reader(smollm2: Path) -> None:
    reader = pytest.importorskip("gguf").GGUFReader(smollm2)
    quants = pytest.importorskip("gguf").quants
    opened = checkpoint.open(smollm2)
    for tensor in [t for t in reader.tensors if not t.name.startswith("blk.") or t.name.startswith("blk.7.")]:
        expected = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy())
        ours = opened.read(gguf_to_hf(tensor.name) or "")
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            ours = to_pairs(ours, 9 if "_q" in tensor.name else 3)
        assert torch.equal(ours, expected), tensor.name
    metadata = read_metadata(smollm2)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert metadata[key] == field.contents(), key
