"""llama2's classes in the place of transformers' wherever upstream's test modules import them from."""

import collections
import importlib
import inspect
import unittest
from typing import Any

from peer_environment import llama2, transformers

GENERATION = (
    "Processor",
    "ProcessorList",
    "Warper",
    "Penalty",
    "Normalization",
    "Criteria",
    "CriteriaList",
    "Streamer",
)
TOP = [
    "LlamaConfig",
    "LlamaModel",
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaForQuestionAnswering",
    "PreTrainedModel",
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "PreTrainedTokenizerFast",
    "GenerationConfig",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoTokenizer",
    "AddedToken",
    "BatchEncoding",
    "Cache",
    "DynamicCache",
    "StaticCache",
    "pipeline",
    "TextGenerationPipeline",
]
HOMES = (
    "transformers.generation",
    "transformers.generation.logits_process",
    "transformers.generation.stopping_criteria",
    "transformers.generation.streamers",
    "transformers.generation.utils",
    "transformers.generation.configuration_utils",
    "transformers.cache_utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.configuration_llama",
    "transformers.models.llama.tokenization_llama",
    "transformers.models.llama.tokenization_llama_fast",
    "transformers.models.llama",
    "transformers.generation.candidate_generator",
    "transformers.generation.watermarking",
)
# Names that a test may ask for and that llama2 does not have; those that it has by now are ours.
ABSENT = [
    "LlamaForQuestionAnswering",
    "LlamaForTokenClassification",
    "HammingDiversityLogitsProcessor",
    "WatermarkLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "BarkEosPrioritizerLogitsProcessor",
    "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSChannelFilterLogitsProcessor",
    "DiaEOSDelayPatternLogitsProcessor",
    "ConfidenceCriteria",
    "QuantoQuantizedCache",
    "OffloadedCache",
    "EncoderDecoderCache",
    "LlamaLinearScalingRotaryEmbedding",
    "LlamaDynamicNTKScalingRotaryEmbedding",
    "WatermarkDetector",
    "WatermarkingConfig",
    "SynthIDTextWatermarkingConfig",
    "BayesianDetectorModel",
    "BayesianDetectorConfig",
    "PhrasalConstraint",
    "DisjunctiveConstraint",
    "HybridCache",
    "SlidingWindowCache",
    "QuantizedCache",
    "TFLogitsProcessorList",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForVision2Seq",
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "ImageGPTForCausalImageModeling",
    "SpeechEncoderDecoderModel",
    "T5ForConditionalGeneration",
    "PromptLookupCandidateGenerator",
    "BeamSearchScorer",
    "ConstrainedBeamSearchScorer",
    "WhisperTimeStampLogitsProcessor",
]


class NotProvided(unittest.SkipTest):
    """A name that llama2 does not have was used."""


def missing(name: str) -> type:
    """A class whose use skips the test."""

    def refuse(*_: Any, **__: Any) -> None:
        raise NotProvided(f"not provided by llama2: {name}")

    return type(name, (), {"__init__": refuse, "from_pretrained": refuse, "from_config": refuse})


def _ours() -> dict[str, Any]:
    found: dict[str, Any] = {}
    ours = llama2.generation
    for module in (ours.processors, ours.sampler, ours.stopping, ours.streamers):
        for name, value in vars(module).items():
            own = inspect.isclass(value) and value.__module__.startswith("llama2.") and not name.startswith("_")
            if own and name.endswith(GENERATION):
                found[name] = value
    found |= {name: getattr(llama2, name) for name in TOP if hasattr(llama2, name)}
    greedy, beam = llama2.outputs.GenerateDecoderOnlyOutput, llama2.outputs.GenerateBeamDecoderOnlyOutput
    return found | {
        "PretrainedConfig": llama2.LlamaConfig,
        "PreTrainedConfig": llama2.LlamaConfig,
        "LlamaRotaryEmbedding": llama2.rope.LlamaRotaryEmbedding,
        "LlamaRMSNorm": llama2.model.LlamaRMSNorm,
        "LlamaAttention": llama2.model.LlamaAttention,
        "LlamaDecoderLayer": llama2.model.LlamaDecoderLayer,
        "LlamaMLP": llama2.model.LlamaMLP,
        "GenerateDecoderOnlyOutput": greedy,
        "GenerateBeamDecoderOnlyOutput": beam,
        "GreedySearchDecoderOnlyOutput": greedy,
        "SampleDecoderOnlyOutput": greedy,
        "BeamSearchDecoderOnlyOutput": beam,
        "BeamSampleDecoderOnlyOutput": beam,
        "ModelOutput": llama2.outputs.ModelOutput,
        "TextGenerationPipeline": llama2.pipelines.TextGenerationPipeline,
        "TextClassificationPipeline": llama2.pipelines.TextClassificationPipeline,
    }


OURS: dict[str, Any] = _ours()
# Of other architectures: the integration tests of generation need some small decoder.
STAND_INS: dict[str, Any] = {
    **dict.fromkeys(("GPT2LMHeadModel", "BartForConditionalGeneration", "BartForCausalLM"), llama2.LlamaForCausalLM),
    **dict.fromkeys(("GPT2Tokenizer", "BartTokenizer"), llama2.AutoTokenizer),
}
REPLACED: dict[str, Any] = {}  # what stood under a name before, where it stood in one of HOMES
_absent = [name for name in ABSENT if name not in OURS]


def _replace() -> None:
    for name, value in {**OURS, **STAND_INS}.items():
        setattr(transformers, name, value)
    homes = []
    for home in HOMES:
        try:
            homes.append(importlib.import_module(home))
        except ImportError:  # another version's
            continue
    for module in homes:
        generation = module.__name__ == "transformers.generation"
        for name in (*OURS, *_absent):
            if hasattr(module, name) or (generation and name in OURS and name.endswith(GENERATION)):
                REPLACED.setdefault(name, getattr(module, name, None))
    for module in homes:
        everything = module.__name__ in ("transformers.generation", "transformers.models.llama")
        for name in REPLACED:
            if everything or name in vars(module):
                setattr(module, name, OURS.get(name) or missing(name))
    for name in _absent:
        setattr(transformers, name, missing(name))


def _helper(name: str) -> Any:
    """A decorator of the test helpers that this release of transformers no longer has."""
    if name.startswith(("require_", "is_", "skip_")):
        return lambda thing=None, *_, **__: thing
    raise AttributeError(name)


def _forgive_imports() -> None:
    """Names that only other architectures' tests use can be imported; their use skips the test."""
    importlib.import_module("transformers.utils.generic").ModelOutput = OURS["ModelOutput"]  # type: ignore[attr-defined]
    transformers.testing_utils.__getattr__ = _helper
    lazy = type(transformers).__getattr__

    def attribute(self: Any, name: str) -> Any:
        try:
            return lazy(self, name)
        except AttributeError:
            if self is transformers and name.endswith(("_MAPPING", "_MAPPING_NAMES")):
                return collections.OrderedDict()
            if self is transformers and (name.startswith(("AutoModelFor", "TF", "Flax")) or name.endswith("Pipeline")):
                return missing(name)
            raise

    type(transformers).__getattr__ = attribute
    pipelines: Any = importlib.import_module("transformers.pipelines")
    pipelines.__getattr__ = lambda name: missing(name) if name[0].isupper() else _helper(name)
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    auto.__getattr__ = lambda name: collections.OrderedDict() if name.endswith("_MAPPING_NAMES") else _helper(name)


def install() -> None:
    """Before any test module is imported."""
    _replace()
    _forgive_imports()
