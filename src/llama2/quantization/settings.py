"""The settings of formats that are read only, from quantization_config of config.json. No torch.

Each keeps the content of the file, so that a model is saved as it was read, and answers what its linears are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from llama2.errors import InputError
from llama2.pattern import check as check_pattern
from llama2.pattern import match
from llama2.quantization_config import QuantizationConfig
from llama2.schema import ANY, FLAG, Schema, check, either, maybe, real, several, table, text, whole
from llama2.text_file import shown

_GROUP = either(maybe(whole(-1, 2**31 - 1)), real(-1, 2**31 - 1))
_NAMES = maybe(several(text(), 100_000))
_SCHEMA: Schema = {
    **dict.fromkeys(("bits", "w_bit", "nbits", "num_bits"), either(whole(1, 64), real(0, 64))),
    **dict.fromkeys(("group_size", "q_group_size"), maybe(whole(-1, 2**31 - 1))),
    **dict.fromkeys(("version", "format", "mode", "quant_algo", "scale_fmt", "kv_cache_quant_algo"), maybe(text(256))),
    **dict.fromkeys(("modules_to_not_convert", "ignored_layers", "exclude_modules", "skip_modules"), _NAMES),
    "zero_point": maybe(FLAG),
    "weight_block_size": maybe(several(whole(1, 2**31 - 1), 2)),
    "config_groups": maybe(table(maybe(table(ANY, 100)), 10_000)),
    "ignore": _NAMES,
    "quant_config": maybe(table(ANY, 10_000)),
}


@dataclass
class FileSettings(QuantizationConfig):
    """Base class of the settings of read-only formats: the content of the file, checked."""

    content: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """As QuantizationConfig.from_dict."""
        check(content, _SCHEMA, "quantization_config", InputError)
        return cls(dict(content))

    def to_dict(self) -> dict[str, Any]:
        """The content as it was read."""
        return {"quant_method": self.quant_method, **self.content}

    def _number(self, *keys: str, default: int) -> int:
        """The first of these keys that is given, as a whole number."""
        for key in keys:
            if (value := self.content.get(key)) is not None:
                if not isinstance(value, int) or isinstance(value, bool):
                    raise InputError(f"{key} is {shown(value)}; a whole number is needed")
                return value
        return default


@dataclass
class AwqConfig(FileSettings):
    """AWQ: 4 bits in groups; version: gemm, gemv or gemv_fast (llm-awq)."""

    quant_method: ClassVar[str] = "awq"
    _VERSIONS: ClassVar[dict[str, str]] = {"gemm": "gemm", "gemv": "gemv", "gemv_fast": "gemv_fast"}

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise InputError(f"bits is {self.bits}; AWQ files of 4 bits are read: quantise the model again")
        if self.group_size != -1 and self.group_size < 1:
            raise InputError(f"group_size is {self.group_size}; it must be a number of inputs, or -1 for whole rows")
        if self._named not in self._VERSIONS:
            raise InputError(
                f"the version of AWQ is {shown(self._named)}; {', '.join(self._VERSIONS)} are read: repack the file "
                "with AutoAWQ, or fetch it in one of these"
            )

    @property
    def _named(self) -> str:
        packing = str(self.content.get("packing_format") or "")
        said = self.content.get("version") or (None if packing else self.content.get("format")) or "gemm"
        return str(said).lower()

    @property
    def version(self) -> str:
        """How the codes lie."""
        return self._VERSIONS[self._named]

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return self._number("bits", "w_bit", default=4)

    @property
    def group_size(self) -> int:
        """Inputs that share a scale; -1: all of a row."""
        return self._number("group_size", "q_group_size", default=128)

    def label(self, module: str) -> str:
        """As QuantizationConfig.label."""
        return "AWQ 4-bit" + ("" if self.group_size == -1 else f" g{self.group_size}")


def any_match(patterns: Any, module: str) -> bool:
    """Whether a list of class names, module names and "re:REGEX" names a linear."""
    for pattern in patterns or ():
        if pattern == "Linear" or pattern == module or module.startswith(f"{pattern}."):
            return True
        if isinstance(pattern, str) and pattern.startswith("re:"):
            check_pattern(pattern[3:])
            if match(pattern[3:], module):
                return True
    return False


def at_end(names: Any, module: str) -> bool:
    """Whether a list of modules names a linear: by its path, a part of that, or its last words."""
    return any(module == n or module.endswith("." + n) or f".{n}." in f".{module}." for n in names or ())


_CACHE_SCALES = ("k_scale", "v_scale", "kv_scale", "q_scale", "prob_scale", "k_zero_point", "v_zero_point")


class _Float8Settings(FileSettings):
    """Base class of formats with 8-bit activations: tensors that scale activations and KV caches describe no weight."""

    def describes_others(self, name: str) -> bool:
        """As QuantizationConfig.describes_others."""
        module, _, suffix = name.rpartition(".")
        return suffix in _CACHE_SCALES and module.endswith(("self_attn", "attn"))


_CT_KINDS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
             "mxfp4-pack-quantized")  # fmt: skip


@dataclass
class CompressedTensorsConfig(_Float8Settings):
    """compressed-tensors: groups of modules, each with its own scheme."""

    quant_method: ClassVar[str] = "compressed-tensors"

    module: str = ""

    def __post_init__(self) -> None:
        for name, group in (self.content.get("config_groups") or {}).items():
            weights = (group or {}).get("weights") if isinstance(group, Mapping) else None
            if weights is not None:
                check({"weights": weights}, {"weights": table(ANY, 100)}, f"config_groups.{name}", InputError)
                _check_scheme(weights, f"config_groups.{name}.weights")
            for pattern in (group or {}).get("targets") or () if isinstance(group, Mapping) else ():
                if isinstance(pattern, str) and pattern.startswith("re:"):
                    check_pattern(pattern[3:])
        if self.content.get("sparsity_config") and (self.content["sparsity_config"] or {}).get("format") not in (
            None,
            "dense",
        ):
            raise InputError("sparsity_config is not dense; sparse files are not read: fetch a dense one")

    def at(self, module: str) -> Self:
        """As QuantizationConfig.at."""
        return type(self)(self.content, module)

    def _group(self) -> Mapping[str, Any]:
        groups = [group for group in (self.content.get("config_groups") or {}).values() if isinstance(group, Mapping)]
        matching = [group for group in groups if any_match(group.get("targets"), self.module)]
        return next(iter(matching or groups), {})

    @property
    def weights(self) -> Mapping[str, Any]:
        """The scheme of the weight."""
        return self._group().get("weights") or {}

    @property
    def kind(self) -> str:
        """How the weight lies. Raises InputError for a layout that is not read."""
        form_name = self._group().get("format") or self.content.get("format") or "pack-quantized"
        if form_name == "naive-quantized":
            return "int-quantized" if self.type == "int" else "float-quantized"
        if form_name not in _CT_KINDS:
            raise InputError(
                f"the format of compressed-tensors is {shown(form_name)}; {', '.join(_CT_KINDS)} are read: compress "
                "the model in one of these"
            )
        return str(form_name)

    @property
    def type(self) -> str:
        """int or float."""
        return str(self.weights.get("type") or "int")

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return int(self.weights.get("num_bits") or 8)

    @property
    def strategy(self) -> str:
        """The unit that shares a scale: tensor, channel, group, block."""
        return str(self.weights.get("strategy") or ("group" if self.weights.get("group_size") else "tensor"))

    def group(self, columns: int) -> int:
        """Inputs that share a scale."""
        size = self.weights.get("group_size")
        return int(size) if self.strategy in ("group", "tensor_group") and size and int(size) > 0 else columns

    def block(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        if self.strategy == "block":
            rows, columns = self.weights.get("block_structure") or (128, 128)
            return int(rows), int(columns)
        if self.strategy == "tensor":
            return shape
        return 1, self.group(shape[1])

    def label(self, module: str) -> str:
        """As QuantizationConfig.label."""
        own = self.at(module) if module else self
        group = own.weights.get("group_size")
        number = "FP" if own.type == "float" else "INT"
        return f"{number}{own.bits}" + (f" g{group}" if own.strategy in ("group", "tensor_group") and group else "")


def _check_scheme(weights: Mapping[str, Any], what: str) -> None:
    schema: Schema = {
        "num_bits": whole(1, 8), "type": text(16), "strategy": maybe(text(32)), "symmetric": maybe(FLAG),
        "group_size": maybe(whole(-1, 2**31 - 1)), "block_structure": maybe(several(whole(1, 2**31 - 1), 2)),
    }  # fmt: skip
    check(weights, schema, what, InputError)
    if weights.get("block_structure") is not None and len(weights["block_structure"]) != 2:
        raise InputError(f"{what}: block_structure is {shown(weights['block_structure'])}; rows and columns are needed")


@dataclass
class Float8Config(_Float8Settings):
    """transformers' fp8 and fbgemm_fp8, ModelOpt's FP8 and NVFP4: weights of 8-bit floats with scales."""

    quant_method: ClassVar[str] = "fp8"

    @property
    def is_nvfp4(self) -> bool:
        """ModelOpt's FP4."""
        return str(self.content.get("quant_algo") or "").upper().startswith("NVFP4")

    def __post_init__(self) -> None:
        algorithm = str(self.content.get("quant_algo") or "FP8").upper()
        if not algorithm.startswith(("FP8", "NVFP4")):
            raise InputError(f"quant_algo is {shown(algorithm)}; FP8 and NVFP4 of ModelOpt are read")
        block = self.content.get("weight_block_size")
        if block is not None and len(block) != 2:
            raise InputError(f"weight_block_size is {shown(block)}; rows and columns are needed")

    def to_dict(self) -> dict[str, Any]:
        """As FileSettings.to_dict: fp8, fbgemm_fp8 or modelopt as the file said."""
        return dict(self.content) or {"quant_method": self.quant_method}

    def block(self, shape: tuple[int, int], scale_shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns that share a scale, of a weight whose scales have the shape `scale_shape`."""
        if scale_shape in ((), (1,), (1, 1)):
            return shape
        block = self.content.get("weight_block_size")
        if block is None or len(scale_shape) < 2 or scale_shape == (shape[0], 1):
            return 1, shape[1]
        return block[0], block[1]

    def label(self, module: str) -> str:
        """As QuantizationConfig.label."""
        return "NVFP4" if self.is_nvfp4 else "FP8"


@dataclass
class TorchaoConfig(_Float8Settings):
    """torchao's tensors as its newer safetensors files flatten them."""

    quant_method: ClassVar[str] = "torchao"

    def label(self, module: str) -> str:
        """As QuantizationConfig.label."""
        return "torchao"


@dataclass
class HqqConfig(FileSettings):
    """HQQ: quant_config.weight_quant_params of the file, or of one module."""

    quant_method: ClassVar[str] = "hqq"

    module: str = ""

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4, 5, 6, 8) or self.axis not in (0, 1):
            raise InputError(
                f"HQQ of {self.bits} bits along axis {self.axis}; 1, 2, 3, 4, 5, 6, 8 and axis 0, 1 are read"
            )
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"group_size is {self.group_size}; it must be a number of weights")

    def at(self, module: str) -> Self:
        """As QuantizationConfig.at."""
        return type(self)(self.content, module)

    def _params(self) -> Mapping[str, Any]:
        whole_ = self.content.get("quant_config") or {}
        tag = ".".join(part for part in self.module.split(".")[2:] if not part.isdigit())
        params = whole_.get(self.module) or whole_.get(tag) or whole_
        params = params.get("weight_quant_params", params) if isinstance(params, Mapping) else {}
        return params if isinstance(params, Mapping) else {}

    def _said(self, key: str, default: Any) -> Any:
        value = self._params().get(key, default)
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or value != int(value)):
            raise InputError(f"{key} of quant_config is {shown(value)}; a whole number is needed")
        return value if value is None else int(value)

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return int(self._said("nbits", 4))

    @property
    def group_size(self) -> int | None:
        """Weights that share a scale; None for a row."""
        size = self._said("group_size", 64)
        return None if size is None else int(size)

    @property
    def axis(self) -> int:
        """1: groups along the inputs."""
        return int(self._said("axis", 0))

    def label(self, module: str) -> str:
        """As QuantizationConfig.label."""
        own = self.at(module)
        return f"HQQ {own.bits}-bit" + ("" if own.group_size is None else f" g{own.group_size}")


