"""`llama2 merge-adapter`: a LoRA adapter merged into the weights permanently, one tensor at a time."""

from dataclasses import dataclass
from typing import Literal

from llama2.cli.args import option, revision_option
from llama2.cli.convert import convert
from llama2.cli.names import resolve_name
from llama2.errors import InputError


@dataclass(frozen=True, kw_only=True)
class MergeAdapterOptions:
    """Add a LoRA adapter to the weights of a checkpoint: BASE is a folder, a file or a hub id, ADAPTER the folder that
    peft wrote or a GGUF adapter, DST is new. Sums are float32 and rounded once, to the dtype of the base unless --dtype
    gives another.

    An interrupted run goes on when the same command is given again."""

    paths: tuple[str, ...] = option((), "the model, the adapter, and the new folder or .gguf file",
                                    metavar="BASE ADAPTER DST", positional=True)  # fmt: skip
    to: Literal["hf", "meta", "gguf"] | None = option(None, "format (default: gguf where DST ends in .gguf, else hf)")
    dtype: str = option("keep", "keep, float16, bfloat16, float32, or a block type for gguf, as in convert",
                        metavar="TYPE")  # fmt: skip
    shard_size: str = option("5GB", "largest file of --to hf, such as 500MB or 5GiB", metavar="SIZE")
    requantize: bool = option(False, "let --dtype round quantised weights of the base a second time")
    revision: str | None = revision_option("BASE")
    quiet: bool = option(False, "no progress bar")


def run(options: MergeAdapterOptions) -> int:
    """Runs the command."""
    if len(options.paths) != 3:
        raise InputError(f"merge-adapter needs a base, an adapter and a target, but {len(options.paths)} were given")
    base, adapter, target = resolve_name(options.paths[0]), *options.paths[1:]
    return convert(
        base,
        target,
        to=options.to or ("gguf" if target.endswith(".gguf") else "hf"),
        dtype=options.dtype,
        shard_size=options.shard_size,
        adapter=adapter,
        requantize=options.requantize,
        revision=options.revision,
        quiet=options.quiet,
    )
