"""Quantised files beside each other: bits, size, perplexity of the unpacked weights, decoding speed.

    python bench/quantise.py --text TEXT --base FOLDER NAME=PATH ... [--reader rival] [--tokens 20480] [--speed]

Folders and GGUF files, ours and others'. Every row's weights are unpacked to float32 and run by one procedure (windows
of 512 tokens, each window's first token unscored), so that rows differ only in their quantisation. "excess" is the mean
of the row's negative log-likelihoods less the base's, in thousandths of a nat a token, with the standard error of that
mean over the windows: two rows whose excesses are nearer than that are level on this text. Bits count what the file
holds of the layers' linears, tables and indices included. --reader rival unpacks with the package that wrote the file
(`rival_weights.py`). --keep FILE remembers rows, so that a later call measures only what is new. --speed decodes with
the native engine and with the file's own runtime, in turns (`regime.py`).
The last line is JSON.
"""

import argparse
import itertools
import json
import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import rival_weights
import torch
from regime import Regime
from rich.console import Console
from rich.table import Table

from llama2 import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, checkpoint
from llama2.architecture import linear_shapes
from llama2.checkpoint.gguf_weights import GgufCheckpoint
from llama2.checkpoint.quantized import unpacked
from llama2.cpu import CpuRunner, PagedCache
from llama2.errors import CheckpointError, InputError
from llama2.evaluate.perplexity import perplexity
from llama2.runners.native import NativeModel

WINDOW = 512
RIVALS: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {
    "gguf": rival_weights.gguf,
    "gptq": rival_weights.gptqmodel,
    "bitsandbytes": rival_weights.bitsandbytes,
}


@dataclass
class Row:
    """What was measured of one file. bits: of the layers' linears; megabytes: all weight files; nll: by window."""

    name: str
    method: str
    bits: float
    megabytes: float
    nll: list[float] = field(repr=False)
    tokens: int = 0
    perplexity: float = 0.0
    excess: float = 0.0
    error: float = 0.0
    speed: dict[str, float] = field(default_factory=dict)


def method_of(path: Path) -> str:
    """gguf, the quant_method of a folder, or "plain"."""
    if path.is_file():
        return "gguf"
    content = json.loads((path / "config.json").read_text())
    return str(content.get("quantization_config", {}).get("quant_method", "plain"))


