"""Answers of a given form on the command line: a JSON schema, a regular expression or a grammar."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.cli import terminal
from llama2.cli.args import option
from llama2.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FormOptions:
    """the form of answers (at most one of these; needs llguidance)."""

    json_schema: str | None = option(None, "a file with the JSON schema of the answer", metavar="FILE")
    regex: str | None = option(None, "a regular expression that the whole answer matches", metavar="PATTERN")
    grammar: str | None = option(None, "a file with a grammar in Lark's syntax", metavar="FILE")

    def form(self) -> tuple[str, str] | None:
        """Its kind and its source; None where none is asked for. Raises InputError for several, OSError for no file."""
        forms = (("json", self.json_schema), ("regex", self.regex), ("lark", self.grammar))
        given = [(kind, value) for kind, value in forms if value is not None]
        if len(given) > 1:
            raise InputError(
                "--json-schema, --regex and --grammar each hold the whole answer to a form; give one of them"
            )
        if not given:
            return None
        kind, value = given[0]
        return kind, value if kind == "regex" else Path(value).read_text(encoding="utf-8")


class Forms:
    """Makes the logits processor of each answer; compiled once."""

    def __init__(self, form: tuple[str, str] | None, tokenizer: Any, model: Any) -> None:
        """Raises InputError for what cannot be compiled."""
        self._compiler: Any = None
        if form is not None:
            from llama2.llama import constraint_of
            from llama2.serve.constraint import Compiler

            constraint = constraint_of(*form)
            eos = model.generation_config.eos_token_ids
            self._compiler = Compiler(tokenizer, model.config.vocab_size, eos)
            self._compiled = self._compiler.compiled(constraint)
            for text in self._compiled.warnings:
                terminal.notice(f"llama2: warning: {text}")

    def processors(self, prompt: int) -> tuple[Any, ...]:
        """For an answer to a prompt of so many tokens."""
        return () if self._compiler is None else (self._compiler.processor(self._compiled, prompt),)

    def close(self) -> None:
        """Ends the process that tries constraints."""
        if self._compiler is not None:
            self._compiler.close()
