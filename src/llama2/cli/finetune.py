"""`llama2 finetune TASK`: a model trained on rows of text, answers, preferences or labels."""

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import Field, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

from llama2.cli import terminal
from llama2.cli.args import option, revision_option
from llama2.cli.names import resolve_name
from llama2.cli.progress import StepMeter
from llama2.cli.recipes import NAMES, expanded, set_values
from llama2.errors import InputError
from llama2.train.tasks import TASKS as FINETUNE
from llama2.train.tasks import Task

if TYPE_CHECKING:
    from llama2.lora_config import LoraConfig
    from llama2.train.finetune import Finetune, Recipe, TrainingResult
    from llama2.train.trainer import TrainingArguments

# Flag -> field of TrainingArguments, where the two are called differently.
_ARGUMENTS = {flag: field for field, flag in NAMES.items() if flag not in ("model", "data", "data_config", "split")}
LORA_RANK = 16
Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "cosine_with_min_lr"]


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """adapter (any of these trains one; without them all weights are trained)."""

    lora_r: int | None = option(None, f"rank of its matrices (default: {LORA_RANK})")
    lora_alpha: float | None = option(None, "scale: alpha / r multiplies it (default: 2 r)")
    lora_dropout: float | None = option(None, "share of its inputs that a step leaves out (default: 0)")
    target_modules: str | None = option(None, "linears to adapt: names with commas, or one pattern for whole paths "
                                        "(default: all-linear)", metavar="NAMES")  # fmt: skip
    use_rslora: bool = option(False, "scale alpha / sqrt(r)")
    use_dora: bool = option(False, "learn the length of each changed row too (DoRA)")
    load_in_4bit: bool = option(False, "on weights packed as NF4 with double quantisation (QLoRA)")
    load_in_8bit: bool = option(False, "on weights packed as int8 rows")
    merge: bool = option(False, "write the whole model with the adapter in its weights, instead of the adapter")

    @property
    def describes(self) -> bool:
        """Whether a flag says what the adapter is, and not only what it is for."""
        own = [f for f in fields(AdapterOptions) if f.name not in ("merge", "load_in_4bit", "load_in_8bit")]
        return any(getattr(self, f.name) != f.default for f in own)

    @property
    def lora(self) -> "LoraConfig | None":
        """The adapter that the flags ask for."""
        if not (self.describes or self.load_in_4bit or self.load_in_8bit):
            return None
        from llama2.lora_config import LoraConfig

        rank = LORA_RANK if self.lora_r is None else self.lora_r
        return LoraConfig(
            r=rank,
            lora_alpha=2 * rank if self.lora_alpha is None else self.lora_alpha,
            lora_dropout=self.lora_dropout or 0.0,
            target_modules=_modules(self.target_modules or "all-linear"),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
        )


