"""`llama2 choose`: which of these files to use on this machine."""

import math
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llama2.cli import bench_output, first_token, terminal, texts
from llama2.cli.args import option
from llama2.cli.bench import BenchOptions, Setup, open_bench, warn_if_busy
from llama2.cli.info import size
from llama2.cli.inspect import read
from llama2.cli.loading import RunOptions, load_tokenizer, local_model
from llama2.cli.progress import Waiting
from llama2.errors import InputError
from llama2.evaluate import machine, statistics
from llama2.memory import total_bytes

if TYPE_CHECKING:
    from llama2.evaluate.report import Row

WINDOW, WINDOWS = 512, 8


@dataclass(frozen=True, kw_only=True)
class ChooseOptions(RunOptions):
    """Measure files of one model and say which to use on this machine: the fastest whose perplexity is at most --loss
    above the best one's, and whose memory fits. Writes a table and a picture of speed and perplexity."""

    models: tuple[str, ...] = option((), "the files", metavar="MODEL", positional=True)
    loss: float = option(0.02, "how much of the best perplexity may be given away: 0.02 is 2 %")
    memory: float | None = option(None, "memory that may be taken, in GB (default: the machine's)")
    text: str | None = option(None, "what perplexity is measured on (default: an English text in the package)")
    picture: str = option("choose.svg", "where the picture goes", metavar="FILE.svg")
    repetitions: int = option(3, "how often speed is timed", alias="-r")
    json: bool = option(False, "the report that all measuring commands write, as JSON")
    md: bool = option(False, "that report as a Markdown table (the default shows the same)")


class Candidate(NamedTuple):
    """A file, measured. losses: sums of nats of each window."""

    name: str
    decode: float
    prefill: float
    memory: int
    losses: list[float]
    counts: list[int]
    rows: "list[Row]"

    @property
    def nll(self) -> float:
        """Mean loss in nats per token."""
        return math.fsum(self.losses) / sum(self.counts)


def run(options: ChooseOptions) -> int:
    """Runs the command."""
    if options.json and options.md:
        raise InputError("--json and --md each say what is printed; give one of them")
    if len(options.models) < 2:
        raise InputError(f"choose compares files, but {len(options.models)} were given; give two or more")
    if options.loss < 0 or options.repetitions < 1:
        raise InputError(f"--loss {options.loss} and --repetitions {options.repetitions}: give 0 and 1 at least")
    text = _text(options)
    paths = [local_model(name) for name in options.models]
    setups = [_setup(options, path) for path in paths]
    ids = [load_tokenizer(path)(text, verbose=False)["input_ids"] for path in paths]
    if any(each != ids[0] for each in ids):
        raise InputError(
            "these files have different tokenizers, so their perplexities do not compare; give one model's"
        )
    window = min(WINDOW, *(setup.headers.config.max_position_embeddings for setup in setups))
    ids = ids[0][: window * WINDOWS]
    warn_if_busy(machine.busy_now())
    found = _measured(setups, ids, window, options)
    chosen, why = decide(found, options.loss, options.memory)
    _show(options, found, chosen, why)
    return 0


def _text(options: ChooseOptions) -> str:
    if options.text is not None:
        return texts.read([options.text])
    return (files("llama2") / "quantize" / "calibration.txt").read_text(encoding="utf-8")


def _setup(options: ChooseOptions, path: str) -> Setup:
    shared = {name: getattr(options, name) for name in RunOptions.__dataclass_fields__}
    headers = read(path)
    bench = BenchOptions(**{**shared, "model": path})
    return Setup(headers.name, path, bench, None, 512, headers)


def _measured(setups: list[Setup], ids: list[int], window: int, options: ChooseOptions) -> list[Candidate]:
    """All files; speeds in turns, so that what the machine does meanwhile meets all alike."""
    from llama2.evaluate.perplexity import window_scores
    from llama2.evaluate.speed import SpeedTest, measure

    prompt = min(256, window)
    tests = [SpeedTest(prompt, 0), SpeedTest(0, min(64, window))]
    benches = [open_bench(setup) for setup in setups]
    limits = benches[0].limits()
    records: dict[str, list[bench_output.BenchRecord]] = {}
    losses: dict[str, list[Any]] = {}
    with Waiting("measuring") as waiting:
        for test in tests:
            waiting.say(test.name)
            *_, samples = measure(benches, test, options.repetitions)
            for setup, bench, each in zip(setups, benches, samples, strict=True):
                records.setdefault(setup.path, []).append(bench_output.BenchRecord(setup, bench, limits, each))
        for setup, bench in zip(setups, benches, strict=True):
            waiting.say(f"perplexity of {setup.name}")
            losses[setup.path] = list(window_scores(bench.model, ids, window, None, bench.steps))
    del benches
    made = []
    for setup in setups:
        start = first_token.measure(replace(setup.options), setup.path)
        made.append(_candidate(setup, records[setup.path], losses[setup.path], start))
    return made


