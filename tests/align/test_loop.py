"""PPO, GRPO and RLOO over the Trainer: the update beside plain torch, invariances, resuming, what is refused."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain_ppo
import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_model

from llama2 import (
    AutoTokenizer,
    GRPOConfig,
    GRPOTrainer,
    InputError,
    LoraConfig,
    PPOConfig,
    PPOTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from llama2.align.critic import Critic

PROMPTS = [{"prompt": text} for text in ("ab", "the sky", "one two three", "x")]
ADAPTER = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
QUIET = {"save_strategy": "no", "logging_steps": 1, "lr_scheduler_type": "constant", "use_cpu": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def byte_model(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    model = tiny_model(dtype, seed, vocab_size=260, eos_token_id=0, bos_token_id=None, **changes)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)  # so that no answer is certain
    return model


def vowels(completions: list[str], **_: Any) -> list[float]:
    """A reward that tells answers apart: the share of letters in the first half of the bytes, and the length."""
    return [sum(ord(c) % 3 for c in text) / 10 - 0.01 * len(text) for text in completions]


def fixed(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Answers of the test's own: the same at each call."""
    generator = torch.Generator().manual_seed(3)
    ids = [trainer.processing_class(prompt)["input_ids"] for prompt in prompts]
    lengths = torch.randint(2, 9, (len(prompts),), generator=generator).tolist()
    answers = [[*torch.randint(4, 260, (n,), generator=generator).tolist(), 0] for n in lengths]
    return {"prompt_ids": ids, "completion_ids": answers, "logprobs": None}


def shared_head(trainer: Any) -> Any:
    return trainer.critic.head


def test_the_update_of_ppo_is_that_of_plain_torch(tokenizer: Any, tmp_path: Path) -> None:
    config = PPOConfig(
        str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=4, num_mini_batches=2,
        num_ppo_epochs=3, num_generations=3, learning_rate=3e-3, weight_decay=0.1, kl_coef=0.05, critic="shared",
        whiten_scores=True, max_steps=6, temperature=0.7, gamma=0.98, max_completion_length=12, vf_coef=0.3, **QUIET,
    )  # fmt: skip
    model = byte_model()
    plain = copy.deepcopy(model)
    trainer = PPOTrainer(config, tokenizer, model, None, vowels, PROMPTS, rollout_func=fixed)
    rows = [PROMPTS[row]["prompt"] for row in trainer.order(0) for _ in range(3)]
    given = fixed(rows, trainer)
    scores = vowels([tokenizer.decode(ids, skip_special_tokens=True) for ids in given["completion_ids"]])
    head = copy.deepcopy(shared_head(trainer))
    answers = list(zip(given["prompt_ids"], given["completion_ids"], scores, strict=True))
    wanted = plain_ppo.iteration(plain, head, answers, config)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(wanted, abs=1e-8) and len(losses) == 6
    for name, parameter in plain.named_parameters():
        assert (parameter - model.get_parameter(name)).abs().max() < 1e-8, name
    assert (head.weight - shared_head(trainer).weight).abs().max() < 1e-8
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["ratio"] == pytest.approx(1, abs=1e-12) and first["clip_fraction"] == 0
    assert first["approx_kl"] < 1e-20


def made(kind: str, folder: Path, tokenizer: Any, model: Any = None, **changes: Any) -> Any:
    """A small trainer of each kind with answers of the engine."""
    common = {"learning_rate": 1e-3, "max_completion_length": 8, "seed": 3, **QUIET}
    extra = {name: changes.pop(name) for name in ("rollout_func", "peft_config", "eval_dataset") if name in changes}
    model = byte_model(torch.float32) if model is None else model
    if kind == "ppo":
        sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_mini_batches": 2,
                 "num_ppo_epochs": 2, "temperature": 1.0, "max_steps": 8}  # fmt: skip
        config = PPOConfig(str(folder), **{**common, **sizes, **changes})
        reward = extra.pop("reward", vowels)
        return PPOTrainer(config, tokenizer, model, None, reward, PROMPTS, **extra)
    sizes = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 3}
    if kind == "grpo":
        return GRPOTrainer(model, vowels, GRPOConfig(str(folder), **{**common, **sizes, **changes}), PROMPTS,
                           processing_class=tokenizer, **extra)  # fmt: skip
    return RLOOTrainer(model, vowels, RLOOConfig(str(folder), **{**common, **sizes, **changes}), PROMPTS,
                       processing_class=tokenizer, **extra)  # fmt: skip


