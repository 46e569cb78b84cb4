"""What `from llama2 import ...` gives: the names that scripts for transformers import."""

import random

import numpy as np
import pytest
import torch

import llama2
from llama2.generation import processors, sampler, stopping

NAMES = [
    "BaseStreamer",
    "Cache",
    "EosTokenCriteria",
    "LlamaForQuestionAnswering",
    "LlamaForTokenClassification",
    "LogitsWarper",
    "MaxLengthCriteria",
    "MaxTimeCriteria",
    "ModelOutput",
    "StopStringCriteria",
    "TemperatureLogitsWarper",
    "TextClassificationPipeline",
    "TextGenerationPipeline",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "set_seed",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_at_the_top(name: str) -> None:
    assert getattr(llama2, name).__name__ in (name, "LogitsProcessor") and name in llama2.__all__


def test_every_processor_and_criterion_is_at_the_top() -> None:
    for module in (processors, sampler, stopping):
        for name, value in vars(module).items():
            if isinstance(value, type) and value.__module__ == module.__name__ and not name.startswith("_"):
                kinds = (processors.LogitsProcessor, stopping.StoppingCriteria)
                assert not issubclass(value, kinds) or getattr(llama2, name) is value


def test_every_name_resolves() -> None:
    assert all(getattr(llama2, name) is not None for name in llama2.__all__)


def test_set_seed() -> None:
    """The first draws after a seed of 42."""
    llama2.set_seed(42)
    assert (random.random(), np.random.rand()) == (0.6394267984578837, 0.3745401188473625)
    assert torch.rand(1).item() == pytest.approx(0.8822692632675171)
    for seed in (-1, 2**32, "1", True):
        with pytest.raises(llama2.InputError, match="seed is"):
            llama2.set_seed(seed)  # type: ignore[arg-type]
