"""`llama2 evaluate`: what models are worth, on lm-eval's tasks, on long contexts, and beside each other."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.cli import arena as arena_command
from llama2.cli import long_context, terminal, variants
from llama2.cli.args import option
from llama2.cli.loading import RunOptions, local_model, model_path
from llama2.errors import InputError, MissingDependencyError

OWN_TASKS = ("needle", "position")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RunOptions):
    """Evaluate models on tasks: names of lm-evaluation-harness, the groups llama2-paper, open-llm and safety, files of
    your own (JSON lines with question, choices, answer; task.json of BIG-bench), and two tasks on long contexts: needle
    and position. A model may be followed by settings: MODEL kv-cache=int8 measures both.

    A run that was killed goes on where it was, with the same numbers. With --arena two models answer the same prompts
    and a judge compares them: evaluate --arena A B prompts.jsonl --judge MODEL|URL|python:module:function."""

    models: tuple[str, ...] = option(
        (), "the models, or settings of the first one as KEY=VALUE; of --arena A, B and prompts", metavar="MODEL",
        positional=True,
    )  # fmt: skip
    tasks: tuple[str, ...] = option((), "tasks, groups and files", metavar="NAME,...")
    list: bool = option(False, "name the groups and all tasks of lm-eval")
    num_fewshot: int | None = option(None, "examples before each question, where a group does not say it")
    limit: float | None = option(None, "questions of each task at most; less than 1 for a share of them")
    batch_size: str = option("auto", "sequences computed in one step, or auto", metavar="N")
    max_batch_size: int | None = option(None, "bound of auto")
    max_length: int | None = option(None, "tokens of the context (default: the model's)")
    apply_chat_template: bool = option(False, "put every question into the model's chat template")
    system_instruction: str | None = option(None, "a system prompt before every question", metavar="TEXT")
    fewshot_as_multiturn: bool = option(True, "examples as turns of the conversation, with --apply-chat-template")
    gen_kwargs: str | None = option(None, "settings of generation: temperature=0.8,do_sample=true", metavar="KEY=VALUE")
    seed: int = option(0, "of sampling; of the choice of examples 1234, as lm-eval has it")
    data_dir: str | None = option(None, "a folder with data sets, read in place of the hub's", metavar="FOLDER")
    include_path: str | None = option(None, "a folder with more tasks, in lm-eval's YAML", metavar="FOLDER")
    confirm_unsafe_code: bool = option(False, "allow tasks that run code which the model writes")
    cache_requests: bool = option(False, "keep the prompts that lm-eval builds for later runs")
    output: str | None = option(
        None, "a folder for report.json, samples and pictures, and for what lets a run go on (default: none, and the "
        "cache of the user)", metavar="FOLDER",
    )  # fmt: skip
    fresh: bool = option(False, "compute everything anew")
    text: str | None = option(None, "the text of needle and position, UTF-8", metavar="FILE")
    lengths: tuple[str, ...] = option((), "tokens of needle's prompts and position's windows", metavar="N,...")
    depths: str = option("0,0.25,0.5,0.75,1", "where the needle stands", metavar="X,...")
    trials: int = option(3, "needles of each length and depth")
    arena: bool = option(False, "compare two models' answers to prompts")
    judge: str | None = option(None, "who compares: a model, a URL, or python:module:function", metavar="WHO")
    ratings: str | None = option(None, "people's ratings from 1 to 7 in place of a judge (JSON lines)", metavar="FILE")
    max_new_tokens: int = option(256, "tokens of an answer in --arena, at most")
    json: bool = option(False, "the report that all measuring commands write, as JSON")
    md: bool = option(False, "that report as a Markdown table (the default shows the same)")


def run(options: EvaluateOptions) -> int:
    """Runs the command."""
    _check(options)
    if options.list:
        return _list()
    if options.arena:
        report = arena_command.run(options)
    else:
        report = _evaluated(options)
    if options.output is not None:
        from llama2.files import write_bytes

        write_bytes(Path(options.output) / "report.json", report.as_json().encode())
    print(report.as_json() if options.json else report.as_markdown())
    return 0


def _check(options: EvaluateOptions) -> None:
    if options.json and options.md:
        raise InputError("--json and --md each say what is printed; give one of them")
    if options.limit is not None and options.limit <= 0:
        raise InputError(f"--limit is {options.limit}; give a number of questions, or a share between 0 and 1")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise InputError(f"--num-fewshot is {options.num_fewshot}; give 0 or more")
    if options.judge is not None and not options.arena:
        raise InputError(f"--judge {options.judge} belongs to --arena; add it, with two models and a file of prompts")
    if options.ratings is not None and not options.arena:
        raise InputError(f"--ratings {options.ratings} belongs to --arena; add it")
    if options.arena and options.tasks:
        raise InputError("--arena and --tasks are two evaluations; run one after the other")
    if options.batch_size.split(":")[0] != "auto" and not options.batch_size.isdecimal():
        raise InputError(f"--batch-size is {options.batch_size!r}; give auto or a number")


def need_harness() -> None:
    """Raises MissingDependencyError where lm-eval is not installed. What its libraries log of retries and defaults
    stays silent: errors are told once, by us."""
    import importlib.util
    import logging

    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)

    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError("tasks of lm-evaluation-harness need it; run `pip install 'llama2[evaluate]'`")


def _list() -> int:
    need_harness()
    from lm_eval.tasks import TaskManager

    from llama2.evaluate.tasks import GROUPS

    for group, members in GROUPS.items():
        print(f"{group}:")
        for entry in members:
            shots = "" if entry.shots is None else f", {entry.shots} examples"
            print(f"  {entry.name}{shots}" + (f" ({entry.differs})" if entry.differs else ""))
    print("\n".join(["needle", "position", *sorted(TaskManager().all_tasks)]))
    return 0


def _setups(options: EvaluateOptions) -> "dict[str, variants.Variant]":
    """The models by the names that the report gives them."""
    given = [*([] if options.model is None else [options.model]), *options.models]
    base = (
        local_model(given[0].split(",")[0], options.revision) if given and "=" not in given[0].split(",")[0] else None
    )
    found: dict[str, variants.Variant] = {}
    if base is None:
        base = model_path(None)
        found[Path(base).name] = variants.Variant(base, "", {})
    for word in given:
        variant = variants.read(word, base, ("rope",))
        found[",".join(part for part in (Path(variant.path).name, variant.label) if part)] = variant
    return found


def _evaluated(options: EvaluateOptions) -> Any:
    from llama2.evaluate.report import EvaluationReport

    setups = _setups(options)
    names = [name for word in options.tasks for name in word.split(",") if name]
    own = [name for name in names if name in OWN_TASKS]
    theirs = [name for name in names if name not in OWN_TASKS]
    if not names:
        raise InputError("no task was given; add --tasks NAME,... (`llama2 evaluate --list` names them)")
    tasks: Any = None
    if theirs:
        need_harness()
        if any("rope" in variant.settings for variant in setups.values()):
            raise InputError("rope=TYPE:FACTOR belongs to needle and position; leave it out for other tasks")
        tasks = _tasks(options, theirs)
    text = long_context.read_text(options) if own else ""
    rows = []
    for name, variant in setups.items():
        if own:
            rows += long_context.measure(variants.applied(options, variant), variant, name, own, text)
        if theirs:
            rows += _harness(options, variant, name, tasks)
    if own and options.output is not None:
        long_context.draw(rows, Path(options.output))
    settings = {"tasks": names, "num_fewshot": options.num_fewshot, "limit": options.limit, "seed": options.seed}
    return EvaluationReport("evaluate", rows, settings, {name: {"path": v.path} for name, v in setups.items()})


def _tasks(options: EvaluateOptions, names: "list[str]") -> Any:
    from llama2.evaluate import tasks

    wanted = tasks.entries(names)
    for entry in wanted:
        if entry.differs:
            terminal.notice(f"llama2: {entry.name}: {entry.differs}")
    return tasks.load(wanted, options.num_fewshot, options.data_dir, options.include_path, options.confirm_unsafe_code)


def _harness(options: EvaluateOptions, variant: "variants.Variant", name: str, tasks: Any) -> Any:
    """The rows of lm-eval's tasks on one model."""
    from lm_eval import simple_evaluate

    from llama2.evaluate.harness import HarnessModel

    own = variants.applied(options, variant)
    lm = HarnessModel(
        variant.path,
        dtype=own.dtype,
        device=None if own.device == "auto" else own.device,
        batch_size=own.batch_size,
        max_batch_size=own.max_batch_size,
        max_length=own.max_length,
        adapter=own.adapter,
        runner=own.runner,
        kv_cache=own.kv_cache,
        precision=own.precision,
        store=_store(options, variant),
    )
    if options.apply_chat_template and lm.tokenizer.chat_template is None:
        raise InputError(f"{name} has no chat template; leave out --apply-chat-template")
    try:
        results = simple_evaluate(
            model=lm,
            tasks=[*tasks.load(())["tasks"]],
            task_manager=tasks,
            limit=options.limit if options.limit is None or options.limit < 1 else int(options.limit),
            system_instruction=options.system_instruction,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.fewshot_as_multiturn and options.apply_chat_template,
            gen_kwargs=options.gen_kwargs,
            cache_requests=options.cache_requests,
            confirm_run_unsafe_code=options.confirm_unsafe_code,
            torch_random_seed=options.seed,
            log_samples=options.output is not None,
        )
    finally:
        lm.close()
    if options.output is not None:
        _keep_samples(Path(options.output), name, results)
    return rows(name, results)


