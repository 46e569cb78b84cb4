"""The `llama2` command: a table of commands, each imported only when it is called, and one place for errors.

A command is a module with a dataclass whose fields become the flags, called as the command (`ServeOptions`,
`MergeAdapterOptions`), and `run(options) -> exit code`. One with several tasks has `TASKS`, such a dataclass for each,
and `SUMMARY`, what `--help` says of each.
"""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TextIO

import llama2
from llama2.errors import InputError, Llama2Error, needs_torch

# name -> (module, what `llama2 --help` says)
COMMANDS: dict[str, tuple[str, str]] = {
    "chat": ("llama2.cli.chat", "talk with a model"),
    "generate": ("llama2.cli.generate", "continue a prompt, or answer it with --chat"),
    "serve": (
        "llama2.cli.serve",
        "many users at once over HTTP: OpenAI's, Anthropic's, Ollama's, TGI's, ... APIs",
    ),
    "batch": ("llama2.cli.batch", "answer a file of requests, line by line; resumable"),
    "tokenize": ("llama2.cli.tokenize", "text to token ids and back"),
    "info": ("llama2.cli.info", "what a model file is, its size and the memory it needs"),
    "convert": ("llama2.cli.convert", "between Hugging Face, Meta and GGUF checkpoints, in bounded memory"),
    "quantize": ("llama2.cli.quantize", "a checkpoint in fewer bits: GPTQ, AWQ, NF4, int8, FP8 or GGUF, with a report"),
    "finetune": (
        "llama2.cli.finetune",
        "train a model on your rows: sft, dpo, reward, classify, ...; LoRA, QLoRA or whole",
    ),
    "align": ("llama2.cli.align", "make a policy better by rewards: rejection sampling, ppo, grpo, rloo"),
    "train": ("llama2.cli.train", "finetune as a SageMaker training job: hyperparameters and channels under /opt/ml"),
    "classify": ("llama2.cli.classify", "labels of texts, with their probabilities, by a classifier that was trained"),
    "score": ("llama2.cli.score", "rewards of answers, by a reward model that was trained"),
    "merge-adapter": ("llama2.cli.merge_adapter", "put a LoRA adapter into the weights permanently"),
    "shard": ("llama2.cli.shard", "split a checkpoint into files of a size"),
    "verify": ("llama2.cli.verify", "check a converted checkpoint against its hashes"),
    "pack": ("llama2.cli.pack", "keep a GGUF file's packed weights beside it, for instant starts"),
    "perplexity": ("llama2.cli.perplexity", "how well a model predicts a text"),
    "evaluate": (
        "llama2.cli.evaluate",
        "tasks of lm-evaluation-harness, long contexts, two models before a judge; resumable",
    ),
    "choose": ("llama2.cli.choose", "which of these files to use on this machine"),
    "compare": ("llama2.cli.compare", "how far models are from another one on a text: KL, flips, perplexity ratio"),
    "bench": ("llama2.cli.bench", "how fast models run here, beside what the machine can do"),
    "embed": ("llama2.cli.embed", "vectors of texts"),
    "report": ("llama2.cli.report", "what measuring commands found, side by side"),
    "pull": ("llama2.cli.pull", "fetch a model from the Hugging Face hub"),
    "list": ("llama2.cli.list_models", "the models on this machine"),
    "show": ("llama2.cli.info", "the same as info"),
    "rm": ("llama2.cli.rm", "remove models from the cache"),
    "ps": ("llama2.cli.ps", "the servers of this user"),
    "config": ("llama2.cli.show_config", "the options that files and the environment set"),
    "doctor": ("llama2.cli.doctor", "what this machine has, and what is wrong with it: for bug reports"),
    "completion": ("llama2.cli.completion", "a script that completes commands in bash, zsh or fish"),
}
# Commands that need torch whatever they are given -> the extra that brings it. Others need it for some models only.
NEEDS_TORCH = {
    **dict.fromkeys(("convert", "quantize", "merge-adapter", "shard"), "torch"),
    **dict.fromkeys(("finetune", "align", "train", "classify", "score"), "train"),
}
USAGE_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code: 0, 2 after an error that it explained, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words[: words.index("--") if "--" in words else None]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code = _run([word for word in words if word != "--debug"] if debug else words)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has gone; what is left in the buffer must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (Llama2Error, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"llama2: {explain(error)}", file=sys.stderr)
        return USAGE_ERROR


def explain(error: Exception) -> str:
    """One paragraph of an error."""
    if isinstance(error, OSError) and not isinstance(error, Llama2Error) and error.strerror:
        subject = f"{error.filename}: " if error.filename else ""
        return f"{subject}{error.strerror}"
    return " ".join(str(error).split())


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else USAGE_ERROR
    if words[0] in ("-V", "--version"):
        print(f"llama2 {llama2.__version__}")
        return 0
    from llama2.cli.args import parse

    name, rest = words[0], words[1:]
    module = _module(name)
    try:
        command: tuple[str, ...] = (name,)
        if getattr(module, "TASKS", None):
            rest = module.words(rest)
            if rest[:1] in (["-h"], ["--help"]):
                print(_tasks(name, module.SUMMARY))
                return 0
            command, rest = (name, *rest[:1]), rest[1:]
        options: Any = parse(options_class(command), " ".join(("llama2", *command)), rest, os.environ)
    except SystemExit:  # --help has been printed
        return 0
    if (extra := NEEDS_TORCH.get(name)) is not None and find_spec("torch") is None:
        raise needs_torch(f"`llama2 {name}`", extra)
    try:
        code: int = module.run(options)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise needs_torch(f"`llama2 {name}` with these options") from error
    return code


def options_class(command: Sequence[str]) -> type:
    """The dataclass of a command, ("serve",), or of a task, ("finetune", "sft"). Raises InputError for another."""
    from llama2.cli.args import nearest

    name, *task = command
    module = _module(name)
    tasks: dict[str, type] | None = getattr(module, "TASKS", None)
    if tasks is None:
        if task:
            raise InputError(f"{name} has no tasks, so {' '.join(task)!r} is none of it")
        kind: type = getattr(module, module.__name__.rpartition(".")[2].title().replace("_", "") + "Options")
        return kind
    chosen = task[0] if task else ""
    if len(task) != 1 or chosen not in tasks:
        raise InputError(f"{name} needs one of {', '.join(tasks)} first, not {chosen!r}{nearest(chosen, list(tasks))}")
    return tasks[chosen]


def _module(name: str) -> Any:
    """The module of a command. Raises InputError for a word that is none."""
    if name not in COMMANDS:
        from llama2.cli.args import nearest

        hint = nearest(name, list(COMMANDS)) or f"; there are {', '.join(COMMANDS)}"
        raise InputError(f"{name!r} is not a command{hint}")
    return import_module(COMMANDS[name][0])


def _tasks(name: str, summary: dict[str, str]) -> str:
    rows = "\n".join(f"  {task:<{max(map(len, summary))}}  {text}" for task, text in summary.items())
    return f"usage: llama2 {name} TASK ...\n\n{rows}\n\n`llama2 {name} TASK --help` lists the options of a task."


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: llama2 COMMAND [options]\n\n"
        "Run, inspect and measure Llama-architecture models.\n\n"
        f"{rows}\n\n"
        "`llama2 COMMAND --help` lists the options of a command; `llama2 --version` prints the version.\n"
        "Any command takes --debug, which adds the traceback to an error."
    )


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"llama2: warning: {' '.join(str(message).split())}", file=sys.stderr)