@pytest.mark.parametrize("kind", ["ppo", "grpo", "rloo"])
def test_a_rate_near_zero_changes_nothing(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    trainer = made(kind, tmp_path, tokenizer, learning_rate=1e-30, **({} if kind == "ppo" else {"beta": 0.1}))
    before = {name: p.clone() for name, p in trainer.network.named_parameters()}
    trainer.train()
    assert all(bool((p == before[name]).all()) for name, p in trainer.network.named_parameters())
    for entry in trainer.state.log_history:
        if "loss" in entry:
            assert entry["ratio"] == pytest.approx(1, abs=1e-5) and entry["approx_kl"] < 1e-9
            assert abs(entry.get("kl", entry.get("objective/kl", 0.0))) < 1e-4


@pytest.mark.parametrize("critic", ["shared", "adapter", "model"])
def test_critics_learn_and_the_reference_stays(critic: str, tokenizer: Any, tmp_path: Path) -> None:
    lora = LoraConfig(**ADAPTER) if critic != "model" else None
    trainer = made("ppo", tmp_path, tokenizer, peft_config=lora, critic=critic, learning_rate=3e-3, max_steps=40,
                   vf_coef=1.0, kl_coef=0.01, rollout_func=fixed, cliprange_value=None)  # fmt: skip
    trainer.train()
    told = [entry["value_loss"] for entry in trainer.state.log_history if "value_loss" in entry]
    assert sum(told[-4:]) < 0.7 * sum(told[:4])
    kls = [entry["objective/kl"] for entry in trainer.state.log_history if "objective/kl" in entry]
    assert abs(kls[0]) < 1e-4 and kls[-1] != kls[0]


def test_the_critic_warms_up_alone(tokenizer: Any, tmp_path: Path) -> None:
    trainer = made("ppo", tmp_path, tokenizer, peft_config=LoraConfig(**ADAPTER), critic_warmup=2)
    before = {name: p.clone() for name, p in trainer.network.named_parameters() if ".default" in name}
    head = trainer.critic.head.weight.clone()
    trainer.train()
    assert all(bool((trainer.network.get_parameter(name) == p).all()) for name, p in before.items())
    assert not bool((trainer.critic.head.weight == head).all())


@pytest.mark.parametrize("kind", ["ppo", "grpo", "rloo"])
def test_micro_batches_change_nothing(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    sizes = [(4, 2), (1, 8)] if kind == "ppo" else [(8, 1), (2, 4)]
    found = []
    for size, steps in sizes:
        trainer = made(kind, tmp_path / str(size), tokenizer, byte_model(), per_device_train_batch_size=size,
                       gradient_accumulation_steps=steps, max_steps=2, rollout_func=fixed)  # fmt: skip
        trainer.train()
        found.append(torch.cat([p.flatten() for p in trainer.network.parameters()]))
    assert (found[0] - found[1]).abs().max() < 1e-12


@pytest.mark.parametrize(("critic", "most"), [("shared", 1024), ("adapter", 512)])
def test_a_trunk_of_its_own_halves_the_passes(
    critic: str, most: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept for the backward pass is that of as many tokens as in other training, of both trunks together."""
    trainer = made("ppo", tmp_path, tokenizer, byte_model(torch.float32), peft_config=LoraConfig(**ADAPTER),
                   critic=critic, max_steps=2, per_device_train_batch_size=256, num_generations=64,
                   gradient_accumulation_steps=1, num_mini_batches=1, rollout_func=fixed)  # fmt: skip
    sizes: list[int] = []
    loss = trainer.objective.loss

    def heard(model: Any, batch: Any) -> Any:
        sizes.append(len(batch["lengths"]) * batch["input_ids"].shape[1])
        return loss(model, batch)

    monkeypatch.setattr(trainer.objective, "loss", heard)
    trainer.train()
    assert most / 2 < max(sizes) <= most


# -- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ppo", "grpo", "rloo"])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_run_that_is_resumed_ends_with_the_same_bits(kind: str, stop: int, tokenizer: Any, tmp_path: Path) -> None:
    more: dict[str, Any] = {"target_kl": 0.1, "critic": "adapter"} if kind == "ppo" else {
        "steps_per_generation": 2, "num_iterations": 2, "max_steps": 8, "beta": 0.1, "num_generations": 4}  # fmt: skip

    def trainer(folder: Path) -> Any:
        return made(kind, folder, tokenizer, peft_config=LoraConfig(**ADAPTER), save_strategy="steps", save_steps=stop,
                    save_only_model=False, **more)  # fmt: skip

    whole = trainer(tmp_path / "whole")
    whole.args.save_strategy = "no"
    whole.train()
    broken = trainer(tmp_path / "broken")

    class Stop(Exception):
        pass

    steps: Callable[[], None] = broken._step

    def step() -> None:
        if broken.state.global_step == stop:
            raise Stop
        steps()

    broken._step = step
    with pytest.raises(Stop):
        broken.train()
    again = trainer(tmp_path / "broken")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step == 8
    for name, parameter in whole.updates.parameters.items():
        assert bool((parameter == again.updates.parameters[name]).all()), name
    assert again.kl_coef == whole.kl_coef


# -- rewards -----------------------------------------------------------------------------------------------------


def test_a_failing_reward_leaves_a_checkpoint_to_resume_from(tokenizer: Any, tmp_path: Path) -> None:
    calls = []

    def breaks(completions: list[str], **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("no more")
        return vowels(completions)

    settings = {"learning_rate": 1e-3, "max_completion_length": 8, "per_device_train_batch_size": 8,
                "num_generations": 4, "max_steps": 4, **QUIET, "save_strategy": "steps", "save_steps": 100}  # fmt: skip

    def trainer(reward: Any, folder: str) -> Any:
        return GRPOTrainer(byte_model(torch.float32), reward, GRPOConfig(str(tmp_path / folder), **settings), PROMPTS,
                           processing_class=tokenizer)  # fmt: skip

    broken = trainer(breaks, "broken")
    with pytest.raises(InputError, match="breaks raised ValueError: no more.*resume"):
        broken.train()
    assert (tmp_path / "broken" / "checkpoint-2").exists()
    breaks.__name__ = "breaks"
    again = trainer(breaks, "broken")
    again.train(resume_from_checkpoint=True)

    def calm(completions: list[str], **_: Any) -> list[float]:
        return vowels(completions)

    calm.__name__ = "breaks"
    whole = trainer(calm, "whole")
    whole.train()
    for name, parameter in whole.updates.parameters.items():
        assert bool((parameter == again.updates.parameters[name]).all()), name


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda completions, **_: [math.nan] * len(completions), "returned nan"),
        (lambda completions, **_: [1.0], "returned 1 values for 8 answers"),
        (lambda completions, **_: ["good"] * len(completions), "no number"),
        (lambda completions, **_: [None] * len(completions), "returned None for all"),
    ],
)
def test_rewards_that_are_none(reward: Any, said: str, tokenizer: Any, tmp_path: Path) -> None:
    settings = {"max_completion_length": 8, "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 1}
    trainer = GRPOTrainer(byte_model(torch.float32), reward, GRPOConfig(str(tmp_path), **settings, **QUIET), PROMPTS,
                          processing_class=tokenizer)  # fmt: skip
    with pytest.raises(InputError, match=said):
        trainer.train()


def test_equal_rewards_teach_nothing_and_are_told(tokenizer: Any, tmp_path: Path) -> None:
    settings = {"max_completion_length": 8, "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 1}
    trainer = GRPOTrainer(byte_model(torch.float32), lambda completions, **_: [0.3] * len(completions),
                          GRPOConfig(str(tmp_path), **settings, **QUIET), PROMPTS,
                          processing_class=tokenizer)  # fmt: skip
    before = torch.cat([p.flatten() for p in trainer.network.parameters()]).clone()
    with pytest.warns(UserWarning, match="nothing is learnt"):
        trainer.train()
    assert bool((torch.cat([p.flatten() for p in trainer.network.parameters()]) == before).all())
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 1


def test_columns_reach_the_reward_and_answers_without_a_score_do_not_count(tokenizer: Any, tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(prompts: list[Any], completions: list[Any], level: list[int]) -> list[float | None]:
        seen.extend(zip(prompts, completions, level, strict=True))
        return [None if i % 4 == 0 else float(i) for i in range(len(level))]

    rows = [{"prompt": [{"role": "user", "content": f"say {i}"}], "level": i} for i in range(2)]
    config = GRPOConfig(str(tmp_path), max_completion_length=6, per_device_train_batch_size=8, num_generations=4,
                        max_steps=1, **QUIET)  # fmt: skip
    trainer = GRPOTrainer(byte_model(torch.float32), reward, config, rows, processing_class=tokenizer)
    trainer.train()
    assert {(p[0]["content"], level) for p, _, level in seen} == {("say 0", 0), ("say 1", 1)}
    assert all(c[0]["role"] == "assistant" for _, c, _ in seen)
    counts = [item.counts for item in trainer._made(0).items]
    assert counts == [0.0, 1.0, 1.0, 1.0] * 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_generations": 3}, "does not divide"),
        ({"num_generations": 1}, "at least 2"),
        ({"loss_type": "bnpo"}, "use dapo"),
        ({"temperature": 0.0}, "above 0"),
        ({"repetition_penalty": 1.2}, "leave it out"),
        ({"max_completion_length": 60}, "prompt of row"),
        ({"scale_rewards": "all"}, "one of group"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], said: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        made("grpo", tmp_path, tokenizer, **changes)


def test_held_out_prompts_are_measured(tokenizer: Any, tmp_path: Path) -> None:
    trainer = made("grpo", tmp_path, tokenizer, eval_strategy="steps", eval_steps=2, max_steps=2, beta=0.1,
                   eval_dataset=PROMPTS[:2])  # fmt: skip
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "eval_reward" in e)
    assert {"eval_reward_error", "eval_objective/kl", "eval_completions/mean_length"} <= set(entry)
    assert json.dumps(entry)


def test_a_critic_needs_what_it_is_made_of() -> None:
    with pytest.raises(InputError, match="needs an adapter"):
        Critic("adapter", byte_model(), None, None)
    with pytest.raises(InputError, match="one of shared"):
        Critic("none", byte_model())  # type: ignore[arg-type]
