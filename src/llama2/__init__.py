"""llama2: the whole life of a Llama 2 model. Every public name, resolved at its first use; nothing else.

Importing the package costs nothing: torch loads with the first name that needs it.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES: dict[str, tuple[str, ...]] = {
    "config": ("LlamaConfig",),
    "generation.config": ("GenerationConfig",),
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
    "pretrained": ("LlamaPreTrainedModel", "PreTrainedModel"),
    "auto": (
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoTokenizer",
    ),
    "generation.processors": (
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
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
    ),
    "generation.guidance": ("PrefixConstrainedLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
    "generation.filters": (
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "MinPLogitsWarper",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
    ),
    "generation.stopping": (
        "EosTokenCriteria",
        "MaxLengthCriteria",
        "MaxTimeCriteria",
        "StopStringCriteria",
        "StoppingCriteria",
        "StoppingCriteriaList",
    ),
    "generation.streamers": ("AsyncTextIteratorStreamer", "BaseStreamer", "TextIteratorStreamer", "TextStreamer"),
    "llama": ("Llama",),
    "pipelines": ("TextClassificationPipeline", "TextGenerationPipeline", "pipeline"),
    "seeds": ("set_seed",),
    "availability": (
        "is_accelerate_available",
        "is_bitsandbytes_available",
        "is_datasets_available",
        "is_flash_attn_2_available",
        "is_peft_available",
        "is_safetensors_available",
        "is_sentencepiece_available",
        "is_tokenizers_available",
        "is_torch_available",
        "is_torch_bf16_gpu_available",
        "is_torch_cuda_available",
        "is_torch_npu_available",
        "is_torch_xpu_available",
    ),
    "hf_argument_parser": ("HfArgumentParser",),
    "outputs": ("ModelOutput",),
    "lora_config": ("LoraConfig", "TaskType"),
    "engine.engine": ("Engine",),
    "align.configs": ("GRPOConfig", "PPOConfig", "RLOOConfig"),
    "align.trainers": ("GRPOTrainer", "PPOTrainer", "RLOOTrainer"),
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
    "train.completions": ("DataCollatorForCompletionOnlyLM", "DataCollatorWithFlattening"),
    "train.configs": ("CPOConfig", "DPOConfig", "KTOConfig", "ORPOConfig", "RewardConfig", "SFTConfig"),
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
    "train.scripts": (
        "ModelConfig",
        "ScriptArguments",
        "TrlParser",
        "get_kbit_device_map",
        "get_peft_config",
        "get_quantization_config",
        "setup_chat_format",
    ),
    "train.streams": ("ConstantLengthDataset",),
    "train.trainer": ("Trainer",),
    "train.tuning": ("DPOTrainer", "RewardTrainer", "SFTTrainer"),
    "train.tuning_tasks": ("CPOTrainer", "KTOTrainer", "ORPOTrainer"),
    "peft_model": (
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForSequenceClassification",
        "PeftConfig",
        "PeftModel",
        "PeftModelForCausalLM",
        "PeftModelForSequenceClassification",
        "get_peft_model",
        "get_peft_model_state_dict",
        "prepare_model_for_kbit_training",
        "set_peft_model_state_dict",
    ),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "ContextLengthError",
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
    try:
        value = getattr(import_module(f"llama2.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        from llama2.errors import needs_torch

        extra = "train" if _HOME[name].partition(".")[0] in ("train", "align") else "torch"
        raise needs_torch(name, extra) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
