"""/tokenize and /detokenize, which three APIs share: the fields of a body say whose it is.

`inputs` is text-generation-inference's, `content` llama.cpp's, `prompt` or `messages` vLLM's; ids come as `tokens`, or
from TGI's clients as `ids`, and the text is told under the names of all three.
"""

from typing import Any

from pydantic import ConfigDict, Field, model_validator
from starlette.responses import JSONResponse, Response

from llama2.serve import llamacpp, tgi, vllm
from llama2.serve.dialect import Dialect, Handler, post
from llama2.serve.errors import Refusal
from llama2.serve.json_response import answer
from llama2.serve.numbers import Ids
from llama2.serve.served_model import TextModel
from llama2.serve.service import RouteCall
from llama2.serve.validation import Body, Text


class ContentBody(Body):
    """llama.cpp's body of /tokenize."""

    model: str | None = Field(None, max_length=512)
    content: Text
    add_special: bool | None = None
    parse_special: bool | None = None
    with_pieces: bool | None = None


async def _content(call: RouteCall) -> Response:
    body = await call.read(ContentBody)
    return await call.parse(answer, _of_content, call.model, body)


def _of_content(model: TextModel, body: ContentBody) -> dict[str, Any]:
    tgi.check_bytes(model, [body.content])
    ids = vllm.encoded(model, body.content, bool(body.add_special), body.parse_special is not False)
    if not body.with_pieces:
        return {"tokens": ids}
    return {"tokens": [{"id": i, "piece": _piece(model.tokenizer.token_bytes(i))} for i in ids]}


def _piece(raw: bytes) -> str | list[int]:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


_DIALECTS: dict[str, tuple[Dialect, Handler]] = {  # by the field that tells a body apart; the first that it has
    "inputs": (tgi.DIALECT, tgi.tokenize),
    "content": (llamacpp.DIALECT, _content),
    "prompt": (vllm.DIALECT, vllm.tokenize),
    "messages": (vllm.DIALECT, vllm.tokenize),
}


async def tokenize(call: RouteCall) -> Response:
    """/tokenize."""
    names = await call.peek()
    for name, (dialect, handler) in _DIALECTS.items():
        if name in names:
            call.dialect = dialect
            return await handler(call)
    raise Refusal("validation", "the body has none of inputs, content, prompt and messages; send one of them")


class DetokenizeBody(Body):
    """The body of /detokenize: `tokens`, or as TGI has it `ids`."""

    model_config = ConfigDict(extra="ignore")
    model: str | None = Field(None, max_length=512)
    tokens: Ids | None = Field(None, max_length=262_144)
    ids: Ids | None = Field(None, max_length=262_144)
    skip_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _one(self) -> "DetokenizeBody":
        if (self.tokens is None) == (self.ids is None):
            raise ValueError("give the ids in `tokens`")
        return self


async def detokenize(call: RouteCall) -> Response:
    """/detokenize: the text of ids."""
    body = await call.read(DetokenizeBody)
    ids = body.tokens if body.tokens is not None else body.ids or []
    text = await call.parse(_decoded, call.model, ids, bool(body.skip_special_tokens))
    return JSONResponse({"prompt": text, "content": text, "text": text})


def _decoded(model: TextModel, ids: list[int], skip_special: bool) -> str:
    size = len(model.tokenizer)
    if bad := [i for i in ids if not 0 <= i < size]:
        raise Refusal("validation", f"id {bad[0]} does not exist; ids run from 0 to {size - 1}", "tokens")
    text: str = model.tokenizer.decode(ids, skip_special)
    return text


DIALECT = tgi.TGI(
    "tokenization",
    *(
        route
        for base in ("", "/v1")
        for route in (
            post(f"{base}/tokenize", tokenize, tgi.GenerateBody, "the ids of a text", any_type=True),
            post(f"{base}/detokenize", detokenize, DetokenizeBody, "the text of ids", any_type=True),
        )
    ),
)
