"""/v1/embeddings: the mean of the last hidden states of a text, of length 1. Only a model that torch runs has them."""

import base64
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.responses import Response

from llama2.engine.plan_runners import packed_weights
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

_mean_state = door("engine.torch_plan_runner", "mean_state", "The mean of the last hidden states of a torch model.")


class EmbeddingBody(Body):
    """The body of /v1/embeddings."""

    input: Text | Ids | Texts | Annotated[list[Ids], FIRST_FAULT] = Field(max_length=4_000_000)
    model: str | None = Field(None, max_length=512)
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Dimensions | None = None
    user: Any = None


def embed(served: ServedModel, body: EmbeddingBody) -> dict[str, Any]:
    """The answer. Raises Refusal where the model has no torch module, and for inputs that do not fit."""
    model = served.engine.model
    if hasattr(model, "plan_runner"):
        raise Refusal("unable", "this model runs in several processes, which tell no hidden states")
    if packed_weights(model) is not None:
        raise Refusal(
            "unable", "this model is the native engine's alone, which tells no hidden states; --runner torch does"
        )
    width = model.config.hidden_size
    if body.dimensions not in (None, width):
        raise Refusal(
            "validation", f"dimensions is {body.dimensions}; this model has {width} and no fewer", "dimensions"
        )
    served.adapter(body.model)
    given: list[Any] = [body.input] if isinstance(body.input, str) else list(body.input)
    if given and isinstance(given[0], int):
        given = [given]
    if not given or len(given) > served.bounds.max_client_batch_size:
        raise Refusal(
            "validation", f"input has {len(given)} texts; give 1 to {served.bounds.max_client_batch_size}", "input"
        )
    rows = [encode(served.tokenizer, text, False) if isinstance(text, str) else tuple(text) for text in given]
    for row in rows:
        _check(row, served.bounds.max_input_tokens, model.config.vocab_size)
    data = []
    for i, row in enumerate(rows):
        mean_D = _mean_state(model, row)
        vector: Any = mean_D.tolist()
        if body.encoding_format == "base64":
            vector = base64.b64encode(mean_D.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": i, "embedding": vector})
    held = sum(map(len, rows))
    return {
        "object": "list",
        "data": data,
        "model": body.model or served.names[0],
        "usage": {"prompt_tokens": held, "total_tokens": held},
    }


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
