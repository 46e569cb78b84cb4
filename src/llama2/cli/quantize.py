"""`llama2 quantize`: a checkpoint in fewer bits, with calibration, a report, and resume."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llama2.cli.args import option, revision_option
from llama2.cli.names import resolve_name
from llama2.cli.progress import LayerBar
from llama2.errors import InputError

if TYPE_CHECKING:
    from llama2.quantize.report import Report

# Options that are called the same in the library.
_SETTINGS = (
    *(
        "bits",
        "group_size",
        "act_order",
        "static_groups",
        "mse",
        "passes",
        "damp",
        "format",
        "double_quant",
        "calibrate",
    ),
    *(
        "solve",
        "samples",
        "length",
        "seed",
        "true_sequential",
        "token_weights",
        "precision",
        "shard_size",
        "eval_tokens",
    ),
)
METHODS = "gptq, awq, w4a16 and fp8 (compressed-tensors), nf4, fp4, int8, or gguf:TYPE such as gguf:q4_k"


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """calibration (gptq, awq, w4a16 and gguf; nf4, fp4 and int8 with --calibrate)."""

    data: str | None = option(None, "text to calibrate on, or .jsonl of texts or messages (default: the one that comes "
                              "with llama2)", metavar="FILE")  # fmt: skip
    samples: int = option(128, "windows of that text, at most")
    length: int = option(512, "tokens of a window")
    seed: int = option(0, "which windows")
    calibrate: bool | None = option(
        None, "round with the inputs of each layer in mind (default: gptq, awq, w4a16, gguf)"
    )
    solve: bool = option(False, "of gguf: compensate the errors of rounded columns, which else are only weighed")
    true_sequential: bool = option(True, "linears see the inputs that those before them in the layer, quantised, give")
    token_weights: bool = option(True, "tokens count by the attention that they receive; --no-token-weights: all alike")
    precision: Literal["auto", "float32", "bfloat16"] = option("auto", "of the products that run the layers; auto is "
                                                               "bfloat16 where the processor has it")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """gptq, and of awq and w4a16 all but bits, asym and format."""

    bits: int = option(4, "of a weight: 2, 3, 4 or 8")
    group_size: int | None = option(None, "columns that share a scale, -1: whole rows (default: the largest of 128, "
                                    "64, 32 that divides every width of the model)")  # fmt: skip
    act_order: bool = option(False, "columns of large inputs first")
    static_groups: bool = option(False, "with --act-order: groups of neighbouring columns, which read faster")
    asym: bool = option(False, "zeros of their own for each group")
    mse: bool = option(True, "search the scale of least error for each group; --no-mse: the one that spans it")
    passes: int = option(0, "over the solution, each of which lowers its error a little")
    damp: float = option(0.01, "added to the Hessian's diagonal, in shares of its mean")
    format: Literal["gptq", "gptq_v2"] = option("gptq", "how zeros are stored: gptq is what every reader knows")


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(CalibrationOptions, Gptq):
    """Quantise a checkpoint: SRC is a folder, a file or a hub id; DST is a new folder, or a .gguf file.

    One layer is in memory at a time. An interrupted run goes on when the same command is given again."""

    paths: tuple[str, ...] = option((), "what to quantise, and the new folder or .gguf file", metavar="SRC DST",
                                    positional=True)  # fmt: skip
    method: str | None = option(None, f"{METHODS} (default: gguf:q4_k where DST ends in .gguf, else gptq)")
    double_quant: bool = option(False, "of nf4 and fp4: scales in 8 bits, as QLoRA")
    shard_size: str = option("5GB", "largest file of a folder, such as 500MB or 5GiB", metavar="SIZE")
    eval: str | None = option(None, "text for the perplexity before and after (default: the end of the calibration "
                              "text)", metavar="FILE")  # fmt: skip
    eval_tokens: int = option(4096, "tokens of it, 0: none")
    revision: str | None = revision_option("SRC")
    json: bool = option(False, "the report as JSON instead of tables")
    quiet: bool = option(False, "no progress bar")


def run(options: QuantizeOptions) -> int:
    """Runs the command."""
    if len(options.paths) != 2:
        raise InputError(f"quantize needs a source and a target, but {len(options.paths)} paths were given")
    source, target = resolve_name(options.paths[0]), options.paths[1]
    from llama2.checkpoint.source import locate_all
    from llama2.quantize.job import quantize

    if options.revision is not None:
        source = str(locate_all(source, options.revision).path)

    method = options.method or ("gguf:q4_k" if target.endswith(".gguf") else "gptq")
    settings = {name: getattr(options, name) for name in _SETTINGS}
    try:
        with LayerBar("quantising", options.quiet) as meter:
            report = quantize(source, target, method, data=options.data, held_out=options.eval, progress=meter,
                              sym=not options.asym, **settings)  # fmt: skip
    except KeyboardInterrupt:
        print("llama2: interrupted; the same command goes on from the last complete layer", file=sys.stderr)
        raise
    _show(report, options.json)
    return 0


def _show(report: "Report", as_json: bool) -> None:
    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps(asdict(report)))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_by_layer(report))
    console.print(_summary(report))
    console.print(_calibration(report))


def _by_layer(report: "Report") -> Any:
    from rich.table import Table

    from llama2.quantize.report import LINEARS

    calibrated = report.calibration is not None
    table = Table(title=f"relative error of the {'outputs' if calibrated else 'weights'} by layer, %")
    table.add_column("layer", justify="right")
    for name in LINEARS:
        table.add_column(name.removesuffix("_proj"), justify="right")
    for i, layer in enumerate(report.by_layer()):
        table.add_row(str(i), *(f"{100 * layer[name]:.2f}" for name in LINEARS))
    return table


def _summary(report: "Report") -> Any:
    from rich.table import Table

    table = Table(title=f"{Path(report.target).name}: {report.method}, {report.bits_per_weight:.2f} bits per weight")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("weights", f"{report.bytes_before / 1e6:,.1f} MB", f"{report.bytes_after / 1e6:,.1f} MB")
    found, speed = report.perplexity, report.tokens_per_second
    if "after" in found:
        table.add_row(f"perplexity, {found['tokens']:,} tokens", f"{found['before']:.3f}", f"{found['after']:.3f}")
        table.add_row("tokens per second", f"{speed['before']:.1f}", f"{speed['after']:.1f}")
    else:
        table.add_row("perplexity", "not measured", found["not measured"])
    return table


def _calibration(report: "Report") -> str:
    said = [f"{report.seconds:.0f} s, at most {report.peak_memory / 1e9:.2f} GB of memory"]
    if report.settings is not None and "group_size" in report.settings:
        said.insert(0, f"groups of {report.settings['group_size']}")
    if report.calibration is not None:
        c = report.calibration
        said.insert(0, f"calibrated on {c['windows']} windows of {c['length']} tokens of {c['text']}")
    if report.quantized_before:
        kinds = ", ".join(report.quantized_before)
        said.append(f"the source was quantised already ({kinds}): its own errors are in both columns")
    if report.resumed_layers:
        said.append(f"{report.resumed_layers} layers by an earlier run")
    return "; ".join(said)
