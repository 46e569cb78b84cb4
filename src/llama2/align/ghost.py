"""Ghost Attention (Llama 2, section 3.3): dialogues that obey their first turn, as rows to tune on.

An instruction is said on every turn while answers are sampled, and on the first one only in the row. Only the last
answer is learnt. Of K answers the one is kept that obeys, as a program checks; else the one that a reward prefers.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama2.align.instructions import POOL, Instruction, Order, drawn, pool_of
from llama2.align.prompts import PromptRow
from llama2.align.rewards import Source
from llama2.align.rollout import Rollout, RolloutSampler, seed_of
from llama2.align.synthesis import Synthesis, SynthesisPlan, said
from llama2.errors import InputError
from llama2.train.data import Row, read
from llama2.train.shapes import messages_of, string

Messages = list[dict[str, Any]]
_COLUMNS = ("messages", "conversations", "conversation", "prompt")


@dataclass(frozen=True, kw_only=True)
class GhostPlan(SynthesisPlan):
    """turns: of each dialogue; a row with fewer is filled up with those of others. combine: instructions at once, at
    most. plain: share of dialogues whose earlier answers are sampled without the instruction, so that the last one has
    to read the first turn. instructions: a file of rows {text, short, category, check}. reward: prefers among answers
    that no program tells apart. max_length: tokens of a row. measure: the instruction is said on the first turn alone,
    as in use, and one answer is drawn of each turn: how long it is obeyed, not what is to be learnt."""

    turns: int = 4
    combine: int = 2
    plain: float = 0.0
    instructions: str | None = None
    reward: str | None = None
    max_length: int | None = None
    measure: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.measure and self.count != 1:
            raise InputError(f"k is {self.count}, and to measure one answer is drawn of each turn; give 1")
        if self.turns < 1:
            raise InputError(f"turns is {self.turns}; a dialogue has at least 1")
        if self.combine < 1:
            raise InputError(f"combine is {self.combine}; a dialogue has at least 1 instruction")
        if not 0 <= self.plain <= 1:
            raise InputError(f"plain is {self.plain}; it is a share of the dialogues, 0 to 1")


@dataclass
class Talk:
    """A dialogue in the making: what the user says, the instruction, and what was answered. everywhere: whether the
    answer that comes is sampled with the instruction on every turn; else it stands on the first one, or where `silent`
    nowhere."""

    number: int
    users: list[str]
    order: Order
    answers: list[str]

    def messages(self, everywhere: bool, silent: bool = False) -> Messages:
        """Up to the next turn of the user."""
        made: Messages = []
        for i, user in enumerate(self.users[: len(self.answers) + 1]):
            told = not silent and (everywhere or i == 0)
            made.append({"role": "user", "content": f"{self.order.text}\n\n{user}" if told else user})
            if i < len(self.answers):
                made.append({"role": "assistant", "content": self.answers[i]})
        return made


class Ghost(Synthesis):
    """The job of `llama2 align ghost`."""

    plan: GhostPlan

    def __init__(self, plan: GhostPlan, resume: bool = False) -> None:
        """As Synthesis."""
        super().__init__(plan, resume)
        self.pool: Sequence[Instruction] = POOL if plan.instructions is None else pool_of(read(plan.instructions))
        self.users = [_users(number, row) for number, row in enumerate(self.prompts)]
        self.longest = self.context if plan.max_length is None else min(plan.max_length, self.context)
        self._reward: Source | None = None
        if plan.measure and not any(one.check for one in self.pool):
            raise InputError("no instruction has a check, so nothing can be measured; give some that a program checks")

    def settings(self) -> dict[str, Any]:
        """As Synthesis.settings."""
        return {"pool": [vars(one) for one in self.pool]}

    def begin(self) -> None:
        """As Synthesis.begin."""
        self._reward = None if self.plan.reward is None else self.reward(self.plan.reward)

    def talk(self, number: int) -> Talk:
        """A dialogue before its first answer."""
        pool = [one for one in self.pool if one.check] if self.plan.measure else self.pool
        users, dice = list(self.users[number]), random.Random(f"{self.plan.seed}/turns/{number}")
        others = [user for i, said in enumerate(self.users) if i != number for user in said]
        while len(users) < self.plan.turns and others:
            users.append(others.pop(dice.randrange(len(others))))
        order = drawn(pool, self.plan.combine, f"{self.plan.seed}/instruction/{number}")
        return Talk(number, users[: self.plan.turns], order, [])

    def made(self, sampler: RolloutSampler, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """As Synthesis.made: dialogues, turn by turn."""
        plan, talks = self.plan, [self.talk(number) for number in numbers]
        plains = [random.Random(f"{plan.seed}/plain/{n}").random() < plan.plain for n in numbers]
        obeyed: list[list[bool | None]] = [[] for _ in talks]
        ended = [False] * len(talks)
        while open_talks := [(i, talk) for i, talk in enumerate(talks) if len(talk.answers) < len(talk.users)]:
            last = {i: len(talk.answers) == len(talk.users) - 1 for i, talk in open_talks}
            silent = {i: plains[i] and not last[i] for i in last}
            asked = [
                fitted(talk.messages(not plan.measure, silent[i]), self.tokenizer, self.room) for i, talk in open_talks
            ]
            seeds = [[seed_of(plan.seed, "ghost", talk.number, len(talk.answers), k) for k in range(plan.count)]
                     for _, talk in open_talks]  # fmt: skip
            groups = sampler([(talk.number, ids(one, self.tokenizer)) for (_, talk), one in
                              zip(open_talks, asked, strict=True)], seeds)  # fmt: skip
            for (i, talk), messages, group in zip(open_talks, asked, groups, strict=True):
                best = self._best(talk, messages, group)
                talk.answers.append(said(best))
                obeyed[i].append(talk.order.obeyed(said(best)))
                ended[i] = best.ended
        return [
            {"number": talk.number, "users": talk.users, "instruction": talk.order.text, "checks": talk.order.checks,
             "shortened": talk.order.shortened, "plain": plain, "answers": talk.answers, "obeyed": found, "ended": end}
            for talk, plain, found, end in zip(talks, plains, obeyed, ended, strict=True)
        ]  # fmt: skip

    def _best(self, talk: Talk, messages: Messages, group: Sequence[Rollout]) -> Rollout:
        ended = [answer for answer in group if answer.ended and said(answer)] or list(group)
        right = [answer for answer in ended if talk.order.obeyed(said(answer))] or ended
        if self._reward is None or len(right) == 1:
            return right[0]
        prompts = [PromptRow(list(answer.prompt_ids), messages, False, {}) for answer in right]
        scores = self._reward(prompts, right)
        return right[max(range(len(right)), key=lambda i: scores[i])]

    def written(self, lines: Sequence[dict[str, Any]]) -> tuple[list[Row], dict[str, Any], list[str]]:
        """As Synthesis.written: dialogues whose last answer obeys, or cannot be checked; to measure, all of them."""
        if self.plan.measure:
            return self._measured(lines)
        rows: list[Row] = []
        refused = empty = cut = endless = 0
        for line in lines:
            if line["obeyed"][-1] is False:
                refused += 1
                continue
            if not line["ended"]:  # its end would be learnt where the answer was cut off
                endless += 1
                continue
            if not all(line["answers"]):
                empty += 1
                continue
            row, dropped = self._row(line)
            rows.append(row)
            cut += dropped > 0
        shares = _shares(lines)
        values = {"dialogues": len(lines), "disobeyed": refused, "empty": empty, "endless": endless, "cut": cut,
                  "obeyed": shares, "checked": sum(bool(line["checks"]) for line in lines)}  # fmt: skip
        texts = [f"{len(rows):,} rows of {len(lines):,} dialogues, {values['checked']:,} with an instruction that a "
                 "program checks"]  # fmt: skip
        told = {"left out, for the last answer disobeys": refused, "left out, for an answer is empty": empty,
                "left out, for the last answer does not end (--max-new-tokens)": endless,
                "without some of their middle turns, to fit": cut}  # fmt: skip
        texts += [f"{count:,} dialogues {why}" for why, count in told.items() if count]
        return rows, values, texts + _told(shares)

    def _measured(self, lines: Sequence[dict[str, Any]]) -> tuple[list[Row], dict[str, Any], list[str]]:
        shares = _shares(lines)
        rows: list[Row] = [
            {"messages": self._row(line)[0]["messages"], "instruction": line["instruction"], "obeyed": line["obeyed"]}
            for line in lines
        ]
        values = {"dialogues": len(lines), "obeyed": shares}
        return rows, values, [f"{len(lines):,} dialogues", *_told(shares)]

    def _row(self, line: dict[str, Any]) -> tuple[Row, int]:
        """The row, and how many turns had to go: the instruction on the first turn, the last answer alone learnt."""
        messages: Messages = []
        for i, (user, answer) in enumerate(zip(line["users"], line["answers"], strict=True)):
            told = f"{line['instruction']}\n\n{user}" if i == 0 else user
            messages += [{"role": "user", "content": told}, {"role": "assistant", "content": answer, "weight": 0}]
        del messages[-1]["weight"]
        kept = fitted(messages, self.tokenizer, self.longest)
        lineage = {"model": self.plan.policy, "seed": self.plan.seed, "number": line["number"],
                   "temperature": self.plan.temperature, "checks": line["checks"], "plain": line["plain"]}  # fmt: skip
        return {"messages": kept, "instruction": line["instruction"], "lineage": lineage}, len(messages) - len(kept)


def _shares(lines: Sequence[dict[str, Any]]) -> dict[int, float | None]:
    """Of the dialogues that a program checks the share that obeys, by turn."""
    shares: dict[int, float | None] = {}
    for turn in range(max(len(line["answers"]) for line in lines)):
        known = [line["obeyed"][turn] for line in lines if len(line["obeyed"]) > turn]
        checked = [one for one in known if one is not None]
        shares[turn + 1] = sum(checked) / len(checked) if checked else None
    return shares


def _told(shares: dict[int, float | None]) -> list[str]:
    return [f"turn {turn}: {share:.1%} obey" for turn, share in shares.items() if share is not None]


def ids(messages: Messages, tokenizer: Any) -> list[int]:
    """A dialogue as the model reads it: before an answer, or with the last one."""
    bare = [{"role": one["role"], "content": one["content"]} for one in messages]
    ends = bare[-1]["role"] != "assistant"
    encoded = tokenizer.apply_chat_template(bare, add_generation_prompt=ends, return_dict=True)
    return list(encoded["input_ids"])


def fitted(messages: Messages, tokenizer: Any, room: int) -> Messages:
    """The dialogue within `room` tokens: turns behind the first are left out whole, the oldest first; never the first
    turn, nor the last. Raises InputError where these alone do not fit."""
    kept = list(messages)
    tail = 2 if kept[-1]["role"] == "assistant" else 1  # messages of the last turn
    while len(found := ids(kept, tokenizer)) > room:
        if len(kept) < 4 + tail:
            raise InputError(
                f"the first and the last turn of a dialogue have {len(found)} tokens, and {room} fit; shorten the "
                f"prompts, the instruction or the answers (first words: {kept[0]['content'][:60]!r})"
            )
        del kept[2:4]
    return kept


def _users(number: int, row: Row) -> list[str]:
    """Returns the user's messages in a row {"messages"} or {"prompt"}."""
    name = next((name for name in _COLUMNS if row.get(name) is not None), None)
    if name is None:
        raise InputError(f"row {number} has no messages and no prompt; its columns are {', '.join(map(str, row))}")
    if name == "prompt" and isinstance(row[name], str):
        return [string(row[name], name)]
    try:
        found = [one["content"] for one in messages_of(row[name], name) if one["role"] == "user"]
    except InputError as error:
        raise InputError(f"row {number}: {error}") from error
    if not found:
        raise InputError(f"row {number} has no turn of a user; give dialogues, or prompts")
    return found
