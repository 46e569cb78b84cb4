"""Output of `llama2 bench`: llama-bench's table and rows, and the report that all measuring commands share."""

import csv
import datetime
import json
import statistics as spread
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import llama2
from llama2.cli import terminal
from llama2.cli.first_token import FirstToken
from llama2.cli.info import size
from llama2.cli.inspect import main_type
from llama2.evaluate import machine
from llama2.evaluate.report import EvaluationReport, Row
from llama2.evaluate.statistics import Interval

if TYPE_CHECKING:
    from llama2.cli.bench import BenchOptions, Setup
    from llama2.evaluate.speed import Samples, SpeedBench

_COLUMNS = ("model", "size", "params", "backend", "threads", "test", "t/s", "of read", "of arithmetic")
_RIGHT = {"size", "params", "threads", "test", "t/s", "of read", "of arithmetic", "ratio"}


@dataclass(frozen=True)
class BenchRecord:
    """A test of a setup, measured. ratio: its speed in that of the first model of a pair."""

    setup: "Setup"
    bench: "SpeedBench"
    limits: machine.Limits | None
    samples: "Samples"
    ratio: Interval | None = None

    @property
    def backend(self) -> str:
        """The native engine with its instruction set, or torch with its device."""
        return self.bench.steps.engine

    @property
    def of_read(self) -> float | None:
        """Bytes per second of a decoding step in those of a plain read; None for a test that decodes nothing."""
        test = self.samples.test
        if self.limits is None or not test.new or test.prompt:
            return None
        steps = self.samples.rate / test.sequences
        return self.bench.step_bytes(test) * steps / self.limits.read

    @property
    def of_arithmetic(self) -> float | None:
        """Operations per second of a prompt in those that the machine does at best in the same arithmetic."""
        from llama2.cli.bench import quantised

        test = self.samples.test
        if self.limits is None or not test.prompt or test.new:
            return None
        kind = self.bench.arithmetic(quantised(self.setup.headers))
        return self.samples.rate * self.bench.token_operations(test) / self.limits.operations[kind]

    @property
    def joules_per_token(self) -> float | None:
        """Energy per token of the processor's packages, all processes included."""
        joules = self.samples.joules
        return None if joules is None else joules / (self.samples.tokens * len(self.samples.seconds))

    def fields(self) -> dict[str, Any]:
        """A row under llama-bench's names, and ours behind them."""
        samples, test, headers = self.samples, self.samples.test, self.setup.headers
        nanoseconds = [round(seconds * 1e9) for seconds in samples.seconds]
        return {
            "build_commit": f"llama2-{llama2.__version__}",
            "build_number": 0,
            "cpu_info": machine.processor(),
            "gpu_info": "",
            "backends": self.backend,
            "model_filename": self.setup.path,
            "model_type": kind(self.setup),
            "model_size": headers.file_bytes,
            "model_n_params": headers.parameters,
            "n_batch": self.bench.batch,
            "n_ubatch": min(self.bench.batch, 512),
            "n_threads": self.bench.threads,
            "type_k": self.bench.cache_dtype,
            "type_v": self.bench.cache_dtype,
            "n_gpu_layers": 0,
            "use_mmap": int(not self.setup.options.no_mmap),
            "n_prompt": test.prompt,
            "n_gen": test.new,
            "n_depth": test.depth,
            "test_time": datetime.datetime.fromtimestamp(samples.began, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "avg_ns": round(spread.fmean(nanoseconds)),
            "stddev_ns": round(spread.stdev(nanoseconds)) if len(nanoseconds) > 1 else 0,
            "avg_ts": samples.rate,
            "stddev_ts": samples.deviation or 0.0,
            "samples_ns": nanoseconds,
            "samples_ts": samples.rates,
            "n_sequences": test.sequences,
            "precision": self.bench.precision,
            "share_of_read": self.of_read,
            "share_of_arithmetic": self.of_arithmetic,
            "joules_per_token": self.joules_per_token,
            "others_share": samples.taken,
            "ratio": None if self.ratio is None else self.ratio.value,
            "ratio_low": None if self.ratio is None else self.ratio.low,
            "ratio_high": None if self.ratio is None else self.ratio.high,
        }

    def report_row(self) -> Row:
        """The row of the common report."""
        details = {"deviation": True, **{k: v for k, v in self.fields().items() if k in _DETAILS}}
        name, samples = self.setup.name, self.samples
        return Row(name, samples.test.name, samples.rate, samples.deviation, "tokens/s", "higher", details=details)


_DETAILS = (
    "n_batch", "n_threads", "type_k", "precision", "samples_ns", "share_of_read", "share_of_arithmetic",
    "joules_per_token", "others_share", "ratio", "ratio_low", "ratio_high", "backends",
)  # fmt: skip


def kind(setup: "Setup") -> str:
    """The model as llama-bench names it: architecture, size and type."""
    headers = setup.headers
    count = headers.parameters
    amount = f"{count / 1e9:.0f}B" if count >= 5e9 else f"{count / 1e9:.2g}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
    return f"llama {amount} {main_type(headers)}" if headers.types else f"llama {amount}"


class Printer:
    """Prints rows as they are measured, and what is known at the end."""

    def __init__(self, options: "BenchOptions") -> None:
        self.options = options
        self._live = not (options.json or options.md)
        self._begun = False

    def rows(self, records: Sequence[BenchRecord]) -> None:
        """Rows of one test."""
        if not self._live or self.options.output == "json":
            return
        for record in records:
            getattr(self, f"_{self.options.output}")(record)
        sys.stdout.flush()

    def _md(self, record: BenchRecord) -> None:
        columns = [*_COLUMNS, *(["ratio"] if self.options.against is not None else [])]
        if not self._begun:
            print("| " + " | ".join(columns) + " |")
            print("| " + " | ".join("---:" if name in _RIGHT else "---" for name in columns) + " |")
        self._begun = True
        samples = record.samples
        speed = f"{samples.rate:.2f}" + ("" if samples.deviation is None else f" ± {samples.deviation:.2f}")
        several = self.options.against is not None or len(self.options.models) > 1
        cells = [
            f"{kind(record.setup)} ({record.setup.name})" if several else kind(record.setup),
            size(record.setup.headers.file_bytes),
            f"{record.setup.headers.parameters / 1e6:.2f} M",
            record.backend,
            str(record.bench.threads),
            samples.test.name,
            speed,
            _percent(record.of_read),
            _percent(record.of_arithmetic),
        ]
        if self.options.against is not None:
            cells.append("" if record.ratio is None else interval(record.ratio))
        print("| " + " | ".join(cells) + " |")

    def _csv(self, record: BenchRecord) -> None:
        fields = record.fields()
        writer = csv.writer(sys.stdout, quoting=csv.QUOTE_ALL, lineterminator="\n")
        if not self._begun:
            writer.writerow(fields)
        self._begun = True
        writer.writerow("" if value is None else json.dumps(value) if isinstance(value, list) else value
                        for value in fields.values())  # fmt: skip

    def _jsonl(self, record: BenchRecord) -> None:
        print(json.dumps(record.fields()))

    def _sql(self, record: BenchRecord) -> None:
        fields = record.fields()
        if not self._begun:
            kinds = ", ".join(f"{name} {_sql_type(value)}" for name, value in fields.items())
            print(f"CREATE TABLE IF NOT EXISTS llama_bench ({kinds});")
        self._begun = True
        values = ", ".join(_sql_value(value) for value in fields.values())
        print(f"INSERT INTO llama_bench ({', '.join(fields)}) VALUES ({values});")

    def end(
        self, records: Sequence[BenchRecord], starts: Mapping[str, FirstToken | str], setups: "Sequence[Setup]"
    ) -> None:
        """Prints the summary of all tests: the report, or the lines below a table."""
        made = report(self.options, records, starts, setups)
        if self.options.json or self.options.md:
            print(made.as_json() if self.options.json else made.as_markdown())
        elif self.options.output == "json":
            print(json.dumps([record.fields() for record in records], indent=2))
        if shown := self._live and self.options.output == "md":
            print()
        for line in _beside(records, starts):
            if shown:
                print(line)
            else:
                terminal.notice(f"llama2: {line}")


def report(
    options: "BenchOptions",
    records: Sequence[BenchRecord],
    starts: Mapping[str, FirstToken | str],
    setups: "Sequence[Setup]",
) -> EvaluationReport:
    """The common report."""
    rows = [record.report_row() for record in records]
    for name, found in starts.items():
        rows += start_rows(name, found)
    rows += [Row(s.name, "file size", s.headers.file_bytes / 1e6, None, "MB", "lower") for s in setups]
    models = {
        setup.name: {
            "path": setup.path,
            "kind": kind(setup),
            "file_bytes": setup.headers.file_bytes,
            "parameters": setup.headers.parameters,
        }
        for setup in setups
    }
    limits = next((record.limits for record in records if record.limits is not None), None)
    about = machine.describe() | ({} if limits is None else {"read_bytes_per_s": limits.read})
    if limits is not None:
        about["operations_per_s"] = dict(zip(("int8", "bfloat16", "float32"), limits.operations, strict=True))
    return EvaluationReport("bench", rows, {"repetitions": options.repetitions}, models, about)


def start_rows(name: str, start: FirstToken | str) -> list[Row]:
    """Rows of a process's start and memory, where it could run."""
    if isinstance(start, str):
        return []
    rows = [Row(name, "process start to first token", start.seconds, None, "s", "lower")]
    if start.peak_bytes is not None:
        rows.append(Row(name, "peak memory", start.peak_bytes / 1e6, None, "MB", "lower"))
    return rows


def _beside(records: Sequence[BenchRecord], starts: Mapping[str, FirstToken | str]) -> list[str]:
    lines = []
    for name, found in starts.items():
        if isinstance(found, str):
            lines.append(f"{name}: no first token was timed: {found}")
        else:
            memory = "" if found.peak_bytes is None else f", {size(found.peak_bytes)} of memory at most"
            lines.append(f"{name}: {found.seconds:.2f} s from process start to first token{memory}")
    if (limits := next((r.limits for r in records if r.limits is not None), None)) is not None:
        kinds = zip(("int8", "bfloat16", "float32"), limits.operations, strict=True)
        best = ", ".join(f"{value / 1e9:.0f} G {name}" for name, value in kinds)
        lines.append(f"this machine: {limits.read / 1e9:.1f} GB/s read; {best} operations per second")
    lines += [
        f"{record.setup.name}, {record.samples.test.name}: {joules:.3g} J per token"
        for record in records
        if (joules := record.joules_per_token) is not None
    ]
    return lines


def interval(ratio: Interval) -> str:
    """A ratio with its bounds."""
    if ratio.low is None:
        return f"{ratio.value:.3f}"
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _sql_type(value: Any) -> str:
    return "INTEGER" if isinstance(value, int) else "REAL" if value is None or isinstance(value, float) else "TEXT"


def _sql_value(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, int | float):
        return repr(value)
    text = json.dumps(value) if isinstance(value, list) else str(value)
    return "'" + text.replace("'", "''") + "'"