def _candidate(
    setup: Setup, records: "list[bench_output.BenchRecord]", scores: list[Any], start: first_token.FirstToken | str
) -> Candidate:
    from llama2.evaluate.report import Row

    sums, counts = [float(s.nll.sum()) for s in scores], [len(s.nll) for s in scores]
    nll = statistics.ratio_of_sums(sums, counts)
    value = math.exp(nll.value)
    rows = [record.report_row() for record in records] + bench_output.start_rows(setup.name, start)
    rows.append(Row(setup.name, "file size", setup.headers.file_bytes / 1e6, None, "MB", "lower"))
    error = None if nll.error is None else nll.error * value
    rows.append(Row(setup.name, "perplexity", value, error, "", "lower"))
    memory = setup.headers.file_bytes
    if isinstance(start, first_token.FirstToken) and start.peak_bytes is not None:
        memory = max(memory, start.peak_bytes)
    prefill, decode = (record.samples.rate for record in records)
    return Candidate(setup.name, decode, prefill, memory, sums, counts, rows)


def decide(candidates: list[Candidate], loss: float, memory_gb: float | None) -> tuple[Candidate, str]:
    """The file to use, and why. Raises InputError where none fits the memory."""
    room = memory_gb * 1e9 if memory_gb is not None else total_bytes()
    fitting = [each for each in candidates if each.memory <= room]
    if not fitting:
        least = min(candidates, key=lambda each: each.memory)
        raise InputError(f"none fits {size(room)}: {least.name}, the smallest, takes {size(least.memory)}")
    best = min(fitting, key=lambda each: each.nll)
    good = [each for each in fitting if math.exp(each.nll - best.nll) <= 1 + loss]
    chosen = max(good, key=lambda each: each.decode)
    if chosen is best:
        faster = [each for each in fitting if each.decode > chosen.decode]
        why = "it has the best perplexity" + ("" if faster else " and is the fastest")
        return chosen, f"{why}; {chosen.decode:.1f} tokens/s, {size(chosen.memory)} of memory"
    ratio = statistics.ratio_of_sums([a - b for a, b in zip(chosen.losses, best.losses, strict=True)], chosen.counts)
    given = math.expm1(ratio.value)
    error = "" if ratio.error is None else f" ± {100 * ratio.error:.2g}"
    return chosen, (
        f"{chosen.decode:.1f} tokens/s, {chosen.decode / best.decode:.2f} times those of {best.name}, for "
        f"{100 * given:.2g}{error} % more perplexity; {size(chosen.memory)} of memory"
    )


def _show(options: ChooseOptions, found: list[Candidate], chosen: Candidate, why: str) -> None:
    from llama2.evaluate import picture
    from llama2.evaluate.report import EvaluationReport
    from llama2.files import write_bytes

    ratios = {}
    for each in found:
        nll = statistics.ratio_of_sums(each.losses, each.counts)
        value = math.exp(nll.value)
        ratios[each.name] = (each.decode, value, None if nll.error is None else nll.error * value)
    title = f"Use {chosen.name}"
    made = picture.points(title, "tokens generated per second", "perplexity (lower is better)", ratios, chosen.name)
    write_bytes(Path(options.picture), made.encode())
    settings = {"loss": options.loss, "chosen": chosen.name, "why": why}
    report = EvaluationReport("choose", [row for each in found for row in each.rows], settings)
    print(report.as_json() if options.json else report.as_markdown())
    line = f"use {chosen.name}: {why}"
    if options.json or options.md:
        terminal.notice(f"llama2: {line}; picture in {options.picture}")
    else:
        print(f"\n{line}\npicture: {options.picture}")
