"""Safety context distillation (Llama 2, section 4.2): answers given under a pre-prompt, learnt without it.

Each prompt is answered as it is, and behind a pre-prompt: adjectives, or the template of its risk category. The second
answer becomes a row only where the safety model scores it above the first, both without the pre-prompt.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama2.align.ghost import ids
from llama2.align.prompts import PromptRow, prompts_of
from llama2.align.rewards import Source
from llama2.align.rollout import Rollout, RolloutSampler, seed_of
from llama2.align.synthesis import Synthesis, SynthesisPlan, said
from llama2.errors import InputError
from llama2.train.data import Row, read

ADJECTIVES = ("responsible", "respectful", "wise", "careful", "honest", "thoughtful", "kind", "prudent", "considerate",
              "safe")  # fmt: skip
CATEGORY = "category"  # the column of a prompt's risk
TEMPLATES = {
    "illegal": "Do not help with anything against the law. Say so briefly, say what harm it does, and name a lawful "
    "way to what the user may need.",
    "hateful": "Do not demean anyone. Say that briefly, without a lecture, and offer a view that respects all people.",
    "unqualified": "Do not give advice that only an expert may give. Say what is generally known, say that it is no "
    "advice, and name whom to ask.",
}
_ALL_LOVED, _NONE_LOVED = 0.9, 0.1  # kept shares beyond which something is wrong


@dataclass(frozen=True, kw_only=True)
class DistilPlan(SynthesisPlan):
    """safety: the reward that decides. margin: by how many standard deviations of the first answers' scores the second
    has to be better. reward: of helpfulness, by which the second answer may be at most `loss` deviations worse.
    templates: a file of rows {category, text}, besides or in place of those here."""

    safety: str
    reward: str | None = None
    margin: float = 0.0
    loss: float = 1.0
    templates: str | None = None
    count: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("margin", "loss"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}; it must be 0 or a positive number")


class Distillation(Synthesis):
    """The job of `llama2 align distil`."""

    plan: DistilPlan

    def __init__(self, plan: DistilPlan, resume: bool = False) -> None:
        """As Synthesis. Raises InputError for a prompt that does not fit, and for a category without a template."""
        super().__init__(plan, resume)
        self.templates = dict(TEMPLATES)
        if plan.templates is not None:
            self.templates |= _templates(read(plan.templates))
        self.asked, report = prompts_of(self.prompts, self.tokenizer, self.room, chat=True)
        if report.problems:
            number, why = next(iter(report.problems.items()))
            raise InputError(f"row {number} of {plan.prompts}: {why}")
        self.categories = [row.get(CATEGORY) for row in self.prompts]
        for number, category in enumerate(self.categories):
            if category is not None and category not in self.templates:
                raise InputError(
                    f"row {number} has the {CATEGORY} {category!r}, for which there is no template; there are "
                    f"{', '.join(self.templates)} (--templates adds some)"
                )
            self._asked_under(number)
        self._safety: Source | None = None
        self._helpful: Source | None = None

    def begin(self) -> None:
        """As Synthesis.begin."""
        self._safety = self.reward(self.plan.safety)
        self._helpful = None if self.plan.reward is None else self.reward(self.plan.reward)

    def settings(self) -> dict[str, Any]:
        """As Synthesis.settings."""
        return {"texts": self.templates}

    def preprompt(self, number: int) -> str:
        """Returns the text in front of a prompt: the template of its category, or two or three adjectives."""
        category = self.categories[number]
        dice = random.Random(f"{self.plan.seed}/adjectives/{number}")
        chosen = dice.sample(ADJECTIVES, dice.choice((2, 3)))
        told = f"You are a {', '.join(chosen[:-1])} and {chosen[-1]} assistant."
        return told if category is None else f"{told} {self.templates[category]}"

    def _asked_under(self, number: int) -> list[int]:
        """The prompt behind its pre-prompt, which is put into the first turn, as every template knows one."""
        content = self.asked[number].content
        assert not isinstance(content, str)
        first = next(i for i, message in enumerate(content) if message["role"] == "user")
        told = {**content[first], "content": f"{self.preprompt(number)}\n\n{content[first]['content']}"}
        found = ids([*content[:first], told, *content[first + 1 :]], self.tokenizer)
        if len(found) > self.room:
            raise InputError(
                f"row {number} has {len(found)} tokens with its pre-prompt, and the context leaves {self.room} beside "
                "the answer; shorten it, or lower max_new_tokens"
            )
        return found

    def made(self, sampler: RolloutSampler, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """As Synthesis.made: both answers of each prompt, and their scores."""
        plan = self.plan

        def seeds(name: str) -> list[list[int]]:
            return [[seed_of(plan.seed, name, number, k) for k in range(plan.count)] for number in numbers]

        plain = sampler([(n, self.asked[n].ids) for n in numbers], seeds("plain"))
        under = sampler([(n, self._asked_under(n)) for n in numbers], seeds("under"))
        lines = []
        for number, before, after in zip(numbers, plain, under, strict=True):
            prompt = self.asked[number]
            scores = [self._scores(prompt, group) for group in (before, after)]
            best = max(range(len(after)), key=lambda i: scores[1][i]["safety"])
            lines.append(
                {"number": number, CATEGORY: self.categories[number], "preprompt": self.preprompt(number),
                 "plain": said(before[0]), "answer": said(after[best]), "ended": after[best].ended,
                 "before": scores[0][0], "after": scores[1][best]}
            )  # fmt: skip
        return lines

    def _scores(self, prompt: PromptRow, answers: Sequence[Rollout]) -> list[dict[str, float]]:
        assert self._safety is not None
        prompts = [prompt] * len(answers)
        found = [{"safety": score} for score in self._safety(prompts, answers)]
        if self._helpful is not None:
            for one, score in zip(found, self._helpful(prompts, answers), strict=True):
                one["helpful"] = score
        return found

    def written(self, lines: Sequence[dict[str, Any]]) -> tuple[list[Row], dict[str, Any], list[str]]:
        """As Synthesis.written."""
        spread = {name: _deviation([line["before"][name] for line in lines]) for name in lines[0]["before"]}
        rows: list[Row] = []
        seen, kept = Counter[str](), Counter[str]()
        for line in lines:
            category = str(line[CATEGORY] or "none")
            seen[category] += 1
            if not self._better(line, spread):
                continue
            kept[category] += 1
            content = self.asked[line["number"]].content
            assert not isinstance(content, str)
            lineage = {"model": self.plan.policy, "seed": self.plan.seed, "number": line["number"],
                       "before": line["before"], "after": line["after"], "preprompt": line["preprompt"]}  # fmt: skip
            answer = {"role": "assistant", "content": line["answer"]}
            rows.append({"messages": [*content, answer], CATEGORY: line[CATEGORY], "lineage": lineage})
        shares = {category: kept[category] / count for category, count in seen.items()}
        lengths = {name: sum(len(line[name]) for line in lines) / len(lines) for name in ("plain", "answer")}
        texts = [f"{len(rows):,} rows of {len(lines):,} prompts: the answer under a pre-prompt is the safer one"]
        texts += [f"{category}: {share:.1%} of {seen[category]:,} kept" for category, share in shares.items()]
        texts.append(f"{lengths['plain']:.0f} characters of an answer before, {lengths['answer']:.0f} after")
        if (whole := len(rows) / len(lines)) > _ALL_LOVED:
            texts.append("nearly all are kept: the safety model may prefer refusals whatever is asked")
        elif whole < _NONE_LOVED:
            texts.append("hardly any is kept: the pre-prompt changes little, or the answers are safe already")
        return rows, {"kept": shares, "characters": lengths, "deviation": spread}, texts

    def _better(self, line: dict[str, Any], spread: dict[str, float]) -> bool:
        before, after = line["before"], line["after"]
        safer = after["safety"] > before["safety"] + self.plan.margin * spread["safety"]
        helpful = "helpful" not in after or after["helpful"] >= before["helpful"] - self.plan.loss * spread["helpful"]
        return bool(safer and helpful and line["ended"] and line["answer"])


def _deviation(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return float((sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5)


def _templates(rows: Sequence[Row]) -> dict[str, str]:
    found = {}
    for number, row in enumerate(rows):
        if not isinstance(row.get(CATEGORY), str) or not isinstance(row.get("text"), str) or not row["text"]:
            raise InputError(f"template {number} needs {CATEGORY} and text, both texts")
        found[row[CATEGORY]] = row["text"]
    return found
