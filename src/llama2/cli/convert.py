"""`llama2 convert`: a checkpoint of any origin to Hugging Face's, Meta's or llama.cpp's format."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llama2.cli.args import option, revision_option
from llama2.cli.names import resolve_name
from llama2.cli.progress import Meter
from llama2.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Convert a checkpoint: SRC is a folder, a file or a hub id and is recognised by its content; DST is new.

    One tensor is in memory at a time. An interrupted conversion goes on when the same command is given again."""

    paths: tuple[str, ...] = option((), "what to convert, and the new folder or .gguf file", metavar="SRC DST",
                                    positional=True)  # fmt: skip
    to: Literal["hf", "meta", "gguf"] | None = option(None, "format (default: gguf where DST ends in .gguf, else hf)")
    dtype: str = option("keep", "keep, float16, bfloat16, float32; for gguf also q8_0, q6_k, q5_k_m, q5_k_s, q5_1, "
                        "q5_0, q4_k_m, q4_k_s, iq4_xs, iq4_nl, q4_1, q4_0, q3_k_l, q3_k_m, q3_k_s, "
                        "q2_k", metavar="TYPE")  # fmt: skip
    shard_size: str = option("5GB", "largest file of --to hf, such as 500MB or 5GiB", metavar="SIZE")
    shards: int = option(1, "number of files of --to meta")
    split_size: str | None = option(None, "of gguf: parts of at most this size, such as 2GB; any part, or the name "
                                    "without its number, is the model", metavar="SIZE")  # fmt: skip
    kv_heads: int | None = option(None, "pool the key and value heads to this many, by their mean (for uptraining)")
    imatrix: str | None = option(None, "importance matrix (a file of llama-imatrix) for the block types "
                                 "of gguf", metavar="FILE")  # fmt: skip
    chat: bool = option(False, "add Llama 2's chat template (Meta folders named *-chat get it anyway)")
    requantize: bool = option(False, "of gguf: let --dtype round quantised weights a second time, and measure the loss")
    eval_tokens: int = option(2048, "of --requantize: tokens of a text on which both models are compared, 0: none")
    as_adapter: bool = option(False, "SRC is a LoRA adapter and stays one: of peft's folder a GGUF adapter for "
                              "llama.cpp, or the reverse (without it: its model, merged)")  # fmt: skip
    base: str | None = option(None, "of --as-adapter: the model that the adapter is for (default: the one that it "
                              "names)", metavar="MODEL")  # fmt: skip
    revision: str | None = revision_option("SRC")
    quiet: bool = option(False, "no progress bar")


def run(options: ConvertOptions) -> int:
    """Runs the command."""
    if len(options.paths) != 2:
        raise InputError(f"convert needs a source and a target, but {len(options.paths)} paths were given")
    if options.as_adapter:
        return _convert_adapter(options)
    if options.base is not None:
        raise InputError("--base says which model an adapter is for; it goes with --as-adapter")
    return convert(
        resolve_name(options.paths[0]),
        options.paths[1],
        to=options.to or ("gguf" if options.paths[1].endswith(".gguf") else "hf"),
        dtype=options.dtype,
        shard_size=options.shard_size,
        shards=options.shards,
        kv_heads=options.kv_heads,
        chat=options.chat or None,
        imatrix=options.imatrix,
        split_size=options.split_size,
        requantize=options.requantize,
        eval_tokens=options.eval_tokens,
        revision=options.revision,
        quiet=options.quiet,
    )


def convert(
    source: str,
    target: str,
    *,
    to: str,
    dtype: str = "keep",
    shard_size: str = "5GB",
    shards: int = 1,
    kv_heads: int | None = None,
    chat: bool | None = None,
    adapter: str | None = None,
    imatrix: str | None = None,
    split_size: str | None = None,
    requantize: bool = False,
    eval_tokens: int = 0,
    revision: str | None = None,
    quiet: bool = False,
) -> int:
    """Converts with a progress bar and says what came of it."""
    if eval_tokens < 0 or 0 < eval_tokens < 16:
        raise InputError(f"--eval-tokens is {eval_tokens}; give 16 at least, or 0 for none")
    from llama2.checkpoint import convert as engine
    from llama2.checkpoint.source import locate_all

    settings = engine.ConversionSettings(
        to, dtype, shard_size, shards, kv_heads, chat, adapter, imatrix, split_size=split_size, requantize=requantize
    )
    try:
        with Meter("converting" if adapter is None else "merging", quiet) as meter:
            result = engine.convert(locate_all(source, revision), target, settings, meter)
    except KeyboardInterrupt:
        print("llama2: interrupted; the same command goes on from here", file=sys.stderr)
        raise
    again = f", {result.resumed_bytes / 1e9:.2f} GB of it by an earlier run" if result.resumed_bytes else ""
    print(f"{Path(target)}: {result.format}, {result.bytes / 1e9:.2f} GB of weights{again}")
    if result.requantized is not None:
        from llama2.cli.requantized import tell

        plain = adapter is None and kv_heads is None  # else the source is another model
        tell(result.requantized, str(locate_all(source, revision).path), result.path, eval_tokens if plain else 0)
    return 0


def _convert_adapter(options: ConvertOptions) -> int:
    """peft's folder to a GGUF adapter, or the reverse."""
    from llama2.auto import load_config
    from llama2.checkpoint.convert_adapter import check_paths, convert_adapter, named_base
    from llama2.cli.loading import adapter_folder

    free = ("paths", "as_adapter", "base", "revision", "quiet")
    fields = ConvertOptions.__dataclass_fields__
    if others := [name for name in fields if name not in free and getattr(options, name) != fields[name].default]:
        raise InputError(
            f"--{others[0].replace('_', '-')} is for models; an adapter's tensors stay as they are stored: leave it out"
        )
    source, target = adapter_folder(options.paths[0], options.revision), Path(options.paths[1])
    check_paths(source, target)
    named = named_base(source)
    base = options.base or named
    if base is None:
        raise InputError(f"{source} does not say which model it is for; give that model with --base")
    made = convert_adapter(source, target, load_config(resolve_name(base)), named or base)
    print(f"{target}: {'GGUF adapter' if target.suffix == '.gguf' else 'peft adapter'} of {len(made.modules)} modules")
    return 0
