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
    "tokenizer": ("AddedToken", "BatchEncoding", "LlamaTokenizer", "LlamaTokenizerFast"),
    "cache": ("DynamicCache", "KVCache", "StaticCache"),
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
    "outputs": ("ModelOutput",),
    "lora_config": ("LoraConfig",),
    "engine.engine": ("Engine",),
    "train.arguments": ("TrainingArguments",),
    "train.trainer": ("Trainer",),
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
