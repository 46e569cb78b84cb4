"""The table of the formats in which weights are stored: one row a format, for files, layers, `info` and the engine.

A row names things by module, so that nothing here imports torch. What a format adds besides its row: its mathematics in
one module of this folder, for a block type its packing in csrc, its tests and its line in docs/quantisation.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama2.errors import InputError
from llama2.lazy import resolve
from llama2.quantization.settings import (
    AwqConfig,
    CompressedTensorsConfig,
    Exl2Config,
    Float8Config,
    HqqConfig,
    MlxConfig,
    TorchaoConfig,
)
from llama2.quantization_config import BitsAndBytesConfig, GgufConfig, GPTQConfig, QuantizationConfig
from llama2.quantization_config import auto_round as _auto_round_gptq
from llama2.text_file import shown

IN_PLACE, BFLOAT16 = "in place", "bfloat16"


@dataclass(frozen=True)
class Format:
    """One format.

    id: the row's key, ggml's name of a block type or what `QuantizationConfig.format_id` says. name: for people.
    weights, bytes: of a block; 0 where the settings of the file say. ggml: the number that GGUF gives it, None for the
    formats of folders. layer: the class of its linears, "module:Class". engine: how the native engine takes it, layouts
    of csrc/kernels.h; IN_PLACE as it lies, BFLOAT16 unpacked. methods: quant_method in a configuration.
    settings: the class of its settings. reader: of a format that is only read, what its tensors mean, "module:NAME".
    file_type: general.file_type of a GGUF file whose matrices have this type (enum llama_ftype), None where that says a
    mixture. written: whether GGUF files of this type are made here.
    packs: of a format of folders that runs without torch, what makes a `packable.PackableWeight` of a linear's arrays,
    "module:function".
    """

    id: str
    name: str
    weights: int
    bytes: int
    engine: str
    ggml: int | None = None
    layer: str = "quantization.gguf:GgufLinear"
    methods: tuple[str, ...] = ()
    settings: type[QuantizationConfig] = GgufConfig
    reader: str = ""
    file_type: int | None = None
    written: bool = False
    packs: str = ""

    def packed(self, tensors: Mapping[str, Any], shape: tuple[int, int], settings: Any) -> Any:
        """A linear's arrays as a `PackableWeight` without torch; None where no layout of the engine holds them.

        tensors: by name after the module's path. Raises CheckpointError for arrays that are no such weight."""
        module, _, name = self.packs.partition(":")
        return resolve(module, name)(tensors, shape, settings)

    @property
    def layer_class(self) -> Any:
        """The class of its linears; imports torch."""
        module, _, name = self.layer.partition(":")
        return resolve(module, name)


WRITTEN = True


def _block(
    ggml: int, name: str, weights: int, size: int, engine: str, file_type: int | None, written: bool = False
) -> Format:
    return Format(name, name, weights, size, engine, ggml, file_type=file_type, written=written)


def _folder(
    name: str, label: str, engine: str, settings: type[QuantizationConfig], reader: str, *methods: str, packs: str = ""
) -> Format:
    layer = "quantization.file_linear:FileLinear"
    return Format(
        name, label, 0, 0, engine, None, layer, methods or (name,), settings, f"quantization.{reader}", packs=packs
    )


FORMATS: tuple[Format, ...] = (
    # GGUF's types: the directory of the file gives the number
    _block(0, "F32", 1, 4, IN_PLACE, 0, WRITTEN),
    _block(1, "F16", 1, 2, IN_PLACE, 1, WRITTEN),
    _block(30, "BF16", 1, 2, IN_PLACE, 32, WRITTEN),
    _block(8, "Q8_0", 32, 34, "W8", 7, WRITTEN),
    _block(2, "Q4_0", 32, 18, "W4", 2, WRITTEN),
    _block(3, "Q4_1", 32, 20, "W4M", 3, WRITTEN),
    _block(6, "Q5_0", 32, 22, "P5", 8, WRITTEN),
    _block(7, "Q5_1", 32, 24, "P5M", 9, WRITTEN),
    _block(10, "Q2_K", 256, 84, BFLOAT16, 10, WRITTEN),
    _block(11, "Q3_K", 256, 110, BFLOAT16, None, WRITTEN),
    _block(12, "Q4_K", 256, 144, "W4K", None, WRITTEN),
    _block(13, "Q5_K", 256, 176, "P5K", None, WRITTEN),
    _block(14, "Q6_K", 256, 210, "P6K", 18, WRITTEN),
    _block(20, "IQ4_NL", 32, 18, "T4", 25, WRITTEN),
    _block(23, "IQ4_XS", 256, 136, "T4", 30, WRITTEN),
    _block(18, "IQ3_XXS", 256, 98, "T4", 23),
    _block(21, "IQ3_S", 256, 110, "T4", 26),
    _block(16, "IQ2_XXS", 256, 66, "T4", 19),
    _block(17, "IQ2_XS", 256, 74, "T4H", 20),
    _block(22, "IQ2_S", 256, 82, "T4H", 28),
    _block(19, "IQ1_S", 256, 50, "T4", 24),
    _block(29, "IQ1_M", 256, 56, "T4H", 31),
    _block(34, "TQ1_0", 256, 54, "T4", 36),
    _block(35, "TQ2_0", 256, 66, "T4", 37),
    _block(39, "MXFP4", 32, 17, "T4", 38),
    _block(40, "NVFP4", 64, 36, "T4H", 39),
    # Formats of folders: quantization_config of config.json names the method
    Format("nf4", "NF4", 64, 36, "C4", None, "quantization.nf4:Linear4bit", ("bitsandbytes",), BitsAndBytesConfig,
           packs="quantization.nf4_file:weight_of"),
    Format("fp4", "FP4", 64, 36, "C4", None, "quantization.nf4:Linear4bit", ("bitsandbytes",), BitsAndBytesConfig,
           packs="quantization.nf4_file:weight_of"),
    Format("int8", "INT8 rows", 0, 0, "R8", None, "quantization.int8:Linear8bit", ("bitsandbytes",),
           BitsAndBytesConfig, packs="quantization.int8_file:weight_of"),
    Format("gptq", "GPTQ", 0, 0, "G4, G8", None, "quantization.gptq:GptqLinear", ("gptq",), GPTQConfig,
           packs="quantization.gptq_file:weight_of"),
    Format("gguf", "GGUF blocks", 0, 0, "as its type", None, "quantization.gguf:GgufLinear", ("gguf",), GgufConfig),
    _folder("awq", "AWQ", "G4, A4", AwqConfig, "awq:AWQ", packs="quantization.awq_file:weight_of"),
    _folder("compressed-tensors", "compressed-tensors", "G4, G8, A4, A8, R8, T4, T4H, bfloat16 of FP8",
            CompressedTensorsConfig, "compressed_tensors:READER"),
    _folder("fp8", "FP8", BFLOAT16, Float8Config, "float8:READER", "fp8", "fbgemm_fp8", "modelopt"),
    _folder("torchao", "torchao", "G4, G8, A4, A8, R8, bfloat16 of FP8", TorchaoConfig, "float8:TORCHAO"),
    _folder("hqq", "HQQ", "A4, A8, bfloat16 where groups cross rows", HqqConfig, "hqq:READER"),
    _folder("exl2", "EXL2", BFLOAT16, Exl2Config, "exl2:READER"),
    _folder("mlx", "MLX", "A4, A8, T4, T4H, bfloat16 of FP8", MlxConfig, "mlx:READER"),
)  # fmt: skip

