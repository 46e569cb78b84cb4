"""A GGUF file's matrices as layers of a model that stay packed, and who gets them so.

`from_pretrained` keeps the blocks where something multiplies with them as they are: a LlamaForCausalLM on a CPU with
the native engine. A dtype is a request for weights of that dtype, so it unpacks; dequantize=False keeps the blocks
whatever else is asked for, and torch then unpacks a matrix for each product.
"""

import sys
import warnings
from dataclasses import dataclass

import torch
from torch import nn

from llama2.checkpoint import Checkpoint
from llama2.checkpoint.gguf_weights import GgufCheckpoint
from llama2.checkpoint.names import rotated_heads
from llama2.checkpoint.quantized import matrices, tie
from llama2.checkpoint.weights import Weights
from llama2.compiled import available
from llama2.errors import InputError
from llama2.pretrained import PreTrainedModel
from llama2.quantization.ggml import TYPES
from llama2.quantization.gguf import FilePlace, GgufEmbedding, GgufLinear, remember
from llama2.quantization_config import GgufConfig, QuantizationConfig

ASKED, DTYPE, NO_ENGINE = "dequantize=True was given", "a dtype was given", "the native engine is not built"


class UnpackedWarning(UserWarning):
    """Blocks of a GGUF file were unpacked; `reason` says why: ASKED, DTYPE, NO_ENGINE, or words about the device."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class PackingPlan:
    """How the weights of one call of from_pretrained come to be packed.

    asked: the dtype that the call names. stored: how the files pack linears. wanted: how they are packed as they load.
    source: the checkpoint that fills the model as it is. dequantize: what the call says. After `decide`: blocks: GGUF's
    blocks stay; unpacks: packed layers are unpacked at the end.
    """

    asked: torch.dtype | None
    stored: QuantizationConfig | None
    wanted: QuantizationConfig | None
    source: Checkpoint | None
    dequantize: bool | None
    blocks: bool = False
    unpacks: bool = False

    @property
    def file(self) -> GgufCheckpoint | None:
        """The GGUF file that fills the model."""
        return self.source if isinstance(self.source, GgufCheckpoint) else None

    def decide(self, causal: bool, device: torch.device) -> None:
        """Fills in the rest and tells in a warning where blocks are unpacked. Raises InputError for two formats."""
        types = [] if self.file is None else self.file.block_types
        if self.stored is not None and self.wanted is not None:
            if self.wanted.quant_method != self.stored.quant_method:
                raise InputError(
                    f"the checkpoint is packed by {self.stored.quant_method} and {self.wanted.quant_method} is asked "
                    "for; load it as it is, or quantise the unquantised checkpoint"
                )
            self.wanted = None
        elif isinstance(self.wanted, GgufConfig) and types:  # as it is
            self.wanted, self.dequantize = None, bool(self.dequantize)
        of_blocks = bool(types) or isinstance(self.stored, GgufConfig)
        reason = "" if not of_blocks or self.wanted is not None else self._reason(causal, device, bool(types))
        self.blocks = bool(types) and self.wanted is None and not reason
        self.unpacks = self.stored is not None and bool(reason or self.dequantize)
        if not of_blocks or self.wanted is not None or reason in ("", "class"):
            return
        dtype = str(self.asked or torch.bfloat16).removeprefix("torch.")
        name = getattr(self.source, "path", "the checkpoint")
        message = (
            f"{name}: its {' and '.join(types) or 'GGUF'} blocks are unpacked to {dtype}, because {reason}; "
            "dequantize=False keeps them packed"
        )
        warnings.warn(UnpackedWarning(message, reason), stacklevel=_callers_level())

    def _reason(self, causal: bool, device: torch.device, of_file: bool) -> str:
        """Why blocks are unpacked, "" where they stay, "class" where the class alone is the reason."""
        if self.dequantize is not None:
            return ASKED if self.dequantize else ""
        if self.asked is not None:
            return DTYPE
        if device.type != "cpu":
            return f"nothing multiplies with them on {device}"
        if not available():
            return NO_ENGINE
        return "" if causal or not of_file else "class"

    def auto_dtype(self, weights: Weights) -> str:
        """The name of the dtype where none is asked for."""
        return "float32" if self.blocks else weights.auto_dtype


def keep_blocks(model: PreTrainedModel, source: GgufCheckpoint, stored: dict[str, str], dtype: torch.dtype) -> None:
    """Puts layers of the file's own blocks where `stored` names a matrix, and takes those out of it.

    A float matrix of the dtype that is computed in stays a parameter, in place. model: on the meta device.
    """
    for path, module in matrices(model).items():
        name = stored.get(f"{path}.weight")
        if name is None or TYPES[source.tensors[name].type].dense == dtype:
            continue
        del stored[f"{path}.weight"]
        layer = _layer(module, source, name, dtype)
        model.set_submodule(path, layer)
        remember(layer, FilePlace(source.file, source.stored_name(name)))
    tie(model)
    model.config.quantization_config = GgufConfig().to_dict()


def _layer(module: nn.Module, source: GgufCheckpoint, name: str, dtype: torch.dtype) -> GgufLinear | GgufEmbedding:
    kind, rows = source.tensors[name].type, source.file_rows(name)
    if isinstance(module, nn.Embedding):
        shape = (module.num_embeddings, module.embedding_dim)
        return GgufEmbedding(shape, kind, rows, dtype, module.padding_idx)
    assert isinstance(module, nn.Linear)
    heads = rotated_heads(name, source.config.num_attention_heads, source.config.num_key_value_heads)
    return GgufLinear((module.out_features, module.in_features), kind, rows, module.bias, heads or 0)


def _callers_level() -> int:
    """The stacklevel, for the caller, of the nearest frame outside of the library."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("llama2."):
        frame, level = frame.f_back, level + 1
    return level
