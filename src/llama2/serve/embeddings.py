"""/v1/embeddings: the mean of the final hidden states of a text, or the last of them, of length 1."""

import base64
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from starlette.responses import Response

from llama2.cpu import PAGE, CpuModel, CpuRunner, PagedCache
from llama2.lazy import door
from llama2.serve.dialect import post
from llama2.serve.errors import Refusal
from llama2.serve.json_response import answer
from llama2.serve.numbers import FIRST_FAULT, Dimensions, Ids
from llama2.serve.openai import OpenAI
from llama2.serve.openai_completions import encode
from llama2.serve.served_model import ServedModel
from llama2.serve.service import RouteCall
from llama2.serve.validation import Body, Text, Texts

MAX_TEXTS = 8192  # of one request
AT_ONCE = 64  # texts in one step
CHUNK = 256  # tokens of one step. In the native engine their states stand in rows as wide as the vocabulary
_pooled_states = door("engine.torch_plan_runner", "pooled_states", "Pooled final hidden states of a torch model.")


class EmbeddingBody(Body):
    """The body of /v1/embeddings."""

    input: Text | Ids | Texts | Annotated[list[Ids], FIRST_FAULT] = Field(max_length=4_000_000)
    model: str | None = Field(None, max_length=512)
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Dimensions | None = None
    pooling: Literal["mean", "last"] | None = None
    user: Any = None


def embed(served: ServedModel, body: EmbeddingBody, pooling: str | None = None) -> dict[str, Any]:
    """The answer. Raises Refusal where the model tells no hidden states, and for inputs that do not fit.

    pooling: the route's default; the body's own counts first.
    """
    model = served.engine.model
    if hasattr(model, "plan_runner"):
        raise Refusal("unable", "this model runs in several processes, which tell no hidden states")
    width = model.config.hidden_size
    if body.dimensions is not None and body.dimensions > width:
        raise Refusal("validation", f"dimensions is {body.dimensions}; this model has {width}", "dimensions")
    served.adapter(body.model)
    given: list[Any] = [body.input] if isinstance(body.input, str) else list(body.input)
    if given and isinstance(given[0], int):
        given = [given]
    if not given or len(given) > MAX_TEXTS:
        raise Refusal("validation", f"input has {len(given)} texts; give 1 to {MAX_TEXTS}", "input")
    for text in given:
        if isinstance(text, str):
            served.check_texts((text,))
    rows = [encode(served.tokenizer, text, False) if isinstance(text, str) else tuple(text) for text in given]
    for row in rows:
        _check(row, served.bounds.max_input_tokens, model.config.vocab_size)
    data: list[dict[str, Any]] = []
    for vector in vectors(model, rows, body.pooling or pooling or "mean"):
        vector = vector[: body.dimensions]
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        told: Any = vector.tolist()
        if body.encoding_format == "base64":
            told = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": len(data), "embedding": told})
    held = sum(map(len, rows))
    return {
        "object": "list",
        "data": data,
        "model": body.model or served.names[0],
        "usage": {"prompt_tokens": held, "total_tokens": held},
    }


def vectors(model: Any, rows: Sequence[Sequence[int]], pooling: str) -> Iterator[np.ndarray]:
    """The "mean" of the final hidden states of each row of ids, or the "last" of them, float32 (D,)."""
    weights = model.weights if isinstance(model, CpuModel) else None
    if weights is None:
        for batch in batches(rows):
            yield from _pooled_states(model, batch, pooling)
    else:
        yield from _native_vectors(weights, rows, pooling)


def _native_vectors(weights: Any, rows: Sequence[Sequence[int]], pooling: str) -> Iterator[np.ndarray]:
    """As `vectors`, by the native engine: short rows share a step, long ones take several."""
    runner, width = CpuRunner(weights.states(), "exact"), weights.config.hidden_size
    cache = PagedCache(weights, max(*map(len, rows), 0) + AT_ONCE * PAGE + CHUNK, "float32")

    def states(counts: Sequence[tuple[Any, Sequence[int]]]) -> list[np.ndarray]:
        """Of further tokens of some sequences: all of their states, or with "last" the last of each."""
        view = cache.view([(sequence, len(ids)) for sequence, ids in counts])
        places = np.concatenate([np.arange(s.length, s.length + len(ids), dtype=np.int32) for s, ids in counts])
        ids = [i for _, part in counts for i in part]
        wanted = np.arange(len(ids), dtype=np.int32) if pooling == "mean" else None
        found = runner.step(ids, places, view, wanted)[:, :width].copy()
        ends = np.cumsum([len(part) if pooling == "mean" else 1 for _, part in counts])
        return np.split(found, ends[:-1])

    for batch in batches(rows):
        counts = [(cache.sequence(), row) for row in batch]
        try:
            if len(batch) > 1 or len(batch[0]) <= CHUNK:
                parts = [[found] for found in states(counts)]
            else:
                sequence, row = counts[0]
                parts = [[states([(sequence, row[at : at + CHUNK])])[0] for at in range(0, len(row), CHUNK)]]
        finally:
            for sequence, _ in counts:
                sequence.free()
        for part in parts:
            states_TD = np.concatenate(part)
            yield states_TD.mean(0) if pooling == "mean" else states_TD[-1]


def batches(rows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    """Rows in their order, as many at once as a step of CHUNK tokens takes."""
    batch: list[Sequence[int]] = []
    for row in rows:
        if batch and (len(batch) == AT_ONCE or sum(map(len, batch)) + len(row) > CHUNK):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _check(row: tuple[int, ...], most: int, vocabulary: int) -> None:
    if not 1 <= len(row) <= most:
        raise Refusal("context" if row else "validation", f"an input has {len(row)} tokens; 1 to {most} fit", "input")
    if bad := [i for i in row if not 0 <= i < vocabulary]:
        raise Refusal("validation", f"token id {bad[0]} does not exist; ids run from 0 to {vocabulary - 1}", "input")


async def embeddings(call: RouteCall) -> Response:
    """Answers one request."""
    body = await call.read(EmbeddingBody)
    return await call.service.embedded(call.owner, answer, embed, call.model, body)


DIALECT = OpenAI("openai embeddings", post("/v1/embeddings", embeddings, EmbeddingBody, "a vector for each text"))
