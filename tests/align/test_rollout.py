"""Answers of the model in training: mean-one weights, shared prompts, seeds, adapters without a merge."""

import math
from typing import Any

import pytest
import torch
from bytewise import write_tokenizer
from tiny import random_adapter, tiny_model

from llama2 import AutoTokenizer, InputError, LoraConfig, lora
from llama2.align.policy import Item, PolicyGradient
from llama2.align.rollout import Rollout, RolloutSampler, RolloutSettings, end_tokens, resting, seed_of
from llama2.train.distributed import Ranks
from llama2.train.fused_layer import fused, fuses

ALL = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def model_of(dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(torch.float32, 0, vocab_size=260, eos_token_id=0, bos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)
    random_adapter(model, ALL, 3)
    return model.to(dtype)


def training_logs(model: Any, answers: list[Rollout], temperature: float) -> list[torch.Tensor]:
    """What the training forward pass says of each answer's tokens: fused layers, answers packed into one row."""
    objective, found = PolicyGradient(temperature=temperature), []
    with torch.no_grad(), fused(model):
        assert fuses(model)
        for start in range(0, len(answers), 16):
            part = answers[start : start + 16]
            batch = objective.collate([Item(a.prompt_ids, a.ids, torch.zeros(len(a.ids))) for a in part])
            found += list(objective.log_probs(model, batch)[0].split([len(a.ids) for a in part]))
    return found


def sampled(
    model: Any, tokenizer: Any, how: RolloutSettings, count: int, runner: str = "auto"
) -> tuple[RolloutSampler, list[Rollout]]:
    prompts = [(i, list(tokenizer(f"the same beginning of a prompt, number {i}")["input_ids"])) for i in range(8)]
    sampler = RolloutSampler(model, tokenizer, how, Ranks(), runner)
    groups = sampler(prompts, [[seed_of(9, i, k) for k in range(count)] for i in range(8)])
    return sampler, [answer for group in groups for answer in group]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_importance_weights_average_one(temperature: float, dtype: torch.dtype, tokenizer: Any) -> None:
    """Of answers by the native engine with prefix hits, against the training forward pass with fused layers and packed
    rows: E[pi_train / pi_sampler] over the sampler's draws is 1, for every distribution that it may have."""
    model = model_of(dtype)
    sampler, answers = sampled(model, tokenizer, RolloutSettings(temperature=temperature, max_new_tokens=10), 24)
    assert sampler.reused > 0
    train = training_logs(model, answers, temperature)
    weights = torch.stack(
        [(t.double() - torch.tensor(a.logs).double()).sum().exp() for t, a in zip(train, answers, strict=True)]
    )
    error = float(weights.std()) / math.sqrt(len(weights))
    assert abs(float(weights.mean()) - 1) < 3 * error + 1e-6
    away = max(float((t.double() - torch.tensor(a.logs)).abs().max()) for t, a in zip(train, answers, strict=True))
    assert away < (1e-4 if dtype == torch.float32 else 0.5)  # 0.39 where bfloat16 is converted by shifts


def test_top_p_is_in_the_sampler_s_own_probabilities(tokenizer: Any) -> None:
    """They are of what is left, so that they exceed the model's by the mass that was cut."""
    model = model_of()
    _, answers = sampled(model, tokenizer, RolloutSettings(top_p=0.7, max_new_tokens=6), 4)
    train = training_logs(model, answers, 1.0)
    more = torch.cat([torch.tensor(a.logs) - t for t, a in zip(train, answers, strict=True)])
    assert bool((more > -1e-4).all()) and bool((more < -math.log(0.7) + 1e-4).all())
    assert float(more.mean()) > 0.05


def test_answers_are_a_function_of_their_seeds(tokenizer: Any) -> None:
    model, how = model_of(), RolloutSettings(max_new_tokens=8)
    _, all_of_them = sampled(model, tokenizer, how, 6)
    alone = RolloutSampler(model, tokenizer, how, Ranks())([(3, all_of_them[18].prompt_ids)], [[all_of_them[20].seed]])[
        0
    ][0]
    assert alone.ids == all_of_them[20].ids and alone.row == 3
    assert len({tuple(a.ids) for a in all_of_them[:6]}) > 1
    assert len({seed_of(1, 2, 3), seed_of(1, 23), seed_of(1, 3, 2), seed_of(12, 3)}) == 4
    _, by_torch = sampled(model, tokenizer, how, 2, "torch")
    assert [a.ids for a in by_torch] == [a.ids for i, a in enumerate(all_of_them) if i % 6 < 2]


def test_ends_are_told(tokenizer: Any) -> None:
    model = model_of()
    _, answers = sampled(model, tokenizer, RolloutSettings(max_new_tokens=24), 2)
    for answer in answers:
        assert answer.ended == (answer.ids[-1] == 0) and (answer.ended or len(answer.ids) == 24)
        assert 0 not in answer.ids[:-1] and len(answer.logs) == len(answer.ids)


def test_the_adapter_is_read_as_it_is_now_and_stays_apart(tokenizer: Any) -> None:
    model, how = model_of(), RolloutSettings(max_new_tokens=8)
    _, before = sampled(model, tokenizer, how, 2)
    with torch.no_grad():
        for layer in lora.layers(model).values():
            layer.lora_B["default"].mul_(-1.0)
    model.train()
    _, after = sampled(model, tokenizer, how, 2)
    assert model.training and lora.names(model) == ["default"]
    assert [a.ids for a in before] != [a.ids for a in after]
    train = training_logs(model.eval(), after, 1.0)
    assert all(float((t - torch.tensor(a.logs)).abs().max()) < 1e-4 for t, a in zip(train, after, strict=True))


def test_resting_leaves_modes_as_they_were() -> None:
    model = model_of().train()
    model.model.eval()
    with resting(model):
        assert not any(module.training for module in model.modules())
    assert model.training and not model.model.training


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}])
def test_bounds(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=str(next(iter(bad.values())))):
        RolloutSettings(**bad)


def test_a_model_without_an_end_is_refused(tokenizer: Any) -> None:
    model = tiny_model(torch.float32, eos_token_id=None)
    model.generation_config.eos_token_id = None
    with pytest.raises(InputError, match="no answer ends"):
        end_tokens(model, None)
