"""Options of a quantisation, checked before anything is read."""

from dataclasses import dataclass
from typing import Any

from llama2.checkpoint.gguf_mixture import ALIASES, FILE_TYPES, file_type
from llama2.config import LlamaConfig
from llama2.errors import InputError
from llama2.quantization.settings import AwqConfig, CompressedTensorsConfig
from llama2.quantization_config import BitsAndBytesConfig, GPTQConfig, QuantizationConfig

METHODS = ("gptq", "awq", "w4a16", "fp8", "nf4", "fp4", "int8")
SOLVED = ("gptq", "awq", "w4a16")  # integers that the solver chooses
GROUP_SIZES = (128, 64, 32)
_DENSE = ("F32", "F16", "BF16")
CALIBRATED = (*SOLVED, "gguf")  # unless told otherwise


@dataclass(frozen=True)
class QuantizationSettings:
    """How to quantise.

    method: "gptq", "awq" and "w4a16" (the same integers as AWQ and compressed-tensors lay them out), "fp8" (of
    compressed-tensors, a scale per row), "nf4", "fp4", "int8", or "gguf:" and a block type. bits, group_size,
    act_order, static_groups, sym, mse, passes, damp, format: of gptq; group_size -1 for whole rows, None for the
    largest of 128, 64, 32 that divides every width; mse: search each group's scale; passes: see quant.solve.
    double_quant: of nf4 and fp4. calibrate: round with the inputs in mind, None: gptq and gguf do. solve: of gguf,
    compensate errors with the Hessian; else they are weighed by an importance matrix. samples windows of `length`
    tokens, drawn by `seed`. true_sequential: each group of linears sees inputs that those before it in the layer,
    already quantised, give it. token_weights: tokens count by the attention that they receive, and none by its size
    (see layer.py); else all alike, as in the paper. precision: of the products that run the layers. shard_size: of the
    result. eval_tokens: how many tokens of the held-out text are measured, 0: none."""

    method: str = "gptq"
    bits: int = 4
    group_size: int | None = None
    act_order: bool = False
    static_groups: bool = False
    sym: bool = True
    mse: bool = True
    passes: int = 0
    damp: float = 0.01
    format: str = "gptq"
    double_quant: bool = False
    calibrate: bool | None = None
    solve: bool = False
    samples: int = 128
    length: int = 512
    seed: int = 0
    true_sequential: bool = True
    token_weights: bool = True
    precision: str = "auto"
    shard_size: int | str = "5GB"
    eval_tokens: int = 4096

    def __post_init__(self) -> None:
        kind, _, block = self.method.partition(":")
        if kind == "gguf" and (file_type(block) is None or block.upper() in _DENSE):
            known = ", ".join(name.lower() for name in (*FILE_TYPES, *ALIASES) if name not in _DENSE)
            raise InputError(f"method is {self.method!r}; gguf: takes one of {known}")
        if kind != "gguf" and self.method not in METHODS:
            raise InputError(
                f"method is {self.method!r}; it must be one of {', '.join(METHODS)}, or gguf: and a block type such as "
                "gguf:q4_k"
            )
        if self.passes < 0:
            raise InputError(f"passes is {self.passes}; it must be at least 0")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise InputError(f"precision is {self.precision!r}; it must be auto, float32 or bfloat16")
        if kind in SOLVED and self.calibrate is False:
            raise InputError(f"{kind} is made from calibration data; leave calibrate=False out, or take nf4 or int8")
        if kind == "fp8" and self.calibrate:
            raise InputError("fp8 is rounded by itself; leave calibrate out")
        if kind in ("awq", "w4a16") and self.bits != 4:
            raise InputError(f"{kind} has 4 bits, and bits is {self.bits}; take gptq for others")
        if kind in ("awq", "w4a16") and self.act_order and not self.static_groups:
            raise InputError(f"{kind} has groups of neighbouring columns; give static_groups with act_order")
        if self.kind == "gptq":
            self.gptq(32)

    @property
    def kind(self) -> str:
        """The method without its block type."""
        return self.method.partition(":")[0]

    @property
    def block_type(self) -> str:
        """The type of a GGUF file."""
        return self.method.partition(":")[2]

    @property
    def calibrated(self) -> bool:
        """Whether the inputs of the layers are needed."""
        return self.kind in CALIBRATED if self.calibrate is None else self.calibrate

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens count differently: not for an importance matrix, which is the worse for it."""
        return self.token_weights and (self.solve or self.kind != "gguf")

    def settings(self, config: LlamaConfig, dtype: str) -> QuantizationConfig | None:
        """Returns the settings for config.json; None for gguf. Raises InputError for groups that do not fit the
        model."""
        if self.kind == "gguf":
            return None
        if self.kind == "gptq":
            return self.gptq(group_size(config, self.group_size))
        if self.kind in SOLVED:
            return self._layout(group_size(config, self.group_size))
        if self.kind == "fp8":
            return _compressed("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"})
        if self.kind == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype="bfloat16" if dtype == "bfloat16" else dtype,
        )

    def _layout(self, group: int) -> QuantizationConfig:
        """The settings of a folder whose integers the solver chooses, in another layout than GPTQ's."""
        if self.kind == "awq":
            return AwqConfig.from_dict({"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True,
                                        "version": "gemm", "modules_to_not_convert": None})  # fmt: skip
        strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
        return _compressed("pack-quantized", {"num_bits": 4, "type": "int", **strategy})

    def grid(self, group: int) -> GPTQConfig:
        """The integers that the solver chooses: AWQ's have zeros of their own, compressed-tensors' are symmetric."""
        if self.kind == "gptq":
            return self.gptq(group)
        return GPTQConfig(bits=4, group_size=group, damp_percent=self.damp, sym=self.kind == "w4a16", format="gptq_v2")

    def gptq(self, group: int) -> GPTQConfig:
        """The settings of a GPTQ folder."""
        return GPTQConfig(
            bits=self.bits,
            group_size=group,
            damp_percent=self.damp,
            desc_act=self.act_order,
            static_groups=self.static_groups,
            sym=self.sym,
            true_sequential=self.true_sequential,
            format=self.format,
        )


