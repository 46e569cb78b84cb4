"""Answers of a given form: JSON schema, regular expression or grammar, as a logits processor over llguidance.

A grammar is compiled once, with bounds on its size, its automata and the work of each step, and then copied for each
request. Whitespace of JSON is fixed to that of Python's json.dumps: a model that may choose it can choose it for ever.
"""

import ctypes
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from llama2.errors import InputError, MissingDependencyError
from llama2.generation.arrays import Array, of, on_arrays
from llama2.serve.byte_cache import Kept
from llama2.serve.proof import Proof, Prover
from llama2.serve.prover import compile_source
from llama2.serve.schema import loosened, prepared

JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# About 20 ms each for the lexer and for a step; the defaults allow hundreds.
LIBRARY_BOUNDS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 200_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
_UNHELD_KEYS, _UNHELD_FORMAT = re.compile(r"Unimplemented keys: \[(.*)\]"), re.compile(r"Unknown format: (.*)")
_MAY_BE_LEFT_OUT = re.compile(r"registry|not disjoint|regex parse error|lookaround|in regex")
KEPT, KEPT_OF_ONE = 256 * 2**20, 64 * 2**20  # bytes of compiled constraints: of all keys, and of one key
_OVERHEAD = 65_536  # bytes that every compiled constraint is counted for at least


class ConstraintError(InputError):
    """A constraint that was compiled turned out to be too much while an answer was held to it."""


@dataclass(frozen=True)
class Constraint:
    """Constraint on an answer: JSON text of a schema, a regular expression, or a grammar in llguidance's Lark.

    strict: a schema with something that cannot be held is refused, where else it is held to the rest. warnings: of what
    was left out of it already.
    """

    kind: Literal["json", "regex", "lark"]
    source: str
    strict: bool = False
    warnings: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Compiled:
    """A constraint at work, to be copied for each answer, and what it does not hold an answer to."""

    matcher: Any
    warnings: tuple[str, ...] = ()


class Compiler:
    """Makes processors of constraints for one tokenizer. Its methods may be called from any thread.

    A constraint is compiled here only once `Prover` has shown that this is harmless; compiled ones are kept for each
    owner, within bounds on their bytes, and so are refusals.
    """

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
        self._vocabulary = vocabulary
        pieces = _Pieces(tokenizer, vocabulary, eos[0])
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(pieces), n_vocab=vocabulary, eos_token=eos)
        self._prover = Prover(LIBRARY_BOUNDS, pieces, eos)
        self.kept: Kept[Any] = Kept(KEPT, KEPT_OF_ONE)

    def __call__(self, constraint: Constraint, prompt: int, owner: str = "") -> "Constrained":
        """A processor for a sequence whose prompt has so many tokens. Raises InputError for what cannot be compiled."""
        return self.processor(self.compiled(constraint, owner), prompt)

    def processor(self, compiled: Compiled, prompt: int) -> "Constrained":
        """A processor of a compiled constraint, for a sequence whose prompt has so many tokens."""
        return Constrained(compiled.matcher.deep_copy(), prompt, self._vocabulary)

    def compiled(self, constraint: Constraint, owner: str = "") -> Compiled:
        """The compiled constraint, made or remembered. Takes up to seconds where it is new. Raises InputError."""
        found = self.kept.get(owner, constraint)
        if found is None:
            try:
                found, proof = self._tried(constraint)
            except InputError as error:
                found, proof = str(error), Proof(0, 0.0)
            self.kept.put(owner, constraint, found, max(proof.bytes, 2 * len(constraint.source)) + _OVERHEAD)
        if isinstance(found, str):
            raise InputError(found)
        return found

    def _tried(self, constraint: Constraint) -> tuple[Compiled, Proof]:
        """Compiles; a schema that is refused for what may be left out is compiled without it."""
        more: tuple[str, ...] = ()
        try:
            proof = self._prover(constraint.kind, constraint.source, style_of(constraint.strict))
        except InputError as error:
            if constraint.kind != "json" or constraint.strict or not _MAY_BE_LEFT_OUT.search(str(error)):
                raise
            source, more = loosened(constraint.source)
            constraint = replace(constraint, source=source)
            proof = self._prover(constraint.kind, constraint.source, style_of(False))
        matcher = self._compile(constraint)
        return Compiled(matcher, (*constraint.warnings, *more, *left_out(matcher))), proof

    def close(self) -> None:
        """Ends the process that tries constraints."""
        self._prover.close()

    def _compile(self, constraint: Constraint) -> Any:
        arguments = LIBRARY_BOUNDS, constraint.kind, constraint.source, style_of(constraint.strict)
        try:
            return compile_source(self._library, self._tokenizer, *arguments)
        except ValueError as error:
            raise InputError(f"the constraint cannot be used: {' '.join(str(error).split())[:300]}") from None


