"""How a checkpoint is quantised, or shall be: `quantization_config` of config.json, and of from_pretrained.

Field names and defaults are those of transformers' classes of the same names, so files and calls are exchanged.
Standard library only: `llama2 info` reads them without torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from llama2.config import DTYPES
from llama2.errors import InputError
from llama2.pattern import check as check_pattern
from llama2.pattern import match
from llama2.schema import ANY, FLAG, Kind, Schema, check, either, maybe, real, several, table, text, whole
from llama2.text_file import shown


def dtype_name(dtype: Any, what: str) -> str:
    """The name of a torch.dtype or of its name. Raises InputError for anything else."""
    name = str(dtype).removeprefix("torch.")
    if name not in (*DTYPES, "uint8"):
        raise InputError(f"{what} is {dtype!r}; it must be one of {', '.join(DTYPES)} or the torch.dtype of that name")
    return name


# AWQ's files, and AutoGPTQ's of some versions, name two of the fields so.
_SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size"}
_AWQ_ONLY = ("zero_point", "version")


def completed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of AutoGPTQ's quantize_config.json as config.json would hold it, the method named.

    AWQ's quant_config.json has other names for the same fields and packs otherwise; it is told by two of its own.
    """
    named = {_SYNONYMS.get(key, key): value for key, value in content.items()}
    method = "awq" if any(key in named for key in _AWQ_ONLY) else "gptq"
    return {**named, "quant_method": named.get("quant_method") or method}


_BYTES_NAME = maybe(either(text(64), Kind("a dtype", lambda value: type(value).__name__ == "dtype")))
_SCHEMA: Schema = {
    **dict.fromkeys(("load_in_8bit", "load_in_4bit", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight",
                     "bnb_4bit_use_double_quant", "desc_act", "static_groups", "sym", "true_sequential", "lm_head"),
                    maybe(FLAG)),
    **dict.fromkeys(("llm_int8_threshold", "damp_percent"), real(-1e9, 1e9)),
    "llm_int8_skip_modules": maybe(several(text(), 10_000)),
    **dict.fromkeys(("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"), _BYTES_NAME),
    "bnb_4bit_quant_type": text(64),
    **dict.fromkeys(("format", "checkpoint_format"), maybe(text(64))),
    "bits": whole(1, 64),
    "group_size": whole(-1, 2**31 - 1),
    "dynamic": maybe(table(maybe(table(ANY, 100)), 10_000)),
    "extra_config": maybe(table(table(ANY, 100), 100_000)),
}  # fmt: skip


class QuantizationConfig:
    """Base class of quantisation settings: JSON in both directions, and which linears are packed."""

    quant_method: ClassVar[str]

    @property
    def format_id(self) -> str:
        """The row of the table of formats (`quantization.formats`)."""
        return self.quant_method

    def label(self, module: str) -> str:
        """Returns the name of the format of the linear at this path, for people."""
        return self.quant_method

    def describes_others(self, name: str) -> bool:
        """Whether a tensor is no weight but a note on how other programs quantise, such as the scale of a KV cache."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json's quantization_config."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The settings of a config.json. Entries of other programs are left out. Raises InputError for a bad value."""
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        check(content, _SCHEMA, "quantization_config", InputError)
        return cls(**{key: value for key, value in content.items() if key in known})

    def at(self, module: str) -> Self:
        """The settings of the linear at this path, where the file gives single ones others."""
        return self

    def skips(self, module: str) -> bool:
        """Whether the linear at this path ("model.layers.0.mlp.up_proj", "lm_head") stays in floating point."""
        return module.rpartition(".")[2] in ("lm_head", "score")