def rows(name: str, results: Any) -> "list[Any]":
    """The report's rows of what lm-eval gives."""
    from llama2.evaluate.report import Row

    found = []
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        shots = results.get("n-shot", {}).get(task)
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            error = error if isinstance(error, int | float) else None
            up = results.get("higher_is_better", {}).get(task, {}).get(metric)
            better = "" if up is None else "higher" if up else "lower"
            test = f"{task}: {metric}" + ("" if kind == "none" else f" ({kind})")
            test += f" @ {shots} shots" if shots else ""
            samples = results.get("n-samples", {}).get(task, {})
            found.append(Row(name, test, value, error, "", better, details={"samples": samples, "shots": shots}))
    return found


def _keep_samples(folder: Path, name: str, results: Any) -> None:
    from lm_eval.utils import handle_non_serializable

    from llama2.files import write_bytes

    for task, samples in (results.get("samples") or {}).items():
        lines = [json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) for sample in samples]
        place = folder / f"samples_{_plain(name)}_{_plain(task)}.jsonl"
        write_bytes(place, ("\n".join(lines) + "\n").encode())


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_.=" else "_" for c in name)


def _store(options: EvaluateOptions, variant: "variants.Variant") -> str:
    """The file that lets a run go on: in --output, or in the user's cache by the model's path."""
    folder = (
        Path(options.output)
        if options.output is not None
        else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama2" / "evaluate"
    )
    place = hashlib.sha256(f"{Path(variant.path).resolve()}\0{variant.label}".encode()).hexdigest()[:16]
    path = folder / f"finished-{place}.db"
    if options.fresh:
        for each in folder.glob(f"{path.name}*"):
            each.unlink()
    return str(path)