BY_ID: dict[str, Format] = {row.id: row for row in FORMATS}
BLOCKS: dict[int, Format] = {row.ggml: row for row in FORMATS if row.ggml is not None}
PACKED_BLOCKS: dict[str, int] = {
    row.id: number for number, row in BLOCKS.items() if row.engine not in (IN_PLACE, BFLOAT16)
}
# Numbers of GGUF that are not read, for messages.
FOREIGN_BLOCKS: dict[int, str] = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 31: "Q4_0_4_4",
    32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 41: "Q1_0",
}  # fmt: skip


def named_block(name: str) -> Format | None:
    """The block type with ggml's name; None for another name."""
    found = BY_ID.get(name)
    return found if found is not None and found.ggml is not None else None


def layer_class(config: QuantizationConfig) -> Any:
    """The layer of a checkpoint with this configuration, a subclass of PackedLinear; imports torch."""
    return BY_ID[config.format_id].layer_class


def layer_classes() -> tuple[Any, ...]:
    """Every class of packed linears, each once; imports torch."""
    return tuple(dict.fromkeys(row.layer_class for row in FORMATS))


def _methods() -> dict[str, Any]:
    return {method: row.settings for row in FORMATS for method in row.methods}


def settings_in(fields: Mapping[str, Any]) -> QuantizationConfig | None:
    """The quantisation that the content of a config.json names; None where it names none. Raises as `parse`."""
    content = fields.get("quantization_config")
    mlx = fields.get("quantization")
    if isinstance(mlx, Mapping) and {"bits", "group_size"} <= set(mlx) and not (content or {}).get("quant_method"):
        return MlxConfig.from_dict(mlx)
    if content is None:
        content = fields.get("compression_config")  # compressed-tensors before 2024
    return None if content is None else parse(content)


METHODS: dict[str, type[QuantizationConfig]] = _methods()
_AUTO_ROUND = ("auto-round", "intel/auto-round")


# What stands in AutoRound's packing_format, where the layout is not GPTQ's.
_PACKINGS: dict[str, type[QuantizationConfig]] = {
    "awq": AwqConfig, "llm_compressor": CompressedTensorsConfig, "fp8": Float8Config, "mlx": MlxConfig,
}  # fmt: skip


def _auto_round(content: Mapping[str, Any]) -> QuantizationConfig:
    """AutoRound's own files: its name for one of the layouts."""
    packing = str(content.get("packing_format") or "")
    for word, settings in _PACKINGS.items():
        if word in packing:
            return settings.from_dict(content)
    return _auto_round_gptq(content)


def parse(content: Any) -> QuantizationConfig:
    """The settings that a config.json, or a caller, gives. Raises InputError for an unknown method or a bad value."""
    if isinstance(content, QuantizationConfig):
        return content
    if hasattr(content, "to_dict"):  # a class of transformers
        content = content.to_dict()
    if not isinstance(content, Mapping):
        raise InputError(f"quantization_config is {shown(content)}; give a BitsAndBytesConfig, a GPTQConfig or a dict")
    method = content.get("quant_method")
    if method is None and (content.get("load_in_4bit") or content.get("load_in_8bit")):
        method = "bitsandbytes"
    if isinstance(method, str) and method in _AUTO_ROUND:
        return _auto_round(content)
    if not isinstance(method, str) or method not in METHODS:
        raise InputError(
            f"the quantisation method is {shown(method)}; {', '.join(METHODS)} and GGUF files are supported: quantise "
            "the unquantised checkpoint again, or fetch it in one of these"
        )
    return METHODS[method].from_dict(content)
