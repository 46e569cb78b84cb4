"""GGUF files of Llama-2-7B's shape with random weights, for speed alone: any file type, any number of layers."""

from pathlib import Path

import gguf
import numpy as np

from llama2.architecture import gguf_to_hf
from llama2.checkpoint.gguf_mixture import FILE_TYPES, tensor_type
from llama2.config import LlamaConfig

HIDDEN, LAYERS, HEADS, FFN, VOCAB = 4096, 32, 32, 11008, 32000
# Where a block has float16 factors, and their size beside that of the default, so that activations stay finite.
_FACTORS = {"Q6_K": (208,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}
_SUPER = {"Q4_K": 1 / 32, "Q5_K": 1 / 64, "Q6_K": 1 / 512, "IQ4_XS": 1 / 512}


def random_tensor(kind: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of blocks of a ggml type as bytes: codes are random, factors are about 0.2 / sqrt(columns) of a code."""
    if kind == "BF16":
        return (
            (rng.standard_normal((rows, columns), np.float32) / np.float32(columns**0.5))
            .view(np.uint16)[:, 1::2]
            .copy()
            .view(np.uint8)
        )
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    factor = np.float16(0.2 / np.sqrt(columns) * _SUPER.get(kind, 1)).reshape(1).view(np.uint8)
    for start in _FACTORS.get(kind, (0,)):
        raw[:, :, start : start + 2] = factor
    return raw.reshape(rows, -1)


def write_7b(path: Path, kind: str = "Q4_0", layers: int = LAYERS) -> None:
    """A file of type `kind` (a name of gguf_mixture.FILE_TYPES, or BF16), mixed as llama.cpp mixes it."""
    rng = np.random.default_rng(0)
    config = LlamaConfig(num_hidden_layers=layers)
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(layers)
    w.add_context_length(4096)
    w.add_embedding_length(HIDDEN)
    w.add_feed_forward_length(FFN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(HIDDEN // HEADS)
    w.add_vocab_size(VOCAB)
    w.add_file_type(32 if kind == "BF16" else FILE_TYPES[kind].id)
    w.add_tokenizer_model("llama")
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)] + [f"piece{i}" for i in range(VOCAB - 259)]
    w.add_token_list(pieces)
    w.add_token_scores([0.0] * VOCAB)
    w.add_token_types([2, 3, 3] + [6] * 256 + [1] * (VOCAB - 259))
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    shapes = [("token_embd", VOCAB, HIDDEN), ("output", VOCAB, HIDDEN)]
    for i in range(layers):
        shapes += [(f"blk.{i}.attn_{n}", HIDDEN, HIDDEN) for n in ("q", "k", "v", "output")]
        shapes += [
            (f"blk.{i}.ffn_gate", FFN, HIDDEN),
            (f"blk.{i}.ffn_up", FFN, HIDDEN),
            (f"blk.{i}.ffn_down", HIDDEN, FFN),
        ]
        w.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(HIDDEN, np.float32))
        w.add_tensor(f"blk.{i}.ffn_norm.weight", np.ones(HIDDEN, np.float32))
    w.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for name, rows, columns in shapes:
        block = kind if kind == "BF16" else tensor_type(gguf_to_hf(f"{name}.weight"), columns, kind, config, False)
        w.add_tensor(
            f"{name}.weight", random_tensor(block, rows, columns, rng), raw_dtype=gguf.GGMLQuantizationType[block]
        )
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