class Constrained:
    """Lets through only the ids that the constraint allows next; ids so far (1, S) and scores (1, V).

    Raises ConstraintError at the bound on the work of a step.
    """

    def __init__(self, matcher: Any, prompt: int, vocabulary: int) -> None:
        self._matcher, self._seen = matcher, prompt
        self._bits = np.zeros(-(-vocabulary // 32), np.int32)
        self._vocabulary = vocabulary

    @on_arrays
    def __call__(self, ids: Array, scores: Array) -> Array:
        new = ids[0, self._seen :].tolist()
        self._seen = ids.shape[1]
        if (new and not self._matcher.consume_tokens(new)) or self._matcher.is_error():
            raise ConstraintError(f"the constraint could not be followed: {self._matcher.get_error()[:200]}")
        address = self._bits.ctypes.data_as(ctypes.c_void_p).value
        self._matcher.unsafe_compute_mask_ptr(address, self._bits.nbytes)
        if self._matcher.is_error():
            raise ConstraintError(f"the constraint could not be followed: {self._matcher.get_error()[:200]}")
        np.invert(self._bits, out=self._bits)
        forbidden = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._vocabulary].view(np.bool_)
        arrays = of(scores)
        return arrays.masked(scores, arrays.array(forbidden, scores), -math.inf)


class _Pieces:
    """The tokenizer as llguidance wants it: the bytes of each id; ids beyond the tokenizer's stand for nothing."""

    def __init__(self, tokenizer: Any, vocabulary: int, eos: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = eos, tokenizer.bos_token_id
        known = min(len(tokenizer), vocabulary)
        self.tokens = [tokenizer.token_bytes(i) for i in range(known)] + [b""] * (vocabulary - known)
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < vocabulary)

    def __call__(self, text: bytes) -> list[int]:
        """Ids of bytes that the constraint forces. They go on from what is there, so no space comes in front."""
        ids: list[int] = self._tokenizer.encode_bytes(text)
        return ids


def style_of(strict: bool) -> dict[str, Any]:
    """How JSON is written, and whether keywords that cannot be held are an error."""
    return {**JSON_STYLE, "lenient": not strict}


def left_out(matcher: Any) -> tuple[str, ...]:
    """Warnings of what a compiled grammar does not hold an answer to."""
    found = []
    for line in dict.fromkeys(matcher.get_grammar_warnings()):
        if keys := _UNHELD_KEYS.search(line):
            found.append(f"the schema has {keys[1].replace(chr(34), '')}, which cannot be held; an answer may break it")
        elif name := _UNHELD_FORMAT.search(line):
            found.append(f"the schema has the format {name[1]!r}, which cannot be held; any text is let through")
        elif "oneOf" in line:
            found.append("the schema has a oneOf whose cases overlap; an answer may fit several of them")
        else:
            found.append(f"the schema cannot be held in full: {' '.join(line.split())[:200]}")
    return tuple(found[:16])


def any_json() -> Constraint:
    """Any JSON object."""
    return Constraint("json", '{"type": "object"}')


def json_schema(schema: Mapping[str, Any], strict: bool = False) -> Constraint:
    """JSON that fits a schema. Raises InputError for one that is nested too deeply."""
    found, warnings = prepared(schema, strict)
    return Constraint("json", json.dumps(found), strict, warnings)
