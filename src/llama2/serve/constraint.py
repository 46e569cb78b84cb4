"""Answers of a given form: JSON schema, regular expression or grammar, as a logits processor over llguidance.

A grammar is compiled once, with bounds on its size, its automata and the work of each step, and then copied for each
request. Whitespace of JSON is fixed to that of Python's json.dumps: a model that may choose it can choose it for ever.
"""

import ctypes
import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llama2.errors import InputError, MissingDependencyError

MAX_SOURCE = 65_536  # characters of a schema, regular expression or grammar
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_KEPT = 64  # compiled grammars


class ConstraintError(InputError):
    """A constraint that was compiled turned out to be too much while an answer was held to it."""


@dataclass(frozen=True)
class Constraint:
    """What an answer must look like: JSON text of a schema, a regular expression, or a grammar in llguidance's Lark."""

    kind: Literal["json", "regex", "lark"]
    source: str


class Compiler:
    """Makes processors of constraints for one tokenizer. Its methods may be called from any thread."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos: list[int]) -> None:
        """vocabulary: columns of the logits. Raises MissingDependencyError, InputError without an EOS."""
        try:
            import llguidance
        except ImportError as error:
            raise MissingDependencyError(
                "constrained answers need llguidance; run `pip install 'llama2[serve]'`"
            ) from error
        if not eos:
            raise InputError("this model has no end-of-text token, so a constrained answer could not end")
        self._library = llguidance
        self._vocabulary, self._eos = vocabulary, eos
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Pieces(tokenizer, vocabulary, eos[0])), n_vocab=vocabulary, eos_token=eos
        )
        # About 20 ms each for the lexer and for a step; the defaults allow hundreds.
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=500_000, step_lexer_fuel=200_000, max_lexer_states=50_000, max_grammar_size=200_000,
            verbose_errors=False,
        )  # fmt: skip
        self._compiled: OrderedDict[Constraint, Any] = OrderedDict()

    def __call__(self, constraint: Constraint, prompt: int) -> "Constrained":
        """A processor for a sequence whose prompt has so many tokens. Raises InputError for what cannot be compiled."""
        compiled = self._compiled.get(constraint)
        if compiled is None:
            compiled = self._compile(constraint)
            self._compiled[constraint] = compiled
            while len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        return Constrained(compiled.deep_copy(), prompt, self._vocabulary)

    def _compile(self, constraint: Constraint) -> Any:
        if len(constraint.source) > MAX_SOURCE:
            raise InputError(
                f"the {constraint.kind} constraint has {len(constraint.source)} characters; {MAX_SOURCE} are the most"
            )
        matcher = self._library.LLMatcher
        try:
            if constraint.kind == "json":
                grammar = matcher.grammar_from_json_schema(constraint.source, overrides=JSON_STYLE)
            elif constraint.kind == "regex":
                grammar = matcher.grammar_from_regex(constraint.source)
            else:
                grammar = matcher.grammar_from_lark(constraint.source)
            made = matcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
            made.compute_bitmask()  # what is too much work for one step shows here, not in the middle of an answer
        except ValueError as error:
            raise InputError(_told(constraint, str(error))) from None
        if made.is_error():
            raise InputError(_told(constraint, made.get_error()))
        return made


class Constrained:
    """Lets through only the ids that the constraint allows next; ids so far (1, S) and scores (1, V).

    Raises ConstraintError at the bound on the work of a step.
    """

    def __init__(self, matcher: Any, prompt: int, vocabulary: int) -> None:
        self._matcher, self._seen = matcher, prompt
        self._bits = np.zeros(-(-vocabulary // 32), np.int32)
        self._vocabulary = vocabulary

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        new = ids[0, self._seen :].tolist()
        self._seen = ids.shape[1]
        if (new and not self._matcher.consume_tokens(new)) or self._matcher.is_error():
            raise ConstraintError(f"the constraint could not be followed: {self._matcher.get_error()[:200]}")
        address = self._bits.ctypes.data_as(ctypes.c_void_p).value
        self._matcher.unsafe_compute_mask_ptr(address, self._bits.nbytes)
        if self._matcher.is_error():
            raise ConstraintError(f"the constraint could not be followed: {self._matcher.get_error()[:200]}")
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._vocabulary]
        mask = torch.from_numpy(allowed.view(np.bool_)).to(scores.device)
        return scores.masked_fill(~mask, -torch.inf)


class _Pieces:
    """The tokenizer as llguidance wants it: the bytes of each id; ids beyond the tokenizer's stand for nothing."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = eos, tokenizer.bos_token_id
        known = min(len(tokenizer), vocabulary)
        self.tokens = [tokenizer.token_bytes(i) for i in range(known)] + [b""] * (vocabulary - known)
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < vocabulary)

    def __call__(self, text: bytes) -> list[int]:
        ids: list[int] = self._tokenizer(text.decode(), add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        return ids


def any_json() -> Constraint:
    """Any JSON object."""
    return Constraint("json", '{"type": "object"}')


def json_schema(schema: Any) -> Constraint:
    """JSON that fits a schema, a mapping."""
    return Constraint("json", json.dumps(schema))


def _told(constraint: Constraint, message: str) -> str:
    what = {"json": "JSON schema", "regex": "regular expression", "lark": "grammar"}[constraint.kind]
    first = " ".join(message.split())
    return f"the {what} cannot be used: {first[:300]}"
