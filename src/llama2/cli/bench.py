"""`llama2 bench`: how fast a model runs here, as llama-bench prints it, and what share of the machine that is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llama2.cli import bench_output, first_token, numbers, terminal, variants
from llama2.cli.args import option
from llama2.cli.inspect import Headers, main_type, read
from llama2.cli.loading import RunOptions, load, local_model, model_path
from llama2.cli.progress import Waiting
from llama2.errors import InputError
from llama2.evaluate import machine, statistics

if TYPE_CHECKING:
    from llama2.evaluate.speed import Samples, SpeedBench, SpeedTest


@dataclass(frozen=True, kw_only=True)
class BenchOptions(RunOptions):
    """Measure how fast models read prompts and generate, on random tokens and without sampling, as llama-bench does;
    and what share of this machine's read bandwidth and arithmetic that is. Numbers are lists: 128,512, or 1-8*2.

    --against takes a second model, settings of the first (kv-cache=int8,threads=1), or both (other.gguf,threads=1), in
    turns with the first, and tells the ratio with its 95 % interval."""

    models: tuple[str, ...] = option((), "the models; also -m MODEL", metavar="MODEL", positional=True)
    n_prompt: tuple[str, ...] = option((), "tokens of prompts; 0 for none (default: 512)", alias="-p", metavar="N,...")
    n_gen: tuple[str, ...] = option((), "tokens generated; 0 for none (default: 128)", alias="-n", metavar="N,...")
    prompt_gen: tuple[str, ...] = option(
        (), "a prompt and what follows it, timed as one: 512,128", alias="-pg", metavar="PP,TG"
    )
    n_depth: tuple[str, ...] = option((), "positions cached before (default: 0)", alias="-d", metavar="N,...")
    sequences: tuple[str, ...] = option((), "texts at once (default: 1)", alias="-s", metavar="N,...")
    batch_size: tuple[str, ...] = option(
        (), "tokens of a prompt computed in one step at most (default: 2048)", alias="-b", metavar="N,..."
    )
    threads: tuple[str, ...] = option(
        (), "threads that compute (default: one per processor)", alias="-t", metavar="N,..."
    )
    repetitions: int = option(5, "how often each test is timed", alias="-r")
    output: Literal["md", "csv", "json", "jsonl", "sql"] = option(
        "md", "what is printed: llama-bench's table, or its rows as csv, json, jsonl or sql", alias="-o"
    )
    against: str | None = option(
        None, "a second model, settings as KEY=VALUE, or both, separated by commas", metavar="WHAT"
    )
    no_start: bool = option(False, "do not start a process to time its first token and its memory")
    json: bool = option(False, "the report that all measuring commands write, as JSON")
    md: bool = option(False, "that report as a Markdown table")


class Setup(NamedTuple):
    """A model and what it runs with."""

    name: str
    path: str
    options: BenchOptions
    threads: int | None
    batch: int
    headers: Headers


def run(options: BenchOptions) -> int:
    """Runs the command."""
    setups, tests = plan(options)
    if options.against is not None and len(setups) > 1:
        raise InputError(
            f"--against compares one model with one setting, but {len(setups)} combinations are asked for; give one"
        )
    if options.against is not None:
        setups.append(other_setup(setups[0], options.against))
        for test in tests:
            _checked(test, setups[1])
    warn_if_busy(machine.busy_now())
    if not machine.Energy().measurable:
        terminal.notice("llama2: this machine does not tell its energy (no readable RAPL counter)")
    printer = bench_output.Printer(options)
    records: list[bench_output.BenchRecord] = []
    if options.against is not None:
        records = _measured(setups, tests, printer, options.repetitions)
    else:
        for setup in setups:
            records += _measured([setup], tests, printer, options.repetitions)
    starts = (
        {} if options.no_start else {setup.name: first_token.measure(setup.options, setup.path) for setup in setups}
    )
    printer.end(records, starts, setups)
    warn_if_busy(max((r.samples.taken for r in records if r.samples.taken is not None), default=None), "while it ran")
    return 0


def plan(options: BenchOptions) -> "tuple[list[Setup], list[SpeedTest]]":
    """Plans the measurements, checked against each model's context before anything is loaded."""
    if options.repetitions < 1:
        raise InputError(f"--repetitions is {options.repetitions}; give at least 1")
    if options.json + options.md + (options.output != "md") > 1:
        raise InputError("--json, --md and --output each say what is printed; give one of them")
    counts = {
        name: numbers.read(f"--{name.replace('_', '-')}", getattr(options, name), default, least)
        for name, default, least in (
            ("n_prompt", 512, 0),
            ("n_gen", 128, 0),
            ("n_depth", 0, 0),
            ("sequences", 1, 1),
            ("batch_size", 2048, 1),
        )
    }
    pairs = [_pair(word) for word in options.prompt_gen]
    if pairs and not (options.n_prompt or options.n_gen):
        counts["n_prompt"] = counts["n_gen"] = []
    threads: list[int | None] = list(numbers.read("--threads", options.threads, 0, 1)) if options.threads else [None]
    given = [*options.models, *([] if options.model is None else [options.model])]
    paths = [local_model(name, options.revision) for name in given] or [model_path(None)]
    headers = [read(path) for path in paths]
    if not any((*counts["n_prompt"], *counts["n_gen"], *pairs)):
        raise InputError("no test is left: -p and -n are 0; give tokens of a prompt or tokens to generate")
    from llama2.evaluate import speed

    tests = speed.tests(counts["n_prompt"], counts["n_gen"], counts["n_depth"], counts["sequences"], pairs)
    setups = [
        Setup(_name(head, count, batch, threads, counts), path, replace(options, model=path), count, batch, head)
        for path, head in zip(paths, headers, strict=True)
        for batch in counts["batch_size"]
        for count in threads
    ]
    for setup in setups:
        for test in tests:
            _checked(test, setup)
    return setups, tests


