"""The spelling that Llama 2's documentation gives for converting Meta's files:

    python -m llama2.convert_llama_weights_to_hf --input_dir DIR --model_size 7B --output_dir OUT

The options are those of transformers 4.46. Three things are better than there: the dtype of the checkpoint is kept
(transformers rounds float16 to bfloat16), the context is Llama 2's 4,096 unless --llama_version says otherwise, and one
tensor is in memory at a time. The number of shards is read from the folder; a stated one must agree.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llama2 import checkpoint
from llama2.checkpoint import convert as engine
from llama2.checkpoint import tokenizer_files
from llama2.cli import explain
from llama2.cli.progress import Meter
from llama2.errors import InputError, Llama2Error

SHARDS: dict[str, int] = {
    **dict.fromkeys(("1B", "3B", "7B", "7Bf", "8B", "8Bf"), 1),
    **dict.fromkeys(("13B", "13Bf"), 2),
    **dict.fromkeys(("30B", "34B"), 4),
    **dict.fromkeys(("65B", "70B", "70Bf", "405B"), 8),
    "405B-MP16": 16,
}
CONTEXTS: dict[str, int] = {"1": 2048, "2": 4096, "3": 8192, "3.1": 131072, "3.2": 131072, "Guard-3": 131072}


def parser() -> argparse.ArgumentParser:
    """The options of transformers 4.46's script."""
    made = argparse.ArgumentParser(
        prog="python -m llama2.convert_llama_weights_to_hf",
        description="Meta's Llama files -> a Hugging Face folder. The dtype of the checkpoint is preserved.",
    )
    made.add_argument("--input_dir", required=True, help="folder with params.json, consolidated.*.pth, tokenizer.model")
    made.add_argument("--model_size", choices=[*SHARDS, "tokenizer_only"], help="checked against the files")
    made.add_argument("--output_dir", required=True, help="new folder")
    made.add_argument("--push_to_hub", action="store_true", help="upload to the repository named by --output_dir")
    made.add_argument(
        "--safe_serialization", nargs="?", const="true", default="true", choices=["true", "True"], help="always so"
    )
    made.add_argument("--llama_version", choices=list(CONTEXTS), help="sets the context; told from the files otherwise")
    made.add_argument("--num_shards", type=int, help="checked against the files")
    made.add_argument("--special_tokens", nargs="*", help="not supported: tokens that Llama 3's tokenizer adds")
    made.add_argument("--instruct", action="store_true", help="add Llama 2's chat template")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after an error that it explained."""
    options = parser().parse_args(argv)
    try:
        return _run(options)
    except (Llama2Error, OSError) as error:
        print(f"convert_llama_weights_to_hf: {explain(error)}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.special_tokens:
        raise InputError("--special_tokens belongs to Llama 3's tokenizer, which is not converted; leave it out")
    if options.push_to_hub:
        raise InputError("--push_to_hub: convert first, then upload with `hf upload REPOSITORY FOLDER`")
    folder, target = _input(Path(options.input_dir), options.model_size), Path(options.output_dir)
    if options.model_size == "tokenizer_only":
        target.mkdir(parents=True, exist_ok=True)
        tokenizer_files.write_folder(folder, target, options.instruct)
        return 0
    source = checkpoint.open(folder)
    if source.format != "meta":
        raise InputError(f"{folder} is a {source.format} checkpoint, not Meta's; use `llama2 convert` for it")
    found = len(list(folder.glob("consolidated.*.pth")))
    stated = options.num_shards or SHARDS.get(options.model_size)
    if stated is not None and stated != found:
        raise InputError(f"{folder} holds {found} shards, but the options say {stated}; is a file missing?")
    if options.llama_version is not None:
        source.config.max_position_embeddings = CONTEXTS[options.llama_version]
    with Meter("converting") as meter:
        engine.convert(source, target, engine.ConversionSettings("hf", chat=options.instruct or None), meter)
    print(f"{target}: {source.config.max_position_embeddings} tokens of context, weights as {source.auto_dtype}")
    return 0


def _input(folder: Path, size: str | None) -> Path:
    """The folder itself, or the one of the size in it, as older scripts had it."""
    inside = folder / (size or "")
    return inside if size and not (folder / "params.json").exists() and (inside / "params.json").exists() else folder


if __name__ == "__main__":
    sys.exit(main())