@dataclass(frozen=True, kw_only=True)
class Training:
    """training."""

    epochs: float = option(3.0, "times that each row is seen")
    max_steps: int = option(-1, "end after this many steps, -1: after the epochs")
    batch_size: int = option(4, "rows at once")
    gradient_accumulation_steps: int = option(1, "such batches per step")
    learning_rate: float | None = option(None, "the peak")
    schedule: Schedule = option("cosine", "how the rate falls")
    warmup_ratio: float = option(0.03, "share of the steps in which the rate rises")
    weight_decay: float = option(0.0, "of matrices, each step")
    max_grad_norm: float = option(1.0, "gradients beyond this norm are scaled down, 0: never")
    seed: int = option(42, "order of the rows, fresh weights, dropout")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "of the weights while they train; auto is float32, and beneath an adapter what they are stored in, or on a CPU "
        "what it computes fast",
    )
    bf16: bool = option(False, "compute in bfloat16; weights that are trained keep float32 copies")
    fp16: bool = option(False, "compute in float16 with scaled losses, on CUDA alone")
    optim: Literal["adamw_torch", "adamw_8bit"] = option("adamw_torch", "adamw_8bit keeps its moments in bytes")
    gradient_checkpointing: bool = option(False, "less memory for a third more work: each layer is run twice")
    fsdp: Literal["full_shard"] | None = option(None, "under torchrun: each process holds a part of each weight "
                                                "(default: all hold them whole)", metavar="full_shard")  # fmt: skip
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto is the GPU where there is one", metavar="DEVICE")
    set: tuple[str, ...] = option((), "any other field of TrainingArguments; may be repeated", metavar="NAME=VALUE")
    config: str | None = option(None, "flags from a .yaml or .json file, or the finetune.json of a run; those that are "
                                "given beside it win", metavar="FILE")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SavingOptions:
    """measuring and saving."""

    output_dir: str | None = option(None, "the new folder, instead of a third path", metavar="FOLDER")
    eval_data: str | None = option(None, "rows to measure on, as DATA", metavar="DATA")
    eval_split: float | None = option(None, "hold out this share of the rows to measure on")
    eval_steps: int | None = option(None, "measure every N steps (default: once an epoch, and before and after)")
    save_steps: int = option(500, "a checkpoint every N steps")
    keep: int = option(2, "checkpoints at a time")
    logging_steps: int = option(10, "a line of log.jsonl every N steps")
    report_to: Literal["none", "all", "tensorboard", "wandb", "mlflow", "trackio"] = option("none", "besides log.jsonl")
    samples_every: int = option(0, "answer the first held-out prompts every N steps, into samples.jsonl (0: never)")
    dry_run: bool = option(False, "check the rows, take two steps, and say the memory, hours and files of the run; "
                           "nothing is written")  # fmt: skip
    resume: bool = option(False, "go on from the newest checkpoint of the folder")
    quiet: bool = option(False, "no progress, no report of the rows")
    json: bool = option(False, "the result as JSON")


@dataclass(frozen=True, kw_only=True)
class TaskOptions(AdapterOptions, Training, SavingOptions):
    """Options of all tasks."""

    name: ClassVar[str]

    paths: tuple[str, ...] = option((), "the model (a folder, a file or a hub id), the rows (.jsonl, .json, .csv, "
                                    ".tsv, .parquet, .txt, a folder, or the id of a data set), the new folder",
                                    metavar="MODEL DATA OUT", positional=True)  # fmt: skip
    revision: str | None = revision_option("MODEL")
    max_length: int | None = option(None, "tokens of a row, at most (default: 1024, or the context if it is less)")
    split: str = option("train", "part of a data set, of a folder, or of a .json file with several lists")
    columns: str | None = option(None, "columns that are called otherwise in DATA: prompt=question,chosen=response_j",
                                 metavar="NAME=COLUMN,...")  # fmt: skip
    mix: tuple[str, ...] = option((), "further data sets, each with its share of all rows: a.jsonl=0.3,b.jsonl=0.1",
                                  metavar="DATA=SHARE,...", commas=True)  # fmt: skip
    data_config: str | None = option(None, "configuration of a data set of the hub", metavar="NAME")
    data_dir: str | None = option(None, "folder in a data set of the hub", metavar="FOLDER")


def _options_of(task: type[Task]) -> type[TaskOptions]:
    """The flags of a task: its own first, then those that all tasks share, with its defaults."""
    hints, shared = get_type_hints(task), {f.name: f for f in fields(TaskOptions)}
    settings = {f.name: f for f in fields(task)}  # type: ignore[arg-type]  # every task is a dataclass
    own = [(name, hints[name], _copied(settings[name])) for name in task.__annotations__ if name in settings]
    whole, adapter = task.rates
    rate = f"the peak (default: {_short(adapter)} for an adapter, {_short(whole)} for all weights)"
    changed: list[tuple[str, Any, Any]] = [
        ("learning_rate", float | None, _copied(shared["learning_rate"], help=rate, group=Training))
    ]
    for name, value in task.defaults.items():
        group = next(part for part in TaskOptions.__mro__ if name in vars(part).get("__annotations__", {}))
        changed.append((name, shared[name].type, _copied(shared[name], value, group=group)))
    made = make_dataclass(task.__name__, [*own, *changed], bases=(task, TaskOptions), frozen=True, kw_only=True)
    made.__doc__, made.__module__ = task.__doc__, __name__
    return made