def sizes(path: Path) -> dict[str, int]:
    """Stored bytes by Hugging Face's tensor names."""
    if path.is_file():
        file = GgufCheckpoint(path)
        return {name: math.prod(i.shape[:-1]) * b.row_bytes(i.shape[-1]) for name, (i, b) in file._infos.items()}
    found = {}
    for part in sorted(path.glob("*.safetensors")):
        with part.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        found |= {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
    return found


def storage(path: Path) -> tuple[float, float]:
    """Bits per weight of the layers' linears, and megabytes of the weight files."""
    shapes = linear_shapes(checkpoint.open(path).config)
    held = sum(n for name, n in sizes(path).items() if any(name.startswith(f"{p}.") for p in _owners(name, shapes)))
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return held * 8 / sum(math.prod(s) for s in shapes.values()), sum(f.stat().st_size for f in files) / 1e6


def _owners(name: str, shapes: dict[str, tuple[int, int]]) -> list[str]:
    """The linear of a tensor: its name holds at most three more parts."""
    parts = name.split(".")
    return [path for k in range(1, 4) if (path := ".".join(parts[: len(parts) - k])) in shapes][:1]


def unpacked_model(path: Path, reader: str) -> LlamaForCausalLM:
    """The file's weights in float32."""
    source = unpacked(checkpoint.open(path))
    rival = RIVALS.get(method_of(path)) if reader == "rival" else None
    found = rival(path) if rival else {name: source.read(name, torch.float32) for name in source.tensors}
    model: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(
        None, config=source.config, state_dict=found, dtype=torch.float32
    )
    return model


def losses(model: LlamaForCausalLM, ids: list[int]) -> list[float]:
    """Negative log-likelihood by window, summed over its tokens."""
    totals = [0.0]

    def note(end: int, _: int, value: float) -> None:
        totals.append(math.log(value) * (end - len(totals)))  # each window's first token is unscored

    perplexity(model, ids, WINDOW, on_window=note)
    return [b - a for a, b in itertools.pairwise(totals)]


def measure(name: str, path: Path, ids: list[int], reader: str, keep: Path | None = None) -> Row:
    """The row of a file, or the one that `keep` has of the same name, path, time of writing, reader and text."""
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    key = json.dumps([name, str(path), max(f.stat().st_mtime for f in files), reader, len(ids), sum(ids)])
    kept = json.loads(keep.read_text()) if keep is not None and keep.exists() else {}
    if key not in kept:
        kept[key] = asdict(_measured(name, path, ids, reader))
        if keep is not None:
            keep.write_text(json.dumps(kept))
    return Row(**kept[key])


def _measured(name: str, path: Path, ids: list[int], reader: str) -> Row:
    nll = losses(unpacked_model(path, reader), ids)
    tokens = len(ids) - len(nll)
    return Row(name, method_of(path), *storage(path), nll, tokens, math.exp(sum(nll) / tokens))


def compare(row: Row, base: Row) -> None:
    """Fills the row's excess over the base and its standard error."""
    scored = WINDOW - 1
    apart = [(a - b) / scored * 1e3 for a, b in zip(row.nll, base.nll, strict=True)]
    row.excess = statistics.mean(apart)
    row.error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.inf


def native_decoder(path: Path) -> tuple[NativeModel, Callable[[int], Any]]:
    """Our engine behind a prompt."""
    packed = path.is_file()
    model = (
        NativeModel.from_gguf(path) if packed else NativeModel.from_module(AutoModelForCausalLM.from_pretrained(path))
    )
    runner, cache = CpuRunner(model.weights), PagedCache(model.weights, 2048)
    sequence = cache.sequence()
    runner.feed(sequence, list(range(3, 19)))
    return model, lambda count: [runner.feed(sequence, [7]) for _ in range(count)]


def speed(path: Path, rounds: int, tokens: int) -> dict[str, float]:
    """Median tokens per second of each engine, and the native engine's share of a plain read of its weights."""
    try:
        model, ours = native_decoder(path)
    except (CheckpointError, InputError) as error:
        print(f"{path.name}: not run natively: {error}")
        return {}
    regime = Regime(model.weights.pool)
    found: dict[str, list[float]] = {"native": [], "of read": []}
    try:
        theirs = rival_weights.decoder(path, method_of(path))
        found["own"] = []
    except ImportError as error:
        print(f"{path.name}: its own runtime is not here: {error}")
    for _ in range(rounds):
        unit = regime.time(lambda: ours(tokens))
        found["native"].append(tokens / unit.seconds)
        found["of read"].append(model.weights.decode_bytes * tokens / unit.seconds / unit.read)
        if "own" in found:
            found["own"].append(tokens / regime.time(lambda: theirs(tokens)).seconds)
    return {name: round(statistics.median(values), 3) for name, values in found.items()}


def show(rows: list[Row]) -> None:
    table = Table(title=f"{rows[0].tokens} tokens scored")
    for column in ("file", "bits/weight", "MB", "perplexity", "excess, mnat", "native tok/s", "its own tok/s"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for row in rows:
        rates = [f"{row.speed[k]:.1f}" if k in row.speed else "-" for k in ("native", "own")]
        excess = f"{row.excess:.1f} ± {row.error:.1f}" if row.excess or row.error else "-"
        table.add_row(row.name, f"{row.bits:.3f}", f"{row.megabytes:.1f}", f"{row.perplexity:.3f}", excess, *rates)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="NAME=PATH", help="files to measure; a bare path is its own name")
    parser.add_argument("--base", type=Path, required=True, help="the 16-bit weights all were made from")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20480, help="of the text, from its start: whole windows")
    parser.add_argument("--reader", choices=["ours", "rival"], default="ours")
    parser.add_argument("--keep", type=Path, help="JSON file of rows measured before, read and added to")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    ids = tokenizer(args.text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    ids = ids[: min(args.tokens, len(ids)) // WINDOW * WINDOW]
    base = measure(f"{args.base.name} (base)", args.base, ids, "ours", args.keep)
    rows = [base]
    for given in args.rows:
        name, _, place = given.rpartition("=")
        path = Path(place)
        row = measure(name or path.name, path, ids, args.reader, args.keep)
        compare(row, base)
        rows.append(row)
        if args.speed:
            row.speed = speed(path, args.rounds, 20)
        print(f"{row.name}: perplexity {row.perplexity:.4f}, {row.excess:.2f} ± {row.error:.2f}", flush=True)
    show(rows)
    print(json.dumps({"bench": "quantise", "text": args.text.name, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