@dataclass
class BitsAndBytesConfig(QuantizationConfig):
    """bitsandbytes' 4-bit blocks (Dettmers et al., QLoRA, 2023) and int8 rows (LLM.int8(), 2022).

    The defaults are transformers': FP4 without double quantisation. QLoRA's are bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16".
    """

    quant_method: ClassVar[str] = "bitsandbytes"

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: Sequence[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: Any = "float32"
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: Any = "uint8"

    def __post_init__(self) -> None:
        if self.load_in_4bit == self.load_in_8bit:
            raise InputError(
                f"load_in_4bit is {self.load_in_4bit} and load_in_8bit is {self.load_in_8bit}; set exactly one of them"
            )
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise InputError(f"bnb_4bit_quant_type is {self.bnb_4bit_quant_type!r}; it must be 'nf4' or 'fp4'")
        self.bnb_4bit_compute_dtype = dtype_name(self.bnb_4bit_compute_dtype or "float32", "bnb_4bit_compute_dtype")
        self.bnb_4bit_quant_storage = dtype_name(self.bnb_4bit_quant_storage or "uint8", "bnb_4bit_quant_storage")

    @property
    def format_id(self) -> str:
        """As QuantizationConfig.format_id: "int8", "nf4" or "fp4"."""
        return "int8" if self.load_in_8bit else self.bnb_4bit_quant_type

    def label(self, module: str) -> str:
        """As QuantizationConfig.label."""
        return "INT8 rows" if self.load_in_8bit else self.bnb_4bit_quant_type.upper()

    def to_dict(self) -> dict[str, Any]:
        """As QuantizationConfig.to_dict."""
        content = {f.name: getattr(self, f.name) for f in fields(self)}
        content["_load_in_4bit"], content["_load_in_8bit"] = self.load_in_4bit, self.load_in_8bit
        return {**content, "quant_method": self.quant_method}

    def skips(self, module: str) -> bool:
        """As QuantizationConfig.skips; llm_int8_skip_modules names paths, or their last parts, instead of the heads."""
        if self.llm_int8_skip_modules is None:
            return super().skips(module)
        return any(module == name or module.endswith("." + name) or name in module.split(".")
                   for name in self.llm_int8_skip_modules)  # fmt: skip


@dataclass
class GPTQConfig(QuantizationConfig):
    """GPTQ (Frantar et al., arXiv 2210.17323): integers of `bits` with a scale and a zero for every group of columns.

    group_size: columns of a group, -1 for whole rows. dataset: texts to calibrate with, or the name of a data set;
    tokenizer: what encodes them. They, and the settings of the solver, are needed only to quantise. format: "gptq" (v1,
    stored zeros are one less) or "gptq_v2"; of a new file that is not `sym` v2, in v1 readers disagree about a zero of
    0 and GPTQModel takes none but its own. dynamic: as GPTQModel's, {"+:REGEX": {"bits": 8, ...}, "-:REGEX": {}}: the
    first pattern that matches a path from its beginning gives it other settings, or leaves it unquantised.
    """

    quant_method: ClassVar[str] = "gptq"

    bits: int = 4
    tokenizer: Any = field(default=None, repr=False)
    dataset: Any = field(default=None, repr=False)
    group_size: int = 128
    damp_percent: float = 0.1
    desc_act: bool = False
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    format: str = ""
    checkpoint_format: str = ""
    lm_head: bool = False
    dynamic: Mapping[str, Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        for pattern in self.dynamic or {}:
            try:
                check_pattern(_pattern(pattern))
            except InputError as error:
                raise InputError(f"dynamic: {error}") from error
        if self.bits not in (2, 3, 4, 8):
            raise InputError(f"bits is {self.bits!r}; GPTQ files hold 2, 3, 4 or 8")
        if not isinstance(self.group_size, int) or (self.group_size != -1 and self.group_size < 1):
            raise InputError(f"group_size is {self.group_size!r}; it must be a number of columns, or -1 for whole rows")
        if not 0 < self.damp_percent < 1:
            raise InputError(f"damp_percent is {self.damp_percent!r}; it must lie between 0 and 1")
        named = {name for name in (self.format, self.checkpoint_format) if name}
        if len(named) > 1:
            raise InputError(f"format is {self.format!r} and checkpoint_format {self.checkpoint_format!r}; give one")
        chosen = next(iter(named), "gptq" if self.sym else "gptq_v2")
        if chosen not in ("gptq", "gptq_v2"):
            raise InputError(f"the GPTQ format is {chosen!r}; 'gptq' and 'gptq_v2' are supported, so repack the file")
        self.format = self.checkpoint_format = chosen

    def label(self, module: str) -> str:
        """As QuantizationConfig.label."""
        settings = self.at(module)
        return f"GPTQ {settings.bits}-bit" + ("" if settings.group_size == -1 else f" g{settings.group_size}")

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """As QuantizationConfig.from_dict; takes the names and marks of older files."""
        named = {_SYNONYMS.get(key, key): value for key, value in content.items() if value is not None}
        if named.get("is_marlin_format"):
            named["format"] = named["checkpoint_format"] = "marlin"
        named["format"] = named.get("format") or named.get("checkpoint_format") or "gptq"
        return super().from_dict(named)

    def to_dict(self) -> dict[str, Any]:
        """As QuantizationConfig.to_dict: without the calibration data."""
        content = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("tokenizer", "dataset")}
        if self.dynamic is None:
            del content["dynamic"]
        return {**content, "quant_method": self.quant_method}

    def _rule(self, module: str) -> tuple[bool, Mapping[str, Any]]:
        """Whether the linear is quantised at all, and what differs for it."""
        for pattern, changes in (self.dynamic or {}).items():
            if match(_pattern(pattern), module):
                return not pattern.startswith("-:"), changes or {}
        return True, {}

    def at(self, module: str) -> Self:
        """As QuantizationConfig.at."""
        _, changes = self._rule(module)
        known = {f.name for f in fields(self)} - {"dynamic", "tokenizer", "dataset"}
        check(changes, _SCHEMA, f"dynamic of {module}", InputError)
        return replace(self, **{key: value for key, value in changes.items() if key in known}) if changes else self

    def skips(self, module: str) -> bool:
        """As QuantizationConfig.skips."""
        if not self._rule(module)[0]:
            return True
        return super().skips(module) and not (self.lm_head and module.endswith("lm_head"))


@dataclass
class GgufConfig(QuantizationConfig):
    """Blocks of GGUF's types, as a GGUF file holds them; each tensor says its type by its name (`quant.gguf`).

    Only this library reads a folder of them. `llama2 convert FOLDER x.gguf` makes a GGUF file of one, block by block.
    """

    quant_method: ClassVar[str] = "gguf"

    def to_dict(self) -> dict[str, Any]:
        """As QuantizationConfig.to_dict."""
        return {"quant_method": self.quant_method}

    def skips(self, module: str) -> bool:
        """Nothing is left out: the file has a type for each tensor."""
        return False


def _pattern(key: str) -> str:
    """The regular expression of a key of `dynamic`."""
    return key.removeprefix("-:").removeprefix("+:")


def auto_round(content: Mapping[str, Any]) -> GPTQConfig:
    """AutoRound's own files in GPTQ's layout. Zeros are one less in those called auto_gptq."""
    packing = str(content.get("packing_format", ""))
    older = "gptq" in packing and "gptqmodel" not in packing
    dynamic: dict[str, Mapping[str, Any]] = {}
    check(content, _SCHEMA, "quantization_config", InputError)
    for name, changes in (content.get("extra_config") or {}).items():
        check(changes, {"bits": maybe(whole(0, 64))}, f"extra_config of {shown(name)}", InputError)
        plain = int(changes.get("bits") or 0) >= 16
        pattern = f"{re.escape(name)}$" if re.fullmatch(r"[\w.]+", name) else name  # a layer's name, or a pattern
        dynamic[f"{'-' if plain else '+'}:.*?{pattern}"] = changes
    fields = {**content, "format": "gptq" if older else "gptq_v2", "dynamic": dynamic or None}
    return GPTQConfig.from_dict({key: value for key, value in fields.items() if key != "checkpoint_format"})