@dataclass
class Exl2Config(FileSettings):
    """EXL2: the tensors say everything."""

    quant_method: ClassVar[str] = "exl2"

    def label(self, module: str) -> str:
        """As QuantizationConfig.label."""
        bits = self.content.get("bits")
        return f"EXL2 {bits:g} bits" if isinstance(bits, int | float) else "EXL2"


@dataclass
class MlxConfig(FileSettings):
    """MLX's `quantization`: one setting, and those of single modules by path."""

    quant_method: ClassVar[str] = "mlx"
    _MODES: ClassVar[dict[str, tuple[int, int]]] = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}

    module: str = ""

    def __post_init__(self) -> None:
        if self.mode not in ("affine", *self._MODES):
            raise InputError(f"mode is {shown(self.mode)}; affine, {', '.join(self._MODES)} of MLX are read")
        if self.bits not in (2, 3, 4, 5, 6, 8) or self.group_size < 1:
            raise InputError(f"{self.bits} bits in groups of {self.group_size}; MLX has 2, 3, 4, 5, 6 and 8 bits")

    def at(self, module: str) -> Self:
        """As QuantizationConfig.at."""
        return type(self)(self.content, module)

    def _said(self, key: str, default: Any) -> Any:
        own = self.content.get(self.module)
        return own[key] if isinstance(own, Mapping) and own.get(key) is not None else self.content.get(key, default)

    @property
    def mode(self) -> str:
        """affine, mxfp4, mxfp8 or nvfp4."""
        return str(self._said("mode", None) or "affine")

    def _whole(self, key: str, place: int, default: int) -> int:
        value = self._said(key, self._MODES.get(self.mode, (4, 64))[place])
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"{key} of quantization is {shown(value)}; a whole number is needed")
        return value

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return self._whole("bits", 0, 4)

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self._whole("group_size", 1, 64)

    def label(self, module: str) -> str:
        """As QuantizationConfig.label."""
        own = self.at(module)
        return own.mode.upper() if own.mode != "affine" else f"MLX {own.bits}-bit g{own.group_size}"
