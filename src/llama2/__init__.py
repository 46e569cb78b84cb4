"""llama2: the whole life of a Llama 2 model. Every public name, resolved at its first use; nothing else.

Importing the package costs nothing: torch loads with the first name that needs it.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES: dict[str, tuple[str, ...]] = {
    "config": ("LlamaConfig",),
    "generation_config": ("GenerationConfig",),
    "quantization_config": ("BitsAndBytesConfig", "GPTQConfig"),
    "tokenizer": (
        "AddedToken",
        "BatchEncoding",
        "CodeLlamaTokenizer",
        "CodeLlamaTokenizerFast",
        "LlamaTokenizer",
        "LlamaTokenizerFast",
        "PreTrainedTokenizer",
        "PreTrainedTokenizerFast",
    ),
    "cache": ("Cache", "DynamicCache", "KVCache", "StaticCache"),
    "model": ("LlamaForCausalLM", "LlamaModel"),
    "classifiers": ("LlamaForQuestionAnswering", "LlamaForSequenceClassification", "LlamaForTokenClassification"),
    "pretrained": ("PreTrainedModel",),
    "auto": (
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoTokenizer",
    ),
    "processors": (
        "ClassifierFreeGuidanceLogitsProcessor",
        "EncoderNoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "LogitsProcessor",
        "LogitsProcessorList",
        "LogitsWarper",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    ),
    "sampling": (
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "MinPLogitsWarper",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    ),
    "stopping": (
        "EosTokenCriteria",
        "MaxLengthCriteria",
        "MaxTimeCriteria",
        "StopStringCriteria",
        "StoppingCriteria",
        "StoppingCriteriaList",
    ),
    "streamers": ("AsyncTextIteratorStreamer", "BaseStreamer", "TextIteratorStreamer", "TextStreamer"),
    "pipelines": ("TextClassificationPipeline", "TextGenerationPipeline", "pipeline"),
    "seeds": ("set_seed",),
    "hf_argument_parser": ("HfArgumentParser",),
    "outputs": ("ModelOutput",),
    "lora_config": ("LoraConfig", "TaskType"),
    "engine.engine": ("Engine",),
    "train.arguments": ("TrainingArguments",),
    "train.callbacks": (
        "EarlyStoppingCallback",
        "PrinterCallback",
        "TrainerCallback",
        "TrainerControl",
        "TrainerState",
    ),
    "train.collators": (
        "DataCollatorForLanguageModeling",
        "DataCollatorForSeq2Seq",
        "DataCollatorForTokenClassification",
        "DataCollatorWithPadding",
        "DefaultDataCollator",
        "default_data_collator",
    ),
    "train.configs": ("DPOConfig", "RewardConfig", "SFTConfig"),
    "train.evaluation": ("EvalPrediction",),
    "train.schedules": (
        "get_constant_schedule",
        "get_constant_schedule_with_warmup",
        "get_cosine_schedule_with_warmup",
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        "get_cosine_with_min_lr_schedule_with_warmup",
        "get_inverse_sqrt_schedule",
        "get_linear_schedule_with_warmup",
        "get_polynomial_decay_schedule_with_warmup",
        "get_reduce_on_plateau_schedule",
        "get_scheduler",
        "get_wsd_schedule",
    ),
    "train.trainer": ("Trainer",),
    "train.tuning": ("DPOTrainer", "RewardTrainer", "SFTTrainer"),
    "peft_model": (
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForSequenceClassification",
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForSequenceClassification",
        "get_peft_model",
        "prepare_model_for_kbit_training",
    ),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "InputError",
        "Llama2Error",
        "MismatchError",
        "MissingDependencyError",
        "TokenizerError",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'llama2' has no attribute {name!r}; it exports {', '.join(__all__)}")
    value = getattr(import_module(f"llama2.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