def _short(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


def _copied(declared: "Field[Any]", default: Any = None, **metadata: Any) -> Any:
    """A field as it is declared, for another class; with another default, or with more to say of it."""
    value = declared.default if default is None else default
    return field(default=value, metadata={**declared.metadata, **metadata})


TASKS: dict[str, type[TaskOptions]] = {name: _options_of(task) for name, task in FINETUNE.items()}
SUMMARY = {name: task.summary for name, task in FINETUNE.items()}


def words(arguments: Sequence[str]) -> list[str]:
    """The words of the command line, with those of a recipe's file among them."""
    return expanded(arguments, TASKS)


def before_torch() -> None:
    """Sets what torch reads when it is imported, unless the user has.

    Torch and oneDNN each keep what they made for 1,024 shapes of products, half a megabyte a shape and more for wide
    ones: rows of many lengths fill gigabytes. And threads of OpenMP that wait for a late one turn for milliseconds: on
    processors that others use just the time that the late one needs. Here it is some 20 us, and then they sleep.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def run(options: TaskOptions) -> int:
    """Runs the command."""
    before_torch()
    from llama2.train.distributed import shutdown
    from llama2.train.finetune import Finetune

    recipe, args = recipe_of(options), arguments(options)
    job = Finetune(recipe, args, _silent if options.quiet else terminal.notice)
    if options.dry_run:
        return _rehearsed(job, options)
    with progress(options, job.ranks.first) as report:
        result = job.run(report)
    if job.ranks.first and not result.finished:
        print(
            f"llama2: stopped at step {result.step} of {result.steps}, which is saved; go on with\n  "
            f"{_again(sys.argv, job.ranks.world)}",
            file=sys.stderr,
        )
    elif job.ranks.first:
        show(job, result, options)
    shutdown()
    return 0 if result.finished else 130


def _rehearsed(job: "Finetune", options: TaskOptions) -> int:
    from dataclasses import asdict

    from llama2.train.distributed import shutdown
    from llama2.train.rehearsal import rehearse

    found = rehearse(job)
    if job.ranks.first and options.json:
        import json

        print(json.dumps(asdict(found)))
    elif job.ranks.first:
        print("\n".join(found.lines()))
    shutdown()
    return 0


def _silent(_: str) -> None:
    """Takes what is not to be told."""


def recipe_of(options: TaskOptions) -> "Recipe":
    """The recipe that the flags describe. Raises InputError for a wrong number of paths."""
    from llama2.train.recipe import Recipe
    from llama2.train.recipe import recipe_of as of_task

    paths = [*options.paths, *([options.output_dir] if options.output_dir else [])]
    if len(paths) != 3:
        raise InputError(
            f"finetune {options.name} needs a model, its rows and a new folder (or --output-dir), but {len(paths)} "
            f"paths were given: {', '.join(paths) or 'none'}"
        )
    known = fields(of_task(options.name))
    settings = {f.name: getattr(options, f.name) for f in known if hasattr(options, f.name)}
    settings |= {"task": options.name, "model": resolve_name(paths[0]), "data": paths[1], "output_dir": paths[2]}
    settings["lora"] = None if _continues(options) and not options.describes else options.lora
    if (
        options.bf16 and options.dtype == "auto" and trains_adapter(options)
    ):  # an adapter is float32 on weights loaded as bfloat16
        settings["dtype"] = "bfloat16"
    settings["columns"] = columns_of(options.columns or "")
    if settings.get("chat_template"):
        settings["chat_template"] = _template(settings["chat_template"])
    return Recipe(**settings)


def trains_adapter(options: TaskOptions) -> bool:
    """Whether flags ask for an adapter, or MODEL is one that is trained on."""
    return options.lora is not None or _continues(options)


def _continues(options: TaskOptions) -> bool:
    """Whether MODEL is an adapter."""
    from llama2.train.origin import adapter_of

    return bool(options.paths) and adapter_of(resolve_name(options.paths[0]), options.revision) is not None


def arguments(options: TaskOptions, checkpoint_dir: str | None = None) -> "TrainingArguments":
    """How the flags say to train."""
    from llama2.train.trainer import TrainingArguments

    known = {f.name for f in fields(TrainingArguments)}
    given = {_ARGUMENTS.get(f.name, f.name): getattr(options, f.name) for f in fields(options)}
    settings = {name: value for name, value in given.items() if name in known}
    task = FINETUNE[options.name]
    whole, adapter = task.rates
    if options.learning_rate is None:
        settings["learning_rate"] = adapter if trains_adapter(options) else whole
    settings["output_dir"] = checkpoint_dir or options.output_dir or (options.paths or ("",))[-1]
    settings["per_device_eval_batch_size"] = options.batch_size
    settings["bf16"] = options.bf16 and not trains_adapter(options)
    settings["fsdp"] = options.fsdp or ""
    settings["eval_on_start"] = options.eval_data is not None or options.eval_split is not None
    chosen = set_values(options.set, lambda name: name in known - set(settings))
    own = dict(task.arguments)
    if options.schedule != task.defaults.get("schedule"):
        own.pop("lr_scheduler_kwargs", None)
    return TrainingArguments(**{**own, **settings, **chosen})


def columns_of(text: str) -> dict[str, str]:
    """Of a=b,c=d. Raises InputError for anything else."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    for name, sign, column in pairs:
        if not (name.strip() and sign and column.strip()):
            raise InputError(f"--columns is {text!r}; give pairs such as prompt=question,chosen=response_j")
    return {name.strip(): column.strip() for name, _, column in pairs}


def _modules(names: str) -> tuple[str, ...] | str:
    if names == "all-linear" or not all(part.strip().replace("_", "").isalnum() for part in names.split(",")):
        return names
    return tuple(part.strip() for part in names.split(","))


def _template(name: str) -> str:
    if "{" in name:  # the template itself, of a finetune.json
        return name
    if name == "llama2":
        from llama2.tokenizer import LLAMA2_CHAT_TEMPLATE

        return LLAMA2_CHAT_TEMPLATE
    return Path(name).read_text(encoding="utf-8")


def _again(argv: Sequence[str], ranks: int) -> str:
    launcher = ["torchrun", "--nproc-per-node", str(ranks), "-m"] if ranks > 1 else []
    words = [*launcher, "llama2", *argv[1:]]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])


