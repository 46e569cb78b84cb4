"""Conversion against a plain copy: rate, and the memory it takes.

    python bench/convert.py [--layers 32] [--shape 7b|70b] [--pairs meta:hf,hf:meta,hf:gguf] [--rounds 3] [--folder DIR]

Makes the source itself (Meta's format, bfloat16, seeded; 13.5 GB for 7b with all its layers), in DIR, and removes all
of it at the end. Each round copies the files (shutil.copyfile, then fsync) and converts them, taking turns in who goes
first; before either, the kernel is asked to forget source and leftovers, so that both read from the disk. Each
conversion runs in a process of its own, whose anonymous memory (RssAnon: what is not page cache) is sampled every
20 ms, and its seconds include the start of Python and torch. The last line is JSON.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from llama2 import LlamaConfig
from llama2.architecture import parameter_shapes
from llama2.checkpoint.meta_write import params_of
from llama2.checkpoint.names import hf_to_meta, meta_axis

CONVERT = """
import sys
from llama2.checkpoint.convert import ConversionSettings, convert
convert({source!r}, {target!r}, ConversionSettings({to!r}, shards={shards}))
"""


def make_source(folder: Path, config: LlamaConfig, shards: int) -> None:
    """Meta's files by torch.save, with random bits that repeat (numbers do not matter to a conversion)."""
    folder.mkdir(parents=True)
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).bfloat16()
    for rank in range(shards):
        state = {}
        for name, shape in parameter_shapes(config).items():
            axis, part = meta_axis(name), list(shape)
            if axis is not None:
                part[axis] //= shards
            count = torch.empty(part, device="meta").numel()
            state[hf_to_meta(name)] = noise.repeat(-(-count // len(noise)))[:count].view(part).clone()
        torch.save(state, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params_of(config)))


def size_of(path: Path) -> int:
    """Bytes of a file or of the files in a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def remove(path: Path) -> None:
    """Removes a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".sha256").unlink(missing_ok=True)


def files_of(path: Path) -> list[Path]:
    """The file itself, or those of a folder."""
    return [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())


def forget(path: Path) -> None:
    """Has the kernel drop its copies of the files, so that the next reader goes to the disk."""
    for file in files_of(path):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path) -> float:
    """Seconds of a plain copy, fsync included."""
    target.mkdir()
    start = time.perf_counter()
    for file in files_of(source):
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as written:
            os.fsync(written.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def watched(script: str) -> tuple[float, int, int]:
    """(seconds, peak RssAnon, peak VmRSS) of a Python process that runs the script."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script])
    anonymous = resident = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        found = dict(line.split(":", 1) for line in status.splitlines() if line.startswith(("RssAnon", "VmHWM")))
        anonymous = max(anonymous, int(found.get("RssAnon", "0 kB").split()[0]) << 10)
        resident = max(resident, int(found.get("VmHWM", "0 kB").split()[0]) << 10)
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"the conversion failed with {process.returncode}")
    return time.perf_counter() - start, anonymous, resident


def measure(
    pair: str, source: Path, target: Path, copied: Path, script: str, copy_first: bool
) -> dict[str, float | str]:
    """One copy and one conversion of the source, both from the disk."""
    size, seconds = size_of(source), 0.0
    for copying in (copy_first, not copy_first):
        forget(source)
        if target.exists():
            forget(target)
        if copying:
            seconds = copy(source, copied)
        else:
            converting, anonymous, resident = watched(script)
    return {
        "pair": pair, "GB": size / 1e9, "seconds": converting, "MB/s": size / converting / 1e6,
        "copy MB/s": size / seconds / 1e6, "ratio": seconds / converting, "anonymous MB": anonymous / 1e6,
        "resident MB": resident / 1e6,
    }  # fmt: skip


def show(row: dict[str, float | str]) -> None:
    """One line of the table."""
    print(
        "{pair:<10} {GB:5.2f} {seconds:8.1f} {MB/s:6.0f} {copy MB/s:11.0f} {ratio:6.2f} {anonymous MB:13.0f} "
        "{resident MB:12.0f}".format(**row),
        flush=True,
    )


def main() -> None:
    """Runs the benchmark and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["7b", "13b", "70b"], default="7b")
    parser.add_argument("--layers", type=int, default=None, help="default: all (7b, 13b), 2 (70b)")
    parser.add_argument("--shards", type=int, default=None, help="of Meta's format; default: as published")
    parser.add_argument("--pairs", default="meta:hf", help="conversions, such as meta:hf,hf:meta,hf:gguf")
    parser.add_argument("--rounds", type=int, default=3, help="of copy and conversion")
    parser.add_argument("--folder", default=None, help="where to work; the system's temporary folder by default")
    args = parser.parse_args()
    changes = {"num_hidden_layers": args.layers or 2} if args.layers or args.shape == "70b" else {}
    config = LlamaConfig.preset(args.shape, **changes)
    shards = args.shards or {"7b": 1, "13b": 2, "70b": 8}[args.shape]
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        places = {"meta": folder / "meta", "hf": folder / "hf", "gguf": folder / "x.gguf"}
        make_source(places["meta"], config, shards)
        started = watched("import llama2.checkpoint.convert")[0]
        print(f"Llama 2 {args.shape} shape, {config.num_hidden_layers} layers, {shards} shard(s) of Meta's, bfloat16")
        print(f"The seconds include {started:.1f} s in which Python starts and imports torch")
        print("conversion    GB  seconds   MB/s   copy MB/s  ratio  anonymous MB  resident MB (with mapped pages)")
        rows = []
        for pair in args.pairs.split(","):
            kind, to = pair.split(":")
            target = folder / ("out.gguf" if to == "gguf" else "out")
            script = CONVERT.format(
                source=str(places[kind]), target=str(target), to=to, shards=shards if to == "meta" else 1
            )
            for turn in range(args.rounds):
                rows.append(measure(pair, places[kind], target, folder / "copied", script, copy_first=turn % 2 == 0))
                show(rows[-1])
                if turn + 1 == args.rounds and not places[to].exists() and f"{to}:" in args.pairs:
                    target.rename(places[to])
                else:
                    remove(target)
    medians = {
        pair: statistics.median(row["ratio"] for row in rows if row["pair"] == pair) for pair in args.pairs.split(",")
    }
    print("median ratios: " + ", ".join(f"{pair} {ratio:.2f}" for pair, ratio in medians.items()))
    print(
        json.dumps(
            {
                "bench": "convert",
                "shape": args.shape,
                "layers": config.num_hidden_layers,
                "start": started,
                "medians": medians,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
