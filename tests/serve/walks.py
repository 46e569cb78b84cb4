"""Random answers that a constraint lets through, without a model: what any model could write."""

import random
from typing import Any

import numpy as np
import torch

from llama2.serve.constraint import Compiler, Constraint

SHORT = 40  # tokens, behind which what ends a value is preferred
LONG = 1500
_CLOSE = [b'"', b"}", b"]", b","]
_GO_ON = [
    *(b"%d" % i for i in range(10)),
    b"e",
    b"l",
    b"u",
    b"s",
    b"r",
    b"a",
    b"@",
    b".",
    b":",
    b"-",
    b"/",
    b"T",
    b"Z",
    b"P",
    b"f",
    b"o",
    b"b",
    b"X",
]


class EndlessError(AssertionError):
    """A walk found no end, as none does where a key must end in a certain word that chance does not spell."""


def walk(tokenizer: Any, compiler: Compiler, constraint: Constraint, seed: int, short: int = SHORT) -> str:
    """One answer, to its end. short: tokens behind which an end is sought.

    Raises EndlessError where there is none within LONG tokens.
    """
    processor, ids, size = compiler(constraint, 2), [5, 6], compiler._vocabulary
    generator, zeros, eos = random.Random(seed), torch.zeros(1, size), tokenizer.eos_token_id
    table = _ending(tokenizer)
    for step in range(LONG):
        scores = processor(torch.tensor([ids]), zeros)
        allowed = np.flatnonzero(np.isfinite(np.asarray(scores[0])))
        picked = int(allowed[generator.randrange(len(allowed))])
        if step > short:
            open_to = [token for token in table if np.isfinite(float(scores[0, token]))]
            ends = [token for token in table[: len(_CLOSE) + 1] if token in open_to]
            if ends and generator.random() < 0.7:
                picked = ends[0]
            elif open_to:
                picked = generator.choice(open_to)
        ids.append(picked)
        if picked == eos:
            return b"".join(map(tokenizer.token_bytes, ids[2:-1])).decode()
    raise EndlessError(f"no end within {LONG} tokens: {b''.join(map(tokenizer.token_bytes, ids[2:]))[:300]!r}")


def _ending(tokenizer: Any) -> list[int]:
    """EOS, then what closes a value, then what goes on towards an end: one token each."""
    return [tokenizer.eos_token_id, *(tokenizer.encode_bytes(data)[0] for data in (*_CLOSE, *_GO_ON))]
