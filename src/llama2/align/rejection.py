"""Rejection sampling (Llama 2, section 3.2.3): K answers to each prompt, the best of them as rows to tune on.

OUT/samples.jsonl   every answer with its seed and scores, a line per prompt; a resumed run goes on behind them
OUT/rows.jsonl      the best answer of each prompt with its lineage, as `finetune sft` takes them
OUT/rejection.json  the report; OUT/best-of-n.svg  the reward of the best of N answers
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llama2.align.best_of import curve, divergence
from llama2.align.prompts import PromptRow, prompts_of
from llama2.align.rewards import Judge, check_rewards, source_of
from llama2.align.rollout import Rollout, RolloutSampler, RolloutSettings, seed_of
from llama2.auto import AutoModelForCausalLM, AutoTokenizer, load_config
from llama2.checkpoint.source import revision_of
from llama2.errors import CheckpointError, InputError
from llama2.files import grown, locked, replacing, saving, sync, write_text
from llama2.train.chart import chart
from llama2.train.data import DataReport, read, renamed
from llama2.train.distributed import join
from llama2.train.origin import check_place
from llama2.train.saving import digest

SAMPLES, SWEEP, ROWS, REPORT, CHART = "samples.jsonl", "sweep.jsonl", "rows.jsonl", "rejection.json", "best-of-n.svg"
_TOGETHER = 8  # prompts that are sampled at once; what is written is whole prompts


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round. policy: a model or an adapter. count: answers of each prompt. temperatures: one, or several of which
    the one with the greatest best-of-`count` on `sweep_prompts` prompts is taken. pool: folders of earlier rounds,
    whose best rows are scored anew and stand for election. drop_equal: leave out prompts all of whose answers
    are worth the same."""

    policy: str
    prompts: str
    output_dir: str
    rewards: tuple[str, ...]
    safety: str | None = None
    safety_threshold: float = 0.15
    count: int = 8
    temperatures: tuple[float, ...] = (1.0,)
    sweep_prompts: int = 50
    top_p: float = 1.0
    max_new_tokens: int = 256
    max_prompt_length: int | None = None
    pool: tuple[str, ...] = ()
    drop_equal: bool = False
    seed: int = 42
    chat: bool = False
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"k is {self.count}; sample at least 1 answer of each prompt")
        if not self.rewards:
            raise InputError("there is no reward; give one (--reward: a reward model, module:function, or an URL)")
        if not self.temperatures:
            raise InputError("there is no temperature; give one, or several with commas")
        if self.sweep_prompts < 1:
            raise InputError(f"sweep_prompts is {self.sweep_prompts}; give at least 1")
        for temperature in self.temperatures:
            self.sampling(temperature)
        for folder in self.pool:
            if not (Path(folder) / ROWS).is_file():
                raise InputError(f"{folder} has no {ROWS}; --pool takes folders of earlier rounds")

    def sampling(self, temperature: float) -> RolloutSettings:
        """How answers are drawn at a temperature."""
        return RolloutSettings(temperature=temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens)


