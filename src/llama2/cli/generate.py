"""`llama2 generate`: continue one prompt."""

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llama2.cli import terminal
from llama2.cli.args import option
from llama2.cli.conversation import TemplateOptions, render
from llama2.cli.forms import FormOptions, Forms
from llama2.cli.loading import RunOptions, load
from llama2.cli.sampling import SamplingOptions
from llama2.errors import InputError

if TYPE_CHECKING:
    from llama2.cli.session import SpokenAnswer


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SamplingOptions, FormOptions, TemplateOptions, RunOptions):
    """Continue a prompt, or answer it with --chat. The text goes to the standard output as it comes, the speed to the
    standard error."""

    prompt: tuple[str, ...] = option(
        (), "the prompt, several words joined by spaces; - reads the standard input", metavar="PROMPT", positional=True
    )
    chat: bool = option(False, "put the prompt into the model's chat template, as a message to be answered")


def run(options: GenerateOptions) -> int:
    """Runs the command."""
    settings, form = options.settings(), options.form()
    prompt = _prompt(options)
    began = time.perf_counter()
    model, tokenizer = load(options)
    from llama2.cli.session import Speaker

    loaded = time.perf_counter() - began
    ids = _encode(prompt, options, tokenizer)
    forms = Forms(form, tokenizer, model)
    try:
        answer = Speaker(model, tokenizer, options.runner, options.cache_dtype, options.precision).say(
            ids,
            settings,
            terminal.write,
            seed=options.seed,
            continues=not options.chat,
            processors=forms.processors(len(ids)),
        )
    finally:
        forms.close()
    if not answer.text.endswith("\n"):
        terminal.write("\n")
    terminal.notice(_speed_line(answer, loaded))
    return 0


def _prompt(options: GenerateOptions) -> str:
    if not options.chat and (idle := [name for name in ("system", "chat_template") if getattr(options, name)]):
        flag = "--" + idle[0].replace("_", "-")
        raise InputError(f"{flag} belongs to a chat; add --chat, or put the text into the prompt")
    prompt = sys.stdin.read() if options.prompt == ("-",) else " ".join(options.prompt)
    if not prompt.strip():
        raise InputError("the prompt is empty; add text to the command, or - to read the standard input")
    return prompt


def _encode(prompt: str, options: GenerateOptions, tokenizer: Any) -> list[int]:
    if not options.chat:
        ids: list[int] = tokenizer(prompt, verbose=False)["input_ids"]  # a prompt that is too long is refused later
        return ids
    options.install(tokenizer)
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    return render(tokenizer, [*system, {"role": "user", "content": prompt}])


def _speed_line(answer: "SpokenAnswer", loaded: float) -> str:
    return f"[model loaded in {loaded:.2f} s; {answer.speed()}]"
