"""Description of a training run and its result. No model is loaded here."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from llama2.errors import InputError
from llama2.lora_config import LoraConfig
from llama2.train.data import DataReport
from llama2.train.labels import Labels
from llama2.train.mixing import shares_of
from llama2.train.tasks import TASKS, Task

LENGTH = 1024  # tokens of a row where nothing is said


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The task, the model and the rows of a run.

    task: a row of `tasks.TASKS`, whose settings are further fields: Recipe(task="dpo", beta=0.2, ...) is a Recipe and a
    Dpo. model: a model, or an adapter, which is then trained on; revision: branch, tag or commit, of a hub id. lora: a
    new adapter is trained instead of all weights; packed weights (load_in_4bit: NF4 with double quantisation as QLoRA,
    load_in_8bit) need an adapter. merge: the result is the whole model with the adapter in its weights. dtype: of the
    weights while they train; auto is float32 for all weights, and beneath an adapter what they are stored in, or on a
    CPU what it computes fast. max_length: tokens of a row, by default 1024 or the model's context. eval_data: rows to
    measure on, or eval_split, a share of the training rows that is held out. split, data_config, data_dir: of a data
    set of the hub. columns: the name of a column here -> its name in the rows. samples_every: steps between answers to
    the first held-out prompts, which go to samples.jsonl; 0 for none. mix: further data sets, DATA=SHARE
    each, of which as many rows are drawn as make that share of all (`mixing`).
    """

    task: str
    model: str
    data: str
    output_dir: str
    revision: str | None = None
    lora: LoraConfig | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    merge: bool = False
    dtype: str = "auto"
    device: str = "auto"
    max_length: int | None = None
    split: str = "train"
    data_config: str | None = None
    data_dir: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    eval_data: str | None = None
    eval_split: float | None = None
    samples_every: int = 0
    mix: tuple[str, ...] = ()

    def __new__(cls, **settings: object) -> Self:
        """An instance of the class that has the settings of the task too."""
        if cls is not Recipe or "task" not in settings:
            return super().__new__(cls)
        made = recipe_of(settings["task"])
        known = {f.name for f in fields(made)}
        for name in settings:
            if name not in known:
                raise InputError(f"the task {settings['task']} has no setting {name!r}{_with(name)}")
        return object.__new__(made)  # type: ignore[return-value]

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("load_in_4bit and load_in_8bit are both set; set one of them")
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"max_length is {self.max_length}; it must be at least 2")
        shares_of(self.mix)
        if self.samples_every < 0:
            raise InputError(f"samples_every is {self.samples_every}; it must be a number of steps, or 0")
        if self.eval_data is not None and self.eval_split is not None:
            raise InputError("eval_data and eval_split are both given; give one of them")
        if isinstance(self, Task):
            self.check()
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            raise InputError(f"output_dir {self.output_dir!r} is a file; give the path of a folder")

    @property
    def of_task(self) -> Task:
        """The same object, as the task that it is."""
        assert isinstance(self, Task)
        return self


@cache
def recipe_of(task: str) -> type[Recipe]:
    """The class of recipes of a task: Recipe with the task's settings. Raises InputError for a task there is not."""
    if task not in TASKS:
        raise InputError(f"task is {task!r}; it must be one of {', '.join(TASKS)}")
    kind = TASKS[task]
    return make_dataclass(f"{kind.__name__}Recipe", (), bases=(kind, Recipe), frozen=True, kw_only=True)


def defaults_of(task: str) -> dict[str, Any]:
    """Every setting of a task, and its default; None where it has to be given."""
    found = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(recipe_of(task))
    }
    return {name: None if value is MISSING else value for name, value in found.items()}


def _with(setting: str) -> str:
    tasks = [task for task in TASKS if setting in defaults_of(task)]
    return f"; {', '.join(tasks)} has it" if len(tasks) == 1 else f"; {', '.join(tasks)} have it" if tasks else ""


@dataclass
class Data:
    """Items as the objective takes them, and what was found in the rows they are made of."""

    items: list[Any]
    report: DataReport
    eval_items: list[Any] = field(default_factory=list)
    eval_report: DataReport | None = None
    mixture: list[str] = field(default_factory=list)  # what came of each further data set
    learnt: Labels | None = None  # what the task learns of all rows together

    def text(self) -> str:
        """Both reports, and what all rows together say."""
        found = [f"training: {self.report.text()}"]
        if self.eval_report is not None:
            found.append(f"held out: {self.eval_report.text()}")
        found += self.mixture
        if self.learnt is not None:
            found.append(self.learnt.text())
        return "\n".join(found)

    def cuts(self) -> list[str]:
        """Returns the lines of both reports on truncated answers."""
        reports = [self.report] if self.eval_report is None else [self.report, self.eval_report]
        return [said for report in reports if (said := report.cut())]


@dataclass
class TrainingResult:
    """The result of a run. before and after: of the rows held out, if there are any; report and lines: what the task
    measures besides."""

    folder: Path
    finished: bool
    step: int
    steps: int
    seconds: float
    tokens: int
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
