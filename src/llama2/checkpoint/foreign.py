"""Llama models in files of other programs: recognised by their content, described from their headers, and those that
are not read told with the way to a format that is. Standard library only.

Legacy GGML (llama.cpp before August 2023): a magic word, from ggmf on a version, then n_vocab, n_embd, n_mult, n_head,
n_layer, n_rot, ftype. llama2.c: version 0 is dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size (negative where
the head is not tied), max_seq_len and floats, told by the file's size alone; later ones have a magic word before them.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama2.checkpoint.directory import found

_GGML = {b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt", b"algg": "ggla"}
_LLAMA2C = b"24ka"
# What programs call their methods, where that is not what a config.json says.
_METHODS = {"awq": "AWQ", "gptq": "GPTQ", "fp8": "FP8", "hqq": "HQQ", "aqlm": "AQLM", "exl2": "EXL2", "exl3": "EXL3",
            "fbgemm_fp8": "FBGEMM FP8", "eetq": "EETQ", "vptq": "VPTQ", "higgs": "HIGGS", "mxfp4": "MXFP4",
            "auto-round": "AutoRound", "intel/auto-round": "AutoRound"}  # fmt: skip


@dataclass(frozen=True)
class Foreign:
    """A recognised file: its name, what its header says, and what reads it, or how to get to a file that runs."""

    format: str
    remedy: str
    facts: dict[str, str] = field(default_factory=dict)
    reader: str = ""  # the format of `checkpoint.open`, "" where it is not read


def recognise(path: Path) -> Foreign | None:
    """Identifies a legacy GGML or llama2.c file; None for anything else."""
    with found(path) as file:
        head = file.read(64)
    if head[:4] in _GGML:
        return _ggml(head)
    if head[:4] == _LLAMA2C and len(head) > 36:
        version, *sizes = struct.unpack_from("<8i", head, 4)
        return _llama2c(f"llama2.c version {version}", [*sizes[:5], abs(sizes[5]), sizes[6]], head[36] == 1)
    return _bare_llama2c(head, path.stat().st_size)


def _ggml(head: bytes) -> Foreign:
    kind = _GGML[head[:4]]
    remedy = "convert it with llama.cpp's convert_llama_ggml_to_gguf.py, or fetch the model as GGUF"
    if kind == "ggla":
        return Foreign("legacy GGML LoRA adapter", "use the adapter as peft wrote it")
    start = 4 if kind == "ggml" else 8
    if len(head) < start:
        return Foreign(f"legacy GGML ({kind}), cut short", remedy, {}, "ggml")
    version = "" if kind == "ggml" else f" version {struct.unpack_from('<I', head, 4)[0]}"
    facts = {}
    if len(head) >= start + 28:
        vocab, width, _, heads, layers, *_ = struct.unpack_from("<7I", head, start)
        facts = {
            "architecture": f"Llama: {layers} layers, width {width}, {heads} heads",
            "vocabulary": f"{vocab:,}",
        }
    return Foreign(f"legacy GGML ({kind}{version})", remedy, facts, "ggml")


def _llama2c(name: str, sizes: list[int], tied: bool) -> Foreign:
    width, inner, layers, heads, kv_heads, vocab, context = sizes
    shown = f"{heads} heads" + (f" ({kv_heads} for keys and values)" if kv_heads != heads else "")
    facts = {
        "architecture": f"Llama: {layers} layers, width {width}, feed-forward {inner}, {shown}",
        "vocabulary": f"{vocab:,}, {'tied' if tied else 'separate'} head",
        "context": f"{context:,} tokens",
    }
    remedy = "export the model again with llama2.c's export.py --version -1, which writes a folder"
    return Foreign(name, remedy, facts, "llama2c")


def _bare_llama2c(head: bytes, size: int) -> Foreign | None:
    """Version 0, which has no magic word: only where the sizes account for every byte."""
    if len(head) < 28:
        return None
    width, inner, layers, heads, kv_heads, vocab, context = sizes = struct.unpack_from("<7i", head)
    if min(width, inner, layers, heads, kv_heads, abs(vocab), context) < 1 or width % heads or max(sizes) > 1 << 24:
        return None
    head_dim = width // heads
    attention = width * head_dim * (2 * heads + 2 * kv_heads)
    floats = abs(vocab) * width * (1 if vocab > 0 else 2) + width + context * head_dim
    floats += layers * (attention + 3 * width * inner + 2 * width)
    if size != 28 + 4 * floats:
        return None
    return _llama2c("llama2.c version 0", [width, inner, layers, heads, kv_heads, abs(vocab), context], vocab > 0)


# -- quantisation methods of folders -----------------------------------------------------------------------------


def mlx_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantisation that MLX notes in a config.json of its own kind; None where there is none."""
    content = config.get("quantization")
    is_mlx = isinstance(content, Mapping) and "group_size" in content and "bits" in content
    return content if is_mlx else None


def described(config: Mapping[str, Any]) -> str | None:
    """The quantisation method and its settings as a config.json says them; None where it says none."""
    if (mlx := mlx_settings(config)) is not None:
        return _settings("MLX", mlx)
    content = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(content, Mapping):
        return None
    method = content.get("quant_method")
    if method is None and (content.get("load_in_4bit") or content.get("load_in_8bit")):
        method = "bitsandbytes"
    if method == "bitsandbytes":
        kind = str(content.get("bnb_4bit_quant_type", "fp4")).upper() if content.get("load_in_4bit") else "int8 rows"
        return f"bitsandbytes, {kind}"
    return _settings(_METHODS.get(str(method), str(method or "of a method that config.json does not name")), content)


def _settings(name: str, content: Mapping[str, Any]) -> str:
    bits = content.get("bits", content.get("w_bit", content.get("num_bits")))
    group = content.get("group_size", content.get("q_group_size"))
    parts = [name]
    if isinstance(bits, int | float):
        parts.append(f"{bits:g} bits")
    if isinstance(group, int) and group > 0:
        parts.append(f"groups of {group}")
    for key in ("format", "packing_format"):
        if content.get(key):
            parts.append(f"format {content[key]}")
            break
    return ", ".join(parts)