@dataclass
class RoundOutcome:
    """The result of a round, as rejection.json stores it. best_of: N -> mean reward and standard error over prompts;
    sweep: the same by temperature."""

    finished: bool
    prompts: int
    rows: int
    temperature: float
    mean: float
    best_of: dict[int, tuple[float, float]]
    kl_bound: float
    distinct: float  # different answers of a prompt, on average
    ended: float  # share of answers with an end token
    equal: int  # prompts all of whose answers are worth the same
    unsafe: int  # prompts whose best answer is unsafe, which are left out
    pooled: int  # rows that are of an earlier round
    sweep: dict[float, dict[int, tuple[float, float]]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report for people."""
        found = [f"{self.rows:,} rows of {self.prompts:,} prompts, at temperature {self.temperature:g}"]
        for n, (mean, error) in self.best_of.items():
            if n & (n - 1) == 0 or n == len(self.best_of):
                found.append(f"best of {n}: reward {mean:.4f} +- {error:.4f}, KL at most {divergence(n):.3f} nats")
        found.append(f"{self.distinct:.2f} different answers of a prompt, {self.ended:.1%} of answers end")
        told = {
            "whose answers are all worth the same": self.equal,
            "left out, for their best answer is unsafe": self.unsafe,
            "whose best answer is of an earlier round": self.pooled,
        }
        return found + [f"{count:,} prompts {said}" for said, count in told.items() if count]


class Rejection:
    """One job. Prompts are read and checked when it is made; models are loaded by `run`."""

    def __init__(self, round: Round, resume: bool = False, tell: Callable[[str], None] | None = None) -> None:
        """tell: receives the findings on the rows. Raises InputError for whatever is known to be wrong before a model
        is loaded."""
        self.round, self.folder, self.ranks, self.resume = round, Path(round.output_dir), join(), resume
        self.device = self.ranks.device(round.device)
        self._check_folder()
        self.hub: dict[str, Any] = {**revision_of(round.policy, round.revision)}
        self.tokenizer: Any = AutoTokenizer.from_pretrained(round.policy, **self.hub)
        check_rewards([*round.rewards, *([] if round.safety is None else [round.safety])], self.tokenizer)
        self.prompts, self.report = self._prompts()
        if tell is not None and self.ranks.first:
            tell(self.report.text())

    def _check_folder(self) -> None:
        check_place(self.folder)
        if Path(self.round.policy).exists() and Path(self.round.policy).resolve() == self.folder.resolve():
            raise InputError(f"{self.folder} is the policy itself; give a new folder")
        held = [name for name in (SAMPLES, SWEEP, ROWS, REPORT) if (self.folder / name).exists()]
        if held and not self.resume:
            raise InputError(f"{self.folder} holds {held[0]} of an earlier round; go on with --resume, or give another")

    def _prompts(self) -> tuple[list[PromptRow], DataReport]:
        rows = renamed(read(self.round.prompts), dict(self.round.columns))
        config = load_config(self.round.policy, **self.hub)
        room = config.max_position_embeddings - self.round.max_new_tokens
        made, report = prompts_of(rows, self.tokenizer, room, self.round.max_prompt_length, self.round.chat)
        if not made:
            raise InputError(f"no row of {self.round.prompts} can be used. {report.text()}")
        return made, report

    # -- the round -----------------------------------------------------------------------------------------------

    def run(self, report: Callable[[int, int], None] | None = None) -> RoundOutcome:
        """Samples, scores and writes. report: receives how many prompts are done, of how many.

        Raises InputError where a reward cannot be had; what was sampled before is kept, and `resume` goes on behind it.
        """
        if self.ranks.first:
            with locked(self.folder):
                return self._run(report)
        return self._run(None)

    def trial(self) -> tuple[Callable[[], object], int, int]:
        """For a rehearsal: what answers the first prompts, with models loaded now; how many it does, and of all."""
        model, judge = self._loaded()
        temperatures, rows = self.round.temperatures, len(self.prompts)
        part = next(_parts([(temperatures[0], row) for row in range(rows)]))
        swept = min(self.round.sweep_prompts, rows) * len(temperatures) if len(temperatures) > 1 else 0
        return lambda: self._answered(model, judge, part), len(part), rows + swept

    def _loaded(self) -> tuple[Any, Judge]:
        """The policy, and what judges it."""
        round, policy = self.round, str(self.device)
        judge = Judge(
            [source_of(one, self.tokenizer, policy) for one in round.rewards],
            (),
            None if round.safety is None else source_of(round.safety, self.tokenizer, policy),
            round.safety_threshold,
        )
        model = AutoModelForCausalLM.from_pretrained(
            round.policy, dtype=round.dtype, device_map=self.device, **self.hub
        )
        return model.requires_grad_(False), judge

    def _run(self, report: Callable[[int, int], None] | None) -> RoundOutcome:
        round, (model, judge) = self.round, self._loaded()
        sweep: dict[float, dict[int, tuple[float, float]]] = {}
        temperature = round.temperatures[0]
        if len(round.temperatures) > 1:
            sweep = self._swept(model, judge)
            temperature = max(sweep, key=lambda t: sweep[t][max(sweep[t])][0])
        groups = self._groups(model, judge, SAMPLES, range(len(self.prompts)), (temperature,), report)
        outcome = self._written(groups, judge, temperature)
        outcome.sweep = sweep
        self.ranks.broadcast(lambda: self._summarise(outcome, judge))
        return outcome

    def _swept(self, model: Any, judge: Judge) -> dict[float, dict[int, tuple[float, float]]]:
        rows = range(min(self.round.sweep_prompts, len(self.prompts)))
        groups = self._groups(model, judge, SWEEP, rows, self.round.temperatures, None)
        size = len(rows)
        parts = {t: groups[i * size : (i + 1) * size] for i, t in enumerate(self.round.temperatures)}
        return {t: curve([_scores(group) for group in part]) for t, part in parts.items()}

    def _groups(
        self, model: Any, judge: Judge, name: str, rows: range, temperatures: Sequence[float],
        report: Callable[[int, int], None] | None,
    ) -> list[list[Rollout]]:  # fmt: skip
        """The answers to prompts at temperatures, as far as they are not in the file already."""
        todo = [(temperature, row) for temperature in temperatures for row in rows]
        found, size = self.ranks.broadcast(lambda: self._held(name, temperatures, judge))
        if len(found) > len(todo):
            raise InputError(
                f"{self.folder / name} holds {len(found)} prompts, and there are {len(todo)}; give another folder"
            )
        file = grown(self.folder / name, size) if self.ranks.first else None
        try:
            if file is not None:
                file.seek(size)
            if file is not None and not size:
                file.write(_line({"settings": self._settings(temperatures, judge)}))
            for part in _parts(todo[len(found) :]):
                made = self._answered(model, judge, part)
                if file is not None:
                    file.writelines(
                        _line(_told(group, t, self.prompts[row])) for (t, row), group in zip(part, made, strict=True)
                    )
                    sync(file)
                found += made
                if report is not None:
                    report(len(found), len(todo))
        finally:
            if file is not None:
                file.close()
        return found

    def _answered(self, model: Any, judge: Judge, part: Sequence[tuple[float, int]]) -> list[list[Rollout]]:
        (temperature, _), *_ = part
        sampler = RolloutSampler(model, self.tokenizer, self.round.sampling(temperature), self.ranks)
        seeds = [[seed_of(self.round.seed, f"{t:g}", row, k) for k in range(self.round.count)] for t, row in part]
        groups = sampler([(row, self.prompts[row].ids) for _, row in part], seeds)

        def share() -> list[list[Rollout]]:
            mine = self.ranks.share(groups)
            flat = [answer for group in mine for answer in group]
            judge([self.prompts[answer.row] for answer in flat], flat)
            return mine

        return self.ranks.joined(share)

    # -- what was sampled before ---------------------------------------------------------------------------------

    def _settings(self, temperatures: Sequence[float], judge: Judge) -> dict[str, Any]:
        """Returns the settings on which samples depend."""
        round = self.round
        return {
            "policy": round.policy,
            "prompts": digest([prompt.ids for prompt in self.prompts]),
            "k": round.count,
            "temperatures": list(temperatures),
            "top_p": round.top_p,
            "max_new_tokens": round.max_new_tokens,
            "seed": round.seed,
            "rewards": judge.name,
        }

    def _held(self, name: str, temperatures: Sequence[float], judge: Judge) -> tuple[list[list[Rollout]], int]:
        """The groups of a file that was begun, and its size up to the last whole line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        if not path.exists():
            return [], 0
        data = path.read_bytes()
        size = data.rfind(b"\n") + 1
        lines = data[:size].splitlines()
        if not lines:
            return [], 0
        try:
            first, *rest = [json.loads(line) for line in lines]
            there = first["settings"]
            groups = [[_rollout(entry, line["row"]) for entry in line["answers"]] for line in rest]
        except (ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}); remove it, and its round begins anew") from error
        here = json.loads(json.dumps(self._settings(temperatures, judge)))
        if differ := [key for key in here if there.get(key) != here[key]]:
            raise InputError(
                f"{path} is of another round: it differs in {', '.join(differ)} ({there.get(differ[0])!r}, not "
                f"{here[differ[0]]!r}); give the same settings, or another folder"
            )
        return groups, size

    # -- the best ------------------------------------------------------------------------------------------------

    def _written(self, groups: Sequence[Sequence[Rollout]], judge: Judge, temperature: float) -> RoundOutcome:
        round, least = self.round, math.log(self.round.safety_threshold / (1 - self.round.safety_threshold))
        earlier = self.ranks.broadcast(lambda: self._pooled(judge))
        rows: list[dict[str, Any]] = []
        equal = unsafe = pooled = 0
        for group, prompt in zip(groups, self.prompts, strict=True):
            scores = _scores(group)
            candidates = [
                (a.score, _row(prompt, a, group, self._lineage(temperature, judge)))
                for a in group
                if not math.isnan(a.score)
            ]
            same = len(scores) > 1 and max(scores) == min(scores)
            equal += same
            if same and round.drop_equal:
                candidates = []
            before = earlier.get(_key(prompt), [])
            candidates += before
            if not candidates:
                continue
            best = max(candidates, key=lambda pair: pair[0])[1]  # of equals the first: this round's, the lowest seed
            if round.safety is not None and best["lineage"]["parts"].get("safety", math.inf) < least:
                unsafe += 1
                continue
            pooled += any(best is row for _, row in before)
            rows.append(best)
        if not rows:
            raise InputError("no prompt has an answer to keep: no answer has a reward, or every best one is unsafe")
        if self.ranks.first:
            with replacing(self.folder / ROWS) as file:
                file.writelines(_line(row) for row in rows)
        every = [a for group in groups for a in group]
        scores = [score for group in groups for score in _scores(group)]
        return RoundOutcome(
            True, len(self.prompts), len(rows), temperature, sum(scores) / max(len(scores), 1),
            curve([_scores(group) for group in groups]), divergence(round.count),
            sum(len({a.text for a in group}) for group in groups) / len(groups),
            sum(a.ended for a in every) / len(every),
            equal, unsafe, pooled,
        )  # fmt: skip

    def _lineage(self, temperature: float, judge: Judge) -> dict[str, Any]:
        round = self.round
        return {"round": self.folder.name, "model": round.policy, "rewards": judge.name, "temperature": temperature,
                "top_p": round.top_p}  # fmt: skip

    def _pooled(self, judge: Judge) -> dict[str, list[tuple[float, dict[str, Any]]]]:
        """The best rows of earlier rounds, scored by today's rewards, by their prompts."""
        known = {_key(prompt): (row, prompt) for row, prompt in enumerate(self.prompts)}
        found: dict[str, list[tuple[float, dict[str, Any]]]] = {}
        for folder in self.round.pool:
            rows = [row for row in read(Path(folder) / ROWS) if _key_of(row) in known]
            answers = [_as_rollout(row, known[_key_of(row)][0], self.tokenizer) for row in rows]
            if not rows:
                continue
            judge([known[_key_of(row)][1] for row in rows], answers)
            for row, answer in zip(rows, answers, strict=True):
                if not math.isnan(answer.score):
                    before = {"first_score": row["lineage"].get("first_score", row["lineage"]["score"])}
                    told = {**row["lineage"], **before, "score": answer.score, "parts": answer.parts}
                    found.setdefault(_key_of(row), []).append((answer.score, {**row, "lineage": told}))
        return found

    def _summarise(self, outcome: RoundOutcome, judge: Judge) -> None:
        lines = {f"T {outcome.temperature:g}": [(float(n), mean) for n, (mean, _) in outcome.best_of.items()]}
        for temperature, found in outcome.sweep.items():
            lines.setdefault(f"T {temperature:g}", [(float(n), mean) for n, (mean, _) in found.items()])
        content = {
            "round": asdict(replace(self.round, columns=dict(self.round.columns))),
            "rewards": judge.name,
            "data": {**vars(self.report), "kinds": dict(self.report.kinds)},
            "result": asdict(outcome),
        }
        with saving(self.folder) as save:
            write_text(save.stage / REPORT, json.dumps(content, indent=2, default=str) + "\n")
            write_text(save.stage / CHART, chart(lines, "N: reward of the best of N answers"))