def _checked(test: "SpeedTest", setup: Setup) -> None:
    from llama2.evaluate import speed

    try:
        speed.check(test, setup.headers.config.max_position_embeddings)
    except InputError as error:
        raise InputError(f"{setup.name}: {error}") from error


def _name(head: Headers, threads: int | None, batch: int, every: Sequence[Any], counts: dict[str, list[int]]) -> str:
    """The model's name, with what tells its settings from those of the others."""
    told = [f"{threads} threads"] if len(every) > 1 else []
    told += [f"batch {batch}"] if len(counts["batch_size"]) > 1 else []
    return ", ".join([head.name, *told])


def other_setup(first: Setup, text: str) -> Setup:
    """The second model of --against: `first` with another file, with other settings, or both."""
    variant = variants.read(text, first.path, ("threads", "batch"), "--against ")
    threads, batch = first.threads, first.batch
    if "threads" in variant.settings:
        threads = numbers.one("--against threads", variant.settings["threads"], 1)
    if "batch" in variant.settings:
        batch = numbers.one("--against batch", variant.settings["batch"], 1)
    headers = read(variant.path)
    name = ", ".join(part for part in (headers.name, *variant.label.split(",")) if part)
    name = name if name != first.name else f"{name} again"
    return Setup(name, variant.path, variants.applied(first.options, variant), threads, batch, headers)


def open_bench(setup: Setup) -> "SpeedBench":
    """The model of a setup, ready to be timed."""
    from llama2.evaluate.speed import SpeedBench

    options = setup.options
    with Waiting(f"loading {setup.path}"):
        model: Any = load(options, setup.threads)[0]
    return SpeedBench(model, setup.batch, options.runner, options.cache_dtype, options.precision)


def _measured(
    setups: Sequence[Setup], tests: "Sequence[SpeedTest]", printer: "bench_output.Printer", repetitions: int
) -> list["bench_output.BenchRecord"]:
    """Every test on these models in turns."""
    from llama2.evaluate.speed import measure

    benches = [open_bench(setup) for setup in setups]
    limits = [bench.limits() for bench in benches]
    records = []
    with Waiting("measuring") as waiting:
        for test in tests:
            waiting.say(test.name)
            samples: Sequence[Samples] = ()
            for number, found in enumerate(measure(benches, test, repetitions)):
                samples = found
                waiting.say(f"{test.name}, {number + 1} of {repetitions}")
            rows = [
                bench_output.BenchRecord(setup, bench, limit, each)
                for setup, bench, limit, each in zip(setups, benches, limits, samples, strict=True)
            ]
            if len(rows) == 2:
                first, second = (row.samples.seconds for row in rows)
                rows[1] = replace(rows[1], ratio=statistics.ratio(first, second))
            records += rows
            printer.rows(rows)
    return records


def warn_if_busy(taken: float | None, when: str = "now") -> None:
    """A warning where others take so much of the processors that figures are not to be trusted."""
    if taken is not None and taken > machine.BUSY:
        terminal.notice(
            f"llama2: warning: the machine is busy: others take {taken:.0%} of the processors {when}; these figures "
            "are not what it can do"
        )


def _pair(text: str) -> tuple[int, int]:
    pair = numbers.read("-pg", (text,), 0, 1)
    if len(pair) != 2:
        raise InputError(f"-pg {text!r} is not a pair; give the tokens of the prompt and those generated, as 512,128")
    return pair[0], pair[1]


def quantised(headers: Headers) -> bool:
    """Whether most weights are packed blocks or codes."""
    return bool(headers.types) and main_type(headers) not in ("F64", "F32", "F16", "BF16")
