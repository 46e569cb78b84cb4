"""Jobs that write rows for `finetune sft` with answers of a model: what Ghost Attention and distillation share.

OUT/samples.jsonl   everything that was sampled, a line per row of prompts; a resumed run goes on behind them
OUT/rows.jsonl      the rows to tune on, with their lineage
OUT/report.json     what came of it
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llama2.align.rewards import Source, check_rewards, source_of
from llama2.align.rollout import WIDTH, Rollout, RolloutSampler, RolloutSettings
from llama2.auto import AutoModelForCausalLM, AutoTokenizer, load_config
from llama2.checkpoint.source import revision_of
from llama2.errors import CheckpointError, InputError
from llama2.files import grown, locked, replacing, sync, write_text
from llama2.train.data import Row, read, renamed
from llama2.train.distributed import join
from llama2.train.origin import check_place
from llama2.train.saving import digest

SAMPLES, ROWS, REPORT = "samples.jsonl", "rows.jsonl", "report.json"
TOGETHER = 8  # rows of prompts that are worked on at once, at least


@dataclass(frozen=True, kw_only=True)
class SynthesisPlan:
    """Settings of every synthesis job: the model, its prompts, the new folder, and how answers are drawn."""

    policy: str
    prompts: str
    output_dir: str
    count: int = 4
    temperature: float = 0.7
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 42
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"k is {self.count}; sample at least 1 answer")
        self.sampling()

    @property
    def judges(self) -> list[str]:
        """The rewards that are named."""
        named = [getattr(self, name, None) for name in ("reward", "safety")]
        return [*getattr(self, "rewards", ()), *(name for name in named if name is not None)]

    def sampling(self) -> RolloutSettings:
        """How answers are drawn."""
        return RolloutSettings(temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens)


@dataclass
class Synthesised:
    """The result of a job. rows: written; values: the report; texts: the same for people."""

    rows: int
    values: dict[str, Any]
    texts: list[str]


class Synthesis:
    """One job. Rows are read and checked when it is made, models are loaded by `run`."""

    plan: Any  # a SynthesisPlan
    CHATS_ALONE = True  # whether the job is of dialogues, which need a chat template

    def __init__(self, plan: SynthesisPlan, resume: bool = False) -> None:
        """Raises InputError for whatever is known to be wrong before a model is loaded."""
        self.plan, self.folder, self.ranks = plan, Path(plan.output_dir), join()
        self.device = self.ranks.device(plan.device)
        check_place(self.folder)
        if Path(plan.policy).exists() and Path(plan.policy).resolve() == self.folder.resolve():
            raise InputError(f"{self.folder} is the policy itself; give a new folder")
        held = [name for name in (SAMPLES, ROWS, REPORT) if (self.folder / name).exists()]
        if held and not resume:
            raise InputError(f"{self.folder} holds {held[0]} of an earlier run; go on with --resume, or give another")
        self.hub: dict[str, Any] = {**revision_of(plan.policy, plan.revision)}
        self.tokenizer: Any = AutoTokenizer.from_pretrained(plan.policy, **self.hub)
        if self.CHATS_ALONE and self.tokenizer.chat_template is None:
            raise InputError(f"{plan.policy} has no chat template, and dialogues need one; take a chat model")
        self.config = load_config(plan.policy, **self.hub)
        self.context = int(self.config.max_position_embeddings)
        self.room = self.context - plan.max_new_tokens
        if self.room < 1:
            raise InputError(f"max_new_tokens is {plan.max_new_tokens}, and the context {self.context}; lower it")
        check_rewards(plan.judges, self.tokenizer)
        self.prompts = renamed(read(plan.prompts), dict(plan.columns))

    # -- what a job gives ----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Loads what is needed besides the policy."""

    def settings(self) -> dict[str, Any]:
        """Returns the settings, besides the plan, on which samples depend."""
        return {}

    def count_of(self) -> int:
        """Lines that are made."""
        return len(self.prompts)

    def made(self, sampler: RolloutSampler, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Samples the answers for some lines."""
        raise NotImplementedError

    def written(self, lines: Sequence[dict[str, Any]]) -> tuple[list[Row], dict[str, Any], list[str]]:
        """The rows, the report, and the report for people, from all lines."""
        raise NotImplementedError

    def reward(self, name: str) -> Source:
        """A reward by its name."""
        return source_of(name, self.tokenizer, str(self.device))

    # -- the run -------------------------------------------------------------------------------------------------

    def run(self, report: Callable[[int, int], None] | None = None) -> Synthesised:
        """Samples and writes. report: receives how many lines are done, of how many."""
        if self.ranks.first:
            with locked(self.folder):
                return self._run(report)
        return self._run(None)

    def _run(self, report: Callable[[int, int], None] | None) -> Synthesised:
        self.begin()
        lines, size = self.ranks.broadcast(self._held)
        todo = list(range(len(lines), self.count_of()))
        if todo:
            lines = self._sampled(self._sampler(), lines, size, todo, report)
        rows, values, texts = self.written(lines)
        if not rows:
            raise InputError(f"no row is left to tune on. {' '.join(texts)}")
        if self.ranks.first:
            with replacing(self.folder / ROWS) as file:
                file.writelines(_line(row) for row in rows)
            content = {"plan": asdict(self.plan), "rows": len(rows), **values}
            write_text(self.folder / REPORT, json.dumps(content, indent=2) + "\n")
        self.ranks.wait()
        return Synthesised(len(rows), values, texts)

    def trial(self) -> tuple[Callable[[], object], int, int]:
        """For a rehearsal: what makes the first lines, whose models are loaded now; how many it does, and of all."""
        self.begin()
        sampler, count = self._sampler(), self.count_of()
        numbers = list(range(min(self._together, count)))
        return lambda: self.made(sampler, numbers), len(numbers), count

    def _sampler(self) -> RolloutSampler:
        model = AutoModelForCausalLM.from_pretrained(
            self.plan.policy, dtype=self.plan.dtype, device_map=self.device, **self.hub
        )
        return RolloutSampler(model.requires_grad_(False), self.tokenizer, self.plan.sampling(), self.ranks)

    @property
    def _together(self) -> int:
        return max(TOGETHER, WIDTH // int(self.plan.count))

    def _sampled(
        self, sampler: RolloutSampler, lines: list[dict[str, Any]], size: int, todo: Sequence[int],
        report: Callable[[int, int], None] | None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        file = grown(self.folder / SAMPLES, size) if self.ranks.first else None
        try:
            if file is not None:
                file.seek(size)
                if not size:
                    file.write(_line({"settings": self._settings()}))
            for first in range(0, len(todo), self._together):
                found = self.made(sampler, todo[first : first + self._together])
                if file is not None:
                    file.writelines(map(_line, found))
                    sync(file)
                lines += found
                if report is not None:
                    report(len(lines), self.count_of())
        finally:
            if file is not None:
                file.close()
        return lines

    def _settings(self) -> dict[str, Any]:
        plan = asdict(self.plan)
        kept = {
            name: value for name, value in plan.items() if name not in ("prompts", "output_dir", "device", "columns")
        }
        found: dict[str, Any] = json.loads(json.dumps({**kept, **self.settings(), "rows": digest(self.prompts)}))
        return found

    def _held(self) -> tuple[list[dict[str, Any]], int]:
        """The lines of a run that was begun, and their bytes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / SAMPLES
        data = path.read_bytes() if path.exists() else b""
        size = data.rfind(b"\n") + 1
        if not size:
            return [], 0
        try:
            first, *rest = [json.loads(line) for line in data[:size].splitlines()]
            there = dict(first["settings"])
        except (ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}); remove it, and its run begins anew") from error
        here = self._settings()
        if differ := [key for key in here if there.get(key) != here[key]]:
            raise InputError(f"{path} is of another run: it differs in {', '.join(differ)}; give another folder")
        return rest, size


def said(answer: Rollout) -> str:
    """The text of an answer as it stands in a row."""
    return answer.text.strip()


def _line(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()