def _compressed(format: str, weights: dict[str, Any]) -> QuantizationConfig:
    """The settings of a folder of compressed-tensors, as vLLM reads them."""
    scheme = {"symmetric": True, "dynamic": False, "actorder": None, **weights}
    group = {"targets": ["Linear"], "weights": scheme, "input_activations": None, "output_activations": None}
    content = {"quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
               "config_groups": {"group_0": group}, "ignore": ["lm_head"], "kv_cache_scheme": None}  # fmt: skip
    return CompressedTensorsConfig.from_dict(content)


def widths(config: LlamaConfig) -> dict[str, int]:
    """Columns of the linears of a layer, by what they are called."""
    return {
        "hidden_size": config.hidden_size,
        "heads * head_dim": config.num_attention_heads * config.head_dim,
        "intermediate_size": config.intermediate_size,
    }


def group_size(config: LlamaConfig, requested: int | None) -> int:
    """The group size asked for, or the largest that fits. Raises InputError where it does not divide every width."""
    found = widths(config)
    for name, width in found.items():
        if width % 32:
            raise InputError(f"{name} is {width}; GPTQ packs 32 columns at a time, so take nf4 or int8 for this model")
    if requested == -1:
        return -1
    if requested is None:
        return next(size for size in GROUP_SIZES if all(width % size == 0 for width in found.values()))
    if requested < 1:
        raise InputError(f"group_size is {requested}; give 128, 64 or 32, or -1 for whole rows")
    for name, width in found.items():
        if width % requested:
            fits = [size for size in GROUP_SIZES if all(other % size == 0 for other in found.values())]
            raise InputError(
                f"group_size {requested} does not divide {name}, {width}; of the usual sizes "
                f"{', '.join(map(str, fits))} "
                "do, and -1 takes whole rows"
            )
    return requested


def as_dict(options: QuantizationSettings) -> dict[str, Any]:
    """The options, JSON-ready."""
    return {name: getattr(options, name) for name in options.__dataclass_fields__}