def progress(options: TaskOptions, first: bool) -> AbstractContextManager[Callable[[dict[str, Any]], None] | None]:
    """Returns the progress callback, on the first of several processes."""
    return nullcontext() if options.quiet or not first else StepMeter(options.name, options.logging_steps)


def show(job: "Finetune", result: "TrainingResult", options: TaskOptions) -> None:
    """Prints the result of the run, and the command that uses it."""
    if options.json:
        import json

        print(json.dumps({**vars(result), "folder": str(result.folder)}))
        return
    print(f"{result.steps} steps, {result.tokens:,} tokens; {result.seconds:.0f} s with loading and saving")
    for name, before in result.before.items():
        label, after = name.removeprefix("eval_").replace("_", " "), result.after[name]
        print(f"held out, {label}: {before:.4f} before, {after:.4f} after")
    for line in result.lines:
        print(line)
    print(f"{result.folder} holds the result, log.jsonl and loss.svg; use it with\n  {_use(job, result.folder)}")


def _use(job: "Finetune", folder: Path) -> str:
    command = job.task.use
    if command != "chat":
        return shlex.join(["llama2", command, str(folder)])
    command = command if job.tokenizer.chat_template else "generate"
    whole = job.origin.lora is None or job.recipe.merge
    version = ["--revision", job.origin.hub["revision"]] if job.origin.hub else []
    model = [str(folder)] if whole else [job.origin.base, *version, "--adapter", str(folder)]
    return shlex.join(["llama2", command, "-m", *model])
