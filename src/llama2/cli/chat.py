"""`llama2 chat`: a conversation at the terminal, or over a pipe."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from llama2.cli import explain, terminal
from llama2.cli.args import nearest, option
from llama2.cli.conversation import Conversation, TemplateOptions, Turn, new_kept, newest_kept, render
from llama2.cli.forms import FormOptions, Forms
from llama2.cli.loading import RunOptions, load, model_path
from llama2.cli.pull import fetched_if_asked as fetched
from llama2.cli.sampling import SamplingOptions
from llama2.errors import InputError, Llama2Error
from llama2.generation.config import GenerationConfig

if TYPE_CHECKING:
    from llama2.cli.session import SpokenAnswer

# Where neither the user nor the checkpoint says how to choose: the values of Meta's chat example. Greedy answers of
# small models run in circles.
_FALLBACK: dict[str, Any] = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
_SETTINGS = [f.name for f in fields(SamplingOptions) if f.name not in ("greedy", "stop")]


@dataclass(frozen=True, kw_only=True)
class ChatOptions(SamplingOptions, FormOptions, TemplateOptions, RunOptions):
    """Talk with a model. Ctrl-C stops an answer; Ctrl-D, or Ctrl-C twice at the prompt, leaves; /help lists the
    commands. A line that ends with a backslash goes on in the next; three double quotes on a line of their own begin
    and end a message of several lines. Without a terminal each line of the standard input is a message. Where neither
    a flag nor the checkpoint says otherwise, answers are drawn with temperature 0.6 and top-p 0.9."""

    name: tuple[str, ...] = option((), "the same as -m MODEL", metavar="MODEL", positional=True, replaces="model")
    load: str | None = option(None, "go on with a conversation that /save wrote", metavar="FILE")
    resume: bool = option(False, "go on with the last conversation that was kept")
    no_keep: bool = option(False, "do not keep this conversation (at a terminal each one is, see --resume)")
    plain: bool = option(False, "show answers as they are, and not as Markdown (at a terminal)")


def run(options: ChatOptions) -> int:
    """Runs the command."""
    options.settings()
    form = options.form()
    if len(options.name) + (options.model is not None) > 1:
        raise InputError(f"chat talks with one model, but {[*options.name, options.model or '']} were given; give one")
    options = replace(options, model=options.name[0] if options.name else options.model)
    conversation, kept = _start(options)
    path = model_path(options.model)
    read: Callable[[str], str] = terminal.read_line
    if terminal.interactive():
        terminal.notice(f"loading {Path(path).name} ...")
        from llama2.cli.prompt import line_reader

        read = line_reader([*COMMANDS, *_names(), "exit"], _WITH_PATHS)
    options = replace(options, model=fetched(path, options.revision))
    model, tokenizer = load(options)
    from llama2.cli.session import Speaker

    options.install(tokenizer)
    speaker = Speaker(model, tokenizer, options.runner, options.cache_dtype, options.precision)
    forms = Forms(form, tokenizer, model)
    try:
        return ChatLoop(speaker, conversation, options, read, kept, forms).loop()
    finally:
        forms.close()


def _start(options: ChatOptions) -> tuple[Conversation, Path | None]:
    """The conversation, and the file in which it is kept; None where it is not. Raises InputError."""
    if options.resume and options.load is not None:
        raise InputError("--resume and --load each name a conversation to go on with; give one of them")
    last = newest_kept() if options.resume else None
    file = options.load if last is None else str(last)
    conversation = Conversation() if file is None else Conversation.load(Path(file))
    if options.system is not None:
        conversation.system = options.system
    if options.no_keep or not terminal.interactive():
        return conversation, None
    return conversation, last or new_kept()


class ChatLoop:
    """The loop: read, run a command or answer, until the end of the input."""

    def __init__(
        self,
        speaker: Any,
        conversation: Conversation,
        options: ChatOptions,
        read: Callable[[str], str] = terminal.read_line,
        kept: Path | None = None,
        forms: Forms | None = None,
    ) -> None:
        """read: one line behind a prompt. kept: the file in which the conversation is kept after every answer. forms:
        that of all answers."""
        self.speaker, self.conversation, self.options = speaker, conversation, options
        self._read_line, self._kept, self._forms = read, kept, forms
        self._prefix = ""  # what /read has put in front of the next message
        self._answers = 0
        self._last: SpokenAnswer | None = None
        self._failed = False

    def loop(self) -> int:
        """Talks until the end; 0, or 2 where a message of a pipe failed."""
        if terminal.interactive():
            config = self.speaker.model.config
            terminal.notice(
                f"{config.num_parameters / 1e6:,.0f}M parameters, {self.speaker.engine}, "
                f"context {config.max_position_embeddings:,}. /help lists the commands, Ctrl-D leaves"
            )
        if self.conversation.turns and self.conversation.turns[-1].answer is None:
            self._guarded(self._answer_or_forget)
        while (message := self._read()) is not None:
            if message.startswith("/") and "\n" not in message:
                if message.split()[0] in ("/exit", "/quit"):
                    break
                self._guarded(self._command, message)
            elif message.strip():
                self._guarded(self.tell, message)
        return 2 if self._failed and not terminal.interactive() else 0

    def _read(self) -> str | None:
        """The next message; None at the end of the input and at the second Ctrl-C."""
        warned = False
        while True:
            try:
                return terminal.read_message(self._read_line)
            except EOFError:
                if terminal.interactive():
                    print()
                return None
            except KeyboardInterrupt:
                print()
                if warned or not terminal.interactive():
                    return None
                warned = True
                terminal.notice("Ctrl-C again or Ctrl-D leaves")

    def _guarded(self, act: Callable[..., None], *args: str) -> None:
        try:
            act(*args)
        except (Llama2Error, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            self._failed = True
            terminal.notice(f"llama2: {explain(error)}")

    # -- talking -------------------------------------------------------------------------------------------------

    def tell(self, message: str) -> None:
        """One turn."""
        self.conversation.turns.append(Turn(self._prefix + message))
        self._answer_or_forget()
        self._prefix = ""

    def _answer_or_forget(self) -> None:
        """Answers the last turn; one that cannot be answered leaves no trace."""
        try:
            self._answer()
        except BaseException:
            self.conversation.turns.pop()
            raise

    def _answer(self) -> None:
        settings = self._sampling()
        context = self.speaker.context
        reserve = 0 if context is None else min(self.options.max_new_tokens, context // 4)
        ids, dropped = self.conversation.fit(self.speaker.tokenizer, context, reserve)
        if dropped:
            terminal.notice(f"[the context of {context} tokens is full: the {dropped} oldest turns were dropped]")
        seed = None if self.options.seed is None else self.options.seed + self._answers
        self._answers += 1
        with terminal.Interrupt() as interrupt, self._screen() as write:
            try:
                processors = () if self._forms is None else self._forms.processors(len(ids))
                answer = self.speaker.say(
                    ids, settings, write, seed=seed, stopped=lambda: interrupt.requested, processors=processors
                )
            except KeyboardInterrupt:  # the second Ctrl-C: the step that was running is lost, and the turn with it
                terminal.write("\n")
                raise InputError("interrupted before the answer was complete; the message was taken back") from None
        if not answer.text.endswith("\n") and not self._formatted():
            terminal.write("\n")
        self.conversation.turns[-1].answer = answer.text
        self._last = answer
        terminal.notice(f"[{answer.speed()}]")
        self._keep()

    def _formatted(self) -> bool:
        return terminal.interactive() and not self.options.plain

    @contextmanager
    def _screen(self) -> Iterator[Callable[[str], None]]:
        """Returns the sink of an answer's pieces of text."""
        if not self._formatted():
            yield terminal.write
            return
        from llama2.cli.markdown import MarkdownWriter

        with MarkdownWriter() as writer:
            yield writer.write

    def _keep(self) -> None:
        """Keeps the conversation for --resume; a folder that cannot be written is told once."""
        if self._kept is None:
            return
        try:
            self.conversation.keep(self._kept)
        except OSError as error:
            terminal.notice(f"llama2: this conversation is not kept: {self._kept}: {error.strerror}")
            self._kept = None

    def _sampling(self) -> GenerationConfig:
        settings = self.options.settings()
        if settings.is_set("do_sample") or self.speaker.model.generation_config.is_set("do_sample"):
            return settings
        return GenerationConfig(**settings.to_diff_dict(), **_FALLBACK)

    # -- commands ------------------------------------------------------------------------------------------------

    def _command(self, line: str) -> None:
        word, _, argument = line[1:].partition(" ")
        name = word.replace("-", "_")
        if name in _SETTINGS:
            return self._set(name, argument.strip())
        if word not in COMMANDS:
            known = [*COMMANDS, *_names(), "exit"]
            hint = nearest(word, known) or "; /help lists them"
            raise InputError(f"/{word} is no command (to say it to the model, put a space in front){hint}")
        return COMMANDS[word][1](self, argument.strip())

    def _help(self, _: str) -> None:
        rows = [f"  {usage:<16}{text}" for usage, _, text in COMMANDS.values()]
        rows += ["  /exit           leave (Ctrl-D too)"]
        settings = ", ".join(f"/{name.replace('_', '-')} X" for name in _SETTINGS)
        print("\n".join([*rows, f"  {settings}", "                  change a setting; without X, show it"]))

    def _set_any(self, text: str) -> None:
        name, _, value = text.partition(" ")
        name = name.replace("-", "_")
        if name not in _SETTINGS:
            raise InputError(f"/set needs one of {', '.join(_names())}, and a value{nearest(name, _SETTINGS)}")
        self._set(name, value.strip())

    def _read_file(self, file: str) -> None:
        if not file:
            raise InputError("/read needs a file name")
        path = Path(file).expanduser()
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is no text in UTF-8 (byte {error.start}); /read takes text files") from None
        self._prefix += f"{text.rstrip()}\n\n"
        count = len(self.speaker.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        print(f"{path.name}: {len(text):,} characters, {count:,} tokens, in front of the next message")

    def _stats(self, _: str) -> None:
        import resource

        used = len(render(self.speaker.tokenizer, self.conversation.messages)) if self.conversation.turns else 0
        context = "without a bound" if self.speaker.context is None else f"of {self.speaker.context:,}"
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        print(f"{len(self.conversation.turns)} turns, {used:,} tokens {context}; {self.speaker.engine}")
        print(f"memory at most {memory / 1e6:,.0f} MB" + (f"; last answer: {self._last.speed()}" if self._last else ""))

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = None if text == "off" else text
        print(f"system: {self.conversation.system or '(none)'}")

    def _reset(self, _: str) -> None:
        self.conversation.turns.clear()
        print("the conversation is empty")

    def _undo(self, _: str) -> None:
        if not self.conversation.turns:
            raise InputError("there is no turn to take back")
        print(f"taken back: {self.conversation.turns.pop().user}")

    def _retry(self, _: str) -> None:
        if not self.conversation.turns:
            raise InputError("there is no answer to try again")
        before = self.conversation.turns[-1].answer
        self.conversation.turns[-1].answer = None
        try:
            self._answer()
        except BaseException:
            self.conversation.turns[-1].answer = before
            raise

    def _save(self, file: str) -> None:
        if not file:
            raise InputError("/save needs a file name")
        self.conversation.save(Path(file).expanduser())
        print(f"saved {len(self.conversation.turns)} turns to {file}")

    def _load(self, file: str) -> None:
        if not file:
            raise InputError("/load needs a file name")
        self.conversation = Conversation.load(Path(file).expanduser())
        print(f"loaded {len(self.conversation.turns)} turns from {file}")
        if self.conversation.turns and self.conversation.turns[-1].answer is None:
            self._answer_or_forget()

    def _set(self, name: str, text: str) -> None:
        if text:
            kind = next(t for t in (int, float) if t in _parts(get_type_hints(SamplingOptions)[name]))
            try:
                value = kind(text)
            except ValueError:
                raise InputError(f"/{name.replace('_', '-')} takes a number, not {text!r}") from None
            changed: dict[str, Any] = {name: value}
            if name == "temperature":
                changed["greedy"] = False
                if value == 0:  # the choice is no longer random: what only shapes it must go
                    changed |= {"top_p": None, "top_k": None, "min_p": None}
            options = replace(self.options, **changed)
            options.settings()  # refuses what cannot work before it is kept
            self.options = options
        print(f"{name.replace('_', '-')}: {self._in_force(name)}")

    def _in_force(self, name: str) -> Any:
        given = getattr(self.options, name)
        if given is not None or name == "seed":
            return "random" if given is None else given
        return self._sampling().over(self.speaker.model.generation_config).value(name)


def _parts(hint: Any) -> tuple[Any, ...]:
    return getattr(hint, "__args__", (hint,))


# name -> (usage, what it does, help)
COMMANDS: dict[str, tuple[str, Callable[[ChatLoop, str], None], str]] = {
    "help": ("/help", ChatLoop._help, "this list"),
    "system": ("/system [TEXT]", ChatLoop._system, "set the system message (`off` removes it), or show it"),
    "reset": ("/reset", ChatLoop._reset, "forget the conversation, keep the system message"),
    "undo": ("/undo", ChatLoop._undo, "take back the last turn"),
    "retry": ("/retry", ChatLoop._retry, "another answer to the last message"),
    "save": ("/save FILE", ChatLoop._save, "write the conversation as JSON"),
    "load": ("/load FILE", ChatLoop._load, "go on with a saved conversation"),
    "read": ("/read FILE", ChatLoop._read_file, "put a text file in front of the next message"),
    "set": ("/set NAME X", ChatLoop._set_any, "change a setting, as /NAME X does"),
    "stats": ("/stats", ChatLoop._stats, "turns, tokens, memory and speed"),
}
_WITH_PATHS = ("save", "load", "read")


def _names() -> list[str]:
    """The settings as they are written behind a slash."""
    return [name.replace("_", "-") for name in _SETTINGS]
