"""`llama2 shard`: the same Hugging Face checkpoint in files of another size."""

from dataclasses import dataclass

from llama2.cli.args import option, revision_option
from llama2.cli.convert import convert
from llama2.cli.names import resolve_name
from llama2.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ShardOptions:
    """Split a checkpoint into files of a size, or join it into one, without changing a bit. DST is a new folder."""

    paths: tuple[str, ...] = option((), "the checkpoint and the new folder", metavar="SRC DST", positional=True)
    size: str | None = option(None, "largest file, such as 500MB or 5GiB", metavar="SIZE")
    revision: str | None = revision_option("SRC")
    quiet: bool = option(False, "no progress bar")


def run(options: ShardOptions) -> int:
    """Runs the command."""
    if len(options.paths) != 2 or options.size is None:
        raise InputError("shard needs a source, a target and --size, such as `llama2 shard SRC DST --size 2GB`")
    source, target = resolve_name(options.paths[0]), options.paths[1]
    return convert(source, target, to="hf", shard_size=options.size, revision=options.revision, quiet=options.quiet)
