"""What is trained for, on what, and what came of it. No model is loaded here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from llama2.errors import InputError
from llama2.lora_config import LoraConfig
from llama2.train.data import DataReport
from llama2.train.labels import Labels
from llama2.train.preference import Preference, check_preference

Task = Literal["sft", "dpo", "classify", "pretrain"]
# Peak learning rates where none is given: of all weights, and of an adapter.
RATES: dict[str, tuple[float, float]] = {
    "sft": (2e-5, 2e-4),
    "dpo": (1e-6, 5e-6),
    "classify": (2e-5, 2e-4),
    "pretrain": (5e-5, 2e-4),
}
LENGTH = 1024  # tokens of a row where nothing is said


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained for, which model, on which rows.

    model: a model, or an adapter, which is then trained on; revision: branch, tag or commit, of a hub id. lora: a new
    adapter is trained instead of all weights; packed weights (load_in_4bit: NF4 with double quantisation as QLoRA,
    load_in_8bit) need an adapter. merge: the result is the whole model with the adapter in its weights. fresh: new
    random weights of the model's configuration. dtype: of the weights while they train; auto is float32 for all
    weights, and beneath an adapter what they are stored in, or on a CPU what it computes fast. max_length: tokens of a
    row, by default 1024 or the model's context. packing: several rows in one of max_length, none seeing another; by
    default for pretraining. eval_data: rows to measure on, or eval_split, a share of the training rows that is held
    out. split, data_config, data_dir: of a data set of the hub. columns: the name of a column here -> its name in the
    rows.
    """

    task: Task
    model: str
    data: str
    output_dir: str
    revision: str | None = None
    lora: LoraConfig | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    merge: bool = False
    fresh: bool = False
    dtype: str = "auto"
    device: str = "auto"
    max_length: int | None = None
    packing: bool | None = None
    chat_template: str | None = None
    split: str = "train"
    data_config: str | None = None
    data_dir: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    eval_data: str | None = None
    eval_split: float | None = None
    text_column: str | None = None
    label_column: str | None = None
    problem_type: str | None = None
    labels: tuple[str, ...] = ()
    threshold: float = 0.5
    beta: float = 0.1
    loss_type: Preference = "sigmoid"
    label_smoothing: float = 0.0
    reference_free: bool = False

    def __post_init__(self) -> None:
        if self.task not in get_args(Task):
            raise InputError(f"task is {self.task!r}; it must be one of {', '.join(get_args(Task))}")
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("load_in_4bit and load_in_8bit are both set; set one of them")
        if self.fresh and self.task != "pretrain":
            raise InputError("fresh weights are for pretraining all weights; leave fresh out")
        if self.max_length is not None and self.max_length < 2:
            raise InputError(f"max_length is {self.max_length}; it must be at least 2")
        if self.eval_data is not None and self.eval_split is not None:
            raise InputError("eval_data and eval_split are both given; give one of them")
        if not 0 < self.threshold < 1:
            raise InputError(f"threshold is {self.threshold}; it must lie between 0 and 1")
        check_preference(self.loss_type, self.beta, self.label_smoothing)
        if Path(self.output_dir).exists() and not Path(self.output_dir).is_dir():
            raise InputError(f"output_dir {self.output_dir!r} is a file; give the path of a folder")

    @property
    def packs(self) -> bool:
        """Whether rows are packed."""
        return self.task == "pretrain" if self.packing is None else self.packing


@dataclass
class Data:
    """Items as the objective takes them, and what was found in the rows they are made of."""

    items: list[Any]
    report: DataReport
    eval_items: list[Any] = field(default_factory=list)
    eval_report: DataReport | None = None
    labels: Labels | None = None

    def text(self) -> str:
        """Both reports, and the labels."""
        found = [f"training: {self.report.text()}"]
        if self.eval_report is not None:
            found.append(f"held out: {self.eval_report.text()}")
        if self.labels is not None and self.labels.names:
            kind = self.labels.kind.replace("_", " ")
            found.append(f"{kind}: {len(self.labels.names)} labels: {', '.join(self.labels.names[:12])}")
        elif self.labels is not None:
            found.append("regression: the labels are numbers")
        return "\n".join(found)

    def cuts(self) -> list[str]:
        """What both reports say of answers that are cut."""
        reports = [self.report] if self.eval_report is None else [self.report, self.eval_report]
        return [said for report in reports if (said := report.cut())]


@dataclass
class TrainingResult:
    """What came of a run. before and after: of the rows held out, if there are any."""

    folder: Path
    finished: bool
    step: int
    steps: int
    seconds: float
    tokens: int
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
