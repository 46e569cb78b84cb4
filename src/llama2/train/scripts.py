"""The parts of TRL's interface that its example scripts use besides trainers: options of a model and a data set, and
the chat format.

parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
script_args, training_args, model_args = parser.parse_args_and_config()
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llama2.errors import InputError
from llama2.hf_argument_parser import HfArgumentParser, read_options
from llama2.lora_config import LoraConfig
from llama2.pretrained import PreTrainedModel
from llama2.protocols import TokenizerLike
from llama2.quantization_config import BitsAndBytesConfig

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class ScriptArguments:
    """The data set of a script."""

    dataset_name: str | None = field(default=None, metadata={"help": "hub id or folder of the data set"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration"})
    dataset_train_split: str = field(default="train", metadata={"help": "the split that is trained on"})
    dataset_test_split: str = field(default="test", metadata={"help": "the split that is measured"})
    dataset_streaming: bool = field(default=False, metadata={"help": "read rows while training"})
    gradient_checkpointing_use_reentrant: bool = field(default=False, metadata={"help": "torch's older recomputing"})
    ignore_bias_buffers: bool = field(default=False, metadata={"help": "no effect: a Llama model has no such buffers"})


@dataclass
class ModelConfig:
    """The model of a script, its adapter and its packing. dtype: of the weights ("float32", "bfloat16", "auto")."""

    trust_remote_code = False  # read by scripts for TRL 0.x; the option is that of the training arguments

    model_name_or_path: str | None = field(default=None, metadata={"help": "hub id or folder of the model"})
    model_revision: str = field(default="main", metadata={"help": "branch, tag or commit of a hub id"})
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = field(
        default="float32", metadata={"help": "dtype of the weights", "aliases": ["--torch_dtype"]}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa or flash_attention_2"})
    use_peft: bool = field(default=False, metadata={"help": "train an adapter"})
    lora_r: int = field(default=16, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=32, metadata={"help": "alpha of the adapter"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout of the adapter"})
    lora_target_modules: list[str] | None = field(default=None, metadata={"help": "linears that are adapted"})
    lora_modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules that are trained whole"})
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "CAUSAL_LM or SEQ_CLS"})
    use_rslora: bool = field(default=False, metadata={"help": "scale by alpha / sqrt(r)"})
    use_dora: bool = field(default=False, metadata={"help": "learn the lengths of rows too"})
    load_in_8bit: bool = field(default=False, metadata={"help": "int8 weights"})
    load_in_4bit: bool = field(default=False, metadata={"help": "4-bit weights"})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "nf4 or fp4"})
    use_bnb_nested_quant: bool = field(default=False, metadata={"help": "quantise the scales too"})

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise InputError("load_in_8bit and load_in_4bit exclude each other; give one")
        if self.lora_target_modules is not None and len(self.lora_target_modules) == 1:
            self.lora_target_modules = self.lora_target_modules[0]  # type: ignore[assignment]  # "all-linear", a regex

    @property
    def torch_dtype(self) -> str | None:
        """dtype under its older name."""
        return self.dtype


def get_peft_config(model_args: ModelConfig) -> LoraConfig | None:
    """The adapter that a ModelConfig asks for; None without use_peft."""
    if not model_args.use_peft:
        return None
    named: dict[str, Any] = {
        "target_modules": model_args.lora_target_modules,
        "modules_to_save": model_args.lora_modules_to_save,
    }
    return LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        task_type=model_args.lora_task_type,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        **{name: value for name, value in named.items() if value is not None},
    )


def get_quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """The packing that a ModelConfig asks for; None for none."""
    if model_args.load_in_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=None if model_args.dtype == "auto" else model_args.dtype,
            bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if model_args.load_in_8bit else None


def get_kbit_device_map() -> dict[str, int] | None:
    """The device map of a packed model: the first CUDA device, or None for the CPU."""
    import torch

    return {"": torch.cuda.current_device()} if torch.cuda.is_available() else None


class TrlParser(HfArgumentParser):
    """An HfArgumentParser that also reads `--config FILE` (YAML or JSON), whose values options override."""

    def __init__(self, dataclass_types: type | Iterable[type] | None = None, **kwargs: object) -> None:
        super().__init__(dataclass_types, **kwargs)
        self.add_argument("--config", help="YAML or JSON file of options")

    def parse_args_and_config(
        self,
        args: Sequence[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
    ) -> tuple[Any, ...]:
        """One instance of each dataclass; with return_remaining_strings also the options that none of them has.

        Raises InputError for a file that is none, and for an option of it that no dataclass has.
        """
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        found, rest = first.parse_known_args(args)
        unknown = self._take(read_options(Path(found.config))) if found.config else []
        if unknown and fail_with_unknown_args and not return_remaining_strings:
            raise InputError(f"{found.config} sets {', '.join(unknown)}, which no option is called; take it out")
        parsed = self.parse_args_into_dataclasses(
            rest, return_remaining_strings=return_remaining_strings or not fail_with_unknown_args
        )
        kept = [one for one in parsed if not isinstance(one, argparse.Namespace)]
        if return_remaining_strings:
            return (*kept[: len(self.dataclass_types)], [*unknown, *kept[-1]])
        return tuple(kept[: len(self.dataclass_types)])

    def _take(self, values: Mapping[str, Any]) -> list[str]:
        """Makes the values of a file the defaults; returns the names that no option has."""
        known = {action.dest: action for action in self._actions}
        for name in values.keys() & known.keys():
            known[name].required = False
        self.set_defaults(**{name: value for name, value in values.items() if name in known})
        return sorted(values.keys() - known.keys())


def setup_chat_format(
    model: PreTrainedModel, tokenizer: TokenizerLike, format: str = "chatml", resize_to_multiple_of: int | None = None
) -> tuple[Any, Any]:
    """Gives model and tokenizer ChatML: its two tokens, template, end and pad token, and rows for them. Returns both.

    Raises InputError where the tokenizer has a template already, and for a format other than "chatml".
    """
    if format != "chatml":
        raise InputError(f"format is {format!r}; 'chatml' is the only one")
    if tokenizer.chat_template is not None:
        raise InputError("the tokenizer has a chat template; set tokenizer.chat_template = None to replace it")
    begin, end = "<|im_start|>", "<|im_end|>"
    tokenizer.add_special_tokens({"additional_special_tokens": [begin, end]})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = begin, end, end
    tokenizer.chat_template = _CHATML
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=resize_to_multiple_of)
    named: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for name, value in named.items():
        setattr(model.config, name, value)
    model.generation_config.update(**named)
    return model, tokenizer
