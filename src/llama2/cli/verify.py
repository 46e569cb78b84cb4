"""`llama2 verify`: hashes a converted checkpoint again and compares with its manifest."""

from dataclasses import dataclass

from llama2.cli.args import option
from llama2.cli.progress import Meter
from llama2.errors import InputError


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Check a folder or GGUF file that `llama2 convert` wrote against the hashes beside it."""

    paths: tuple[str, ...] = option((), "the folder or .gguf file", metavar="DIR", positional=True)
    quiet: bool = option(False, "no progress bar")


def run(options: VerifyOptions) -> int:
    """Runs the command."""
    from llama2.checkpoint.convert import verify

    if len(options.paths) != 1:
        raise InputError(f"verify checks one checkpoint, but {len(options.paths)} paths were given")
    with Meter("verifying", options.quiet) as meter:
        names = verify(options.paths[0], meter)
    print(f"{options.paths[0]}: {len(names)} files match")
    return 0