def _parts(todo: Sequence[tuple[float, int]]) -> Iterator[Sequence[tuple[float, int]]]:
    """A few prompts at a time, all of one temperature."""
    start = 0
    while start < len(todo):
        end = start + 1
        while end < min(len(todo), start + _TOGETHER) and todo[end][0] == todo[start][0]:
            end += 1
        yield todo[start:end]
        start = end


def _scores(group: Sequence[Rollout]) -> list[float]:
    return [answer.score for answer in group if not math.isnan(answer.score)]


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False).encode() + b"\n"


def _told(group: Sequence[Rollout], temperature: float, prompt: PromptRow) -> dict[str, Any]:
    """A line of the file of samples."""
    answers = [
        {"k": a.k, "seed": a.seed, "text": a.text, "ids": a.ids, "ended": a.ended,
         "score": None if math.isnan(a.score) else a.score,
         "parts": {name: None if math.isnan(value) else value for name, value in a.parts.items()}}
        for a in group
    ]  # fmt: skip
    return {"row": group[0].row, "prompt": prompt.content, "temperature": temperature, "answers": answers}


def _rollout(entry: Mapping[str, Any], row: int) -> Rollout:
    def number(value: Any) -> float:
        return math.nan if value is None else float(value)

    parts = {name: number(value) for name, value in entry["parts"].items()}
    return Rollout(row, entry["k"], entry["seed"], [], list(entry["ids"]), entry["text"], entry["ended"], [],
                   number(entry["score"]), parts)  # fmt: skip


def _row(prompt: PromptRow, best: Rollout, group: Sequence[Rollout], shared: Mapping[str, Any]) -> dict[str, Any]:
    """A row to tune on, with what it comes from."""
    scores = [None if math.isnan(a.score) else a.score for a in group]
    lineage = {**shared, "seed": best.seed, "k": best.k, "score": best.score, "parts": best.parts, "scores": scores}
    return {**prompt.answered(best.text), "lineage": lineage}


def _key(prompt: PromptRow) -> str:
    return json.dumps(prompt.content, sort_keys=True)


def _key_of(row: Mapping[str, Any]) -> str:
    return json.dumps(row["messages"][:-1] if "messages" in row else row["prompt"], sort_keys=True)


def _as_rollout(row: Mapping[str, Any], place: int, tokenizer: Any) -> Rollout:
    text = row["messages"][-1]["content"] if "messages" in row else row["completion"]
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Rollout(place, int(row["lineage"]["k"]), int(row["lineage"]["seed"]), [], ids, text, True)


def next_command(round: Round) -> list[str]:
    """The words of the command that tunes on the rows."""
    return ["llama2", "finetune", "sft", "BASE", os.path.join(round.output_dir, ROWS), "OUT"]
