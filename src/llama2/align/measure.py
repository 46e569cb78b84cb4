"""Evaluation of a policy on held-out prompts: its rewards, how often it wins against another model, and the KL to it.

OUT/samples.jsonl   the answers of both with their rewards, a line per prompt; a resumed run goes on behind them
OUT/rows.jsonl      each answer of the policy with its rewards
OUT/report.json     means, with standard errors over prompts, since answers to one prompt are no independent draws
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llama2.align.policy import Item, PolicyGradient
from llama2.align.prompts import prompts_of
from llama2.align.rewards import Source
from llama2.align.rollout import Rollout, RolloutSampler, resting, seed_of
from llama2.align.synthesis import Synthesis, SynthesisPlan, said
from llama2.auto import AutoModelForCausalLM
from llama2.errors import InputError
from llama2.evaluate.statistics import mean
from llama2.train.data import Row
from llama2.train.fused_layer import fused

_AT_ONCE = 16  # answers of a forward pass


@dataclass(frozen=True, kw_only=True)
class MeasurePlan(SynthesisPlan):
    """count: answers of each prompt. rewards: what each answer is judged by, each on its own. against: a model whose
    answers to the same prompts it is compared with, and which the KL is measured to. chat: prompts that are texts are
    what a user says."""

    rewards: tuple[str, ...]
    against: str | None = None
    chat: bool = False
    count: int = 4
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rewards:
            raise InputError("there is no reward; give one (--reward: a reward model, module:function, or an URL)")
        if len(set(self.rewards)) < len(self.rewards):
            raise InputError(f"a reward is given twice: {', '.join(self.rewards)}; give each once")


class Measurement(Synthesis):
    """The job of `llama2 align measure`."""

    plan: MeasurePlan
    CHATS_ALONE = False

    def __init__(self, plan: MeasurePlan, resume: bool = False) -> None:
        """As Synthesis. Raises InputError for a row that is no prompt, or does not fit."""
        super().__init__(plan, resume)
        self.asked, report = prompts_of(self.prompts, self.tokenizer, self.room, chat=plan.chat)
        if report.problems:
            number, why = next(iter(report.problems.items()))
            raise InputError(f"row {number} of {plan.prompts}: {why}")
        self._sources: dict[str, Source] = {}
        self._other: RolloutSampler | None = None

    def begin(self) -> None:
        """As Synthesis.begin."""
        plan = self.plan
        self._sources = {name: self.reward(name) for name in plan.rewards}
        if plan.against is None:
            return
        model = AutoModelForCausalLM.from_pretrained(plan.against, dtype=plan.dtype, device_map=self.device)
        if model.config.vocab_size != self.config.vocab_size:
            raise InputError(
                f"{plan.against} has {model.config.vocab_size:,} tokens and {plan.policy} {self.config.vocab_size:,}; "
                "compare models of one vocabulary"
            )
        self._other = RolloutSampler(model.requires_grad_(False), self.tokenizer, plan.sampling(), self.ranks)

    def made(self, sampler: RolloutSampler, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """As Synthesis.made: answers, their rewards, and where there is another model its answers and the KL."""
        mine = self._judged(sampler, numbers)
        lines: list[dict[str, Any]] = [{"number": n, "prompt": self.asked[n].content, "answers": own}
                 for n, (_, own) in zip(numbers, mine, strict=True)]  # fmt: skip
        if self._other is None:
            return lines
        theirs = self._judged(self._other, numbers)
        away = self.ranks.joined(lambda: self._away(sampler.model, self.ranks.share([group for group, _ in mine])))
        for line, (_, other), kls in zip(lines, theirs, away, strict=True):
            line["against"] = other
            for answer, kl in zip(line["answers"], kls, strict=True):
                answer["kl"] = kl
        return lines

    def _judged(
        self, sampler: RolloutSampler, numbers: Sequence[int]
    ) -> list[tuple[list[Rollout], list[dict[str, Any]]]]:
        """For each prompt the answers, and what is told of each."""
        seeds = [[seed_of(self.plan.seed, "measure", n, k) for k in range(self.plan.count)] for n in numbers]
        groups = sampler([(n, self.asked[n].ids) for n in numbers], seeds)
        flat = [answer for group in groups for answer in group]
        rewards = {name: source([self.asked[a.row] for a in flat], flat) for name, source in self._sources.items()}
        told = [
            {"text": said(a), "tokens": len(a.ids), "ended": a.ended,
             "rewards": {name: None if math.isnan(found[i]) else found[i] for name, found in rewards.items()}}
            for i, a in enumerate(flat)
        ]  # fmt: skip
        rest = iter(told)
        return [(group, [next(rest) for _ in group]) for group in groups]

    @torch.no_grad()
    def _away(self, model: Any, groups: Sequence[Sequence[Rollout]]) -> list[list[float]]:
        """log p - log p of the other model of each whole answer: its mean is the KL in nats."""
        assert self._other is not None
        objective = PolicyGradient(temperature=self.plan.temperature)
        flat = [Item(a.prompt_ids, a.ids, torch.zeros(len(a.ids))) for group in groups for a in group]
        sums = []
        for one in (model, self._other.model):
            found: list[float] = []
            with resting(one), fused(one):
                for start in range(0, len(flat), _AT_ONCE):
                    part = flat[start : start + _AT_ONCE]
                    batch = objective.collate(part)
                    batch = {k: v.to(one.device) if torch.is_tensor(v) else v for k, v in batch.items()}
                    logs = objective.log_probs(one, batch)[0].double().split([len(item.ids) for item in part])
                    found += [float(log.sum()) for log in logs]
            sums.append(found)
        rest = iter(mine - theirs for mine, theirs in zip(*sums, strict=True))
        return [[next(rest) for _ in group] for group in groups]

    def written(self, lines: Sequence[dict[str, Any]]) -> tuple[list[Row], dict[str, Any], list[str]]:
        """As Synthesis.written."""
        rows: list[Row] = [
            {**self.asked[line["number"]].answered(answer["text"]), "rewards": answer["rewards"]}
            for line in lines
            for answer in line["answers"]
        ]
        every = [answer for line in lines for answer in line["answers"]]
        values: dict[str, Any] = {
            "prompts": len(lines),
            "answers": len(every),
            "rewards": {name: self._worth(name, lines) for name in self.plan.rewards},
            "mean_tokens": sum(answer["tokens"] for answer in every) / len(every),
            "ended": sum(answer["ended"] for answer in every) / len(every),
        }
        if "kl" in every[0]:
            values["kl"] = mean_error([[answer["kl"] for answer in line["answers"]] for line in lines])
        texts = [f"{len(every):,} answers to {len(lines):,} prompts, {values['mean_tokens']:.1f} tokens each, "
                 f"{values['ended']:.1%} end"]  # fmt: skip
        for name, found in values["rewards"].items():
            won = f", wins {found['wins']['mean']:.1%} +- {found['wins']['error']:.1%}" if "wins" in found else ""
            texts.append(f"{name}: {found['mean']:.4f} +- {found['error']:.4f}{won}")
        if "kl" in values:
            texts.append(f"KL to {self.plan.against}: {values['kl']['mean']:.3f} +- {values['kl']['error']:.3f} nats")
        return rows, values, texts

    def _worth(self, name: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The mean of a reward with its error, and how often an answer beats the other model's, a tie counting half."""
        mine = [[answer["rewards"][name] for answer in line["answers"]] for line in lines]
        found: dict[str, Any] = mean_error(mine)
        if "against" in lines[0]:
            theirs = [[answer["rewards"][name] for answer in line["against"]] for line in lines]
            found["wins"] = mean_error(
                [[None if a is None or b is None else (a > b) + 0.5 * (a == b) for a, b in zip(*both, strict=True)]
                 for both in zip(mine, theirs, strict=True)]
            )  # fmt: skip
        return found


def mean_error(groups: Sequence[Sequence[float | None]]) -> dict[str, float]:
    """{"mean", "error"}: the mean over prompts of the mean of their values, and its standard error over prompts; a
    None does not count. Raises InputError where there is no value at all."""
    held = [[value for value in group if value is not None] for group in groups]
    means = [sum(group) / len(group) for group in held if group]
    if not means:
        raise InputError("no answer has a reward: the reward functions returned None for all")
    found = mean(means)
    return {"mean": found.value, "error": found.error or 0.0}
