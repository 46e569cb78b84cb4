"""Which ggml type each tensor of a GGUF file gets: llama.cpp's file types, as its llama_model_quantize mixes them.

Source: llama_tensor_get_type_impl and tensor_type_fallback of llama.cpp (src/llama-quant.cpp), the branches for the
architecture llama without experts. The layers that count more get more bits, and so does the head.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from llama2.config import LlamaConfig
from llama2.quantization.formats import BY_ID, FORMATS


@dataclass(frozen=True)
class FileType:
    """Its name, general.file_type (enum llama_ftype), and the type that most matrices have."""

    name: str
    id: int
    block: str


# Types whose files mix others in: their sizes, each with its number.
_MIXTURES: dict[str, tuple[FileType, ...]] = {
    "Q3_K": (FileType("Q3_K_S", 11, "Q3_K"), FileType("Q3_K_M", 12, "Q3_K"), FileType("Q3_K_L", 13, "Q3_K")),
    "Q4_K": (FileType("Q4_K_S", 14, "Q4_K"), FileType("Q4_K_M", 15, "Q4_K")),
    "Q5_K": (FileType("Q5_K_S", 16, "Q5_K"), FileType("Q5_K_M", 17, "Q5_K")),
}


def _file_types() -> Iterator[FileType]:
    for row in FORMATS:
        if row.written and row.file_type is not None:
            yield FileType(row.id, row.file_type, row.id)
        yield from _MIXTURES.get(row.id, ())


FILE_TYPES: dict[str, FileType] = {kind.name: kind for kind in _file_types()}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
# For rows that super-blocks do not divide.
_NARROWER = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.weight")


def file_type(name: str) -> str | None:
    """The file type of this name in any case, aliases resolved; None where there is none."""
    upper = ALIASES.get(name.upper(), name.upper())
    return upper if upper in FILE_TYPES else None


def tensor_type(name: str, columns: int, kind: str, config: LlamaConfig, calibrated: bool) -> str:
    """The ggml type of a matrix in a file of type `kind`. name: Hugging Face's. calibrated: whether there is an
    importance matrix, with which llama.cpp spares the first layers' down projections in Q4_0 and Q5_0."""
    default = FILE_TYPES[kind].block
    if BY_ID[default].weights == 1:
        return default
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    if name == head:
        wanted = "Q8_0" if columns % BY_ID[default].weights or default == "Q8_0" else "Q6_K"
    elif place := _LAYER.fullmatch(name):
        wanted = _in_layer(place[2], int(place[1]), kind, default, config, calibrated)
    else:
        wanted = default
    return fitting(wanted, columns)


def fitting(kind: str, columns: int) -> str:
    """The type itself, or what is taken for rows that its blocks do not divide."""
    if columns % BY_ID[kind].weights:
        kind = _NARROWER.get(kind, kind)
    return "F16" if columns % BY_ID[kind].weights else kind


def _in_layer(linear: str, layer: int, kind: str, default: str, config: LlamaConfig, calibrated: bool) -> str:
    layers = config.num_hidden_layers
    if linear == "v_proj":
        wanted = _values(layer, kind, default, config)
        shared = layers == 80 and config.num_attention_heads != config.num_key_value_heads  # the 70B model
        return "Q5_K" if shared and wanted in ("Q3_K", "Q4_K") else wanted
    if linear == "down_proj":
        return _down(layer, layers, kind, default, calibrated)
    if linear == "o_proj":
        return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(kind, default)
    return default


def _values(layer: int, kind: str, default: str, config: LlamaConfig) -> str:
    if kind == "Q2_K":
        return "Q4_K" if config.num_attention_heads // config.num_key_value_heads >= 4 else "Q3_K"
    if kind == "Q3_K_M":
        return "Q5_K" if layer < 2 else "Q4_K"
    if kind in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, config.num_hidden_layers):
        return "Q6_K"
    if kind in ("IQ4_NL", "IQ4_XS") and config.num_attention_heads // config.num_key_value_heads >= 4:
        return "Q5_K"
    return "Q5_K" if kind == "Q3_K_L" or (kind == "Q4_K_S" and layer < 4) else default


def _down(layer: int, layers: int, kind: str, default: str, calibrated: bool) -> str:
    if kind == "Q3_K_M":
        return "Q5_K" if layer < layers // 16 else "Q4_K"
    if kind in ("Q2_K", "Q3_K_L"):
        return "Q3_K" if kind == "Q2_K" else "Q5_K"
    if kind in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more_bits(layer, layers) else default
    if layer < layers // 8:
        if kind == "Q4_K_S" or (kind in ("IQ4_NL", "IQ4_XS") and not calibrated):
            return "Q5_K"
        if calibrated:
            return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}.get(kind, default)
    return default


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth, and every third layer between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
