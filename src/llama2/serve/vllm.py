"""vLLM's routes besides OpenAI's: ids of texts and chats, the tokenizer, scores, ranks, its load.

A causal language model has no head that scores pairs: /score and /rerank compare the vectors of /v1/embeddings, and a
score is the cosine of their angle.
"""

import secrets
import time
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from starlette.responses import JSONResponse, Response

from llama2.serve import embeddings, openai_chat, openai_completions, tgi
from llama2.serve.chat import chosen, prompt_ids
from llama2.serve.dialect import get, post
from llama2.serve.errors import Refusal
from llama2.serve.json_response import answer
from llama2.serve.numbers import FIRST_FAULT, MAX_COUNT
from llama2.serve.openai import OpenAI
from llama2.serve.served_model import TextModel
from llama2.serve.service import RouteCall
from llama2.serve.validation import Body, Text, Texts


class TokenizeBody(openai_chat.ChatBody):
    """The body of /tokenize: a text or a chat."""

    model_config = ConfigDict(extra="ignore")
    messages: Annotated[list[openai_chat.Message], FIRST_FAULT] | None = None  # type: ignore[assignment]
    prompt: Text | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class ScoreBody(Body):
    """The body of /score: pairs of one text with several, or of as many with as many."""

    model_config = ConfigDict(extra="ignore")
    model: str | None = Field(None, max_length=512)
    text_1: Text | Texts | None = None
    text_2: Text | Texts | None = None
    queries: Text | Texts | None = None
    documents: Text | Texts | None = None
    items: Text | Texts | None = None
    data_1: Text | Texts | None = None
    data_2: Text | Texts | None = None

    def pairs(self) -> tuple[list[str], list[str]]:
        """Both sides, as long as each other. Raises Refusal."""
        sides = (self.text_1, self.queries, self.data_1), (self.text_2, self.documents, self.items, self.data_2)
        first, second = (next((side for side in names if side is not None), None) for names in sides)
        if first is None or second is None:
            raise Refusal("validation", "a side is missing; give text_1 and text_2, or queries and documents")
        left, right = ([side] if isinstance(side, str) else list(side) for side in (first, second))
        if len(left) == 1:
            left *= len(right)
        if len(left) != len(right) or not right:
            raise Refusal("validation", f"{len(left)} texts against {len(right)}; give one, or as many on both sides")
        return left, right


class RerankBody(Body):
    """The body of /rerank. texts: as text-embeddings-inference has it, which answers a bare list."""

    model_config = ConfigDict(extra="ignore")
    model: str | None = Field(None, max_length=512)
    query: Text
    documents: Texts | None = None
    texts: Texts | None = None
    top_n: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = None
    return_text: bool | None = None


def encoded(model: TextModel, text: str, add: bool, special: bool) -> list[int]:
    """The ids of a text, as generation has them where `add`; special: control tokens written in it are ones."""
    if add:
        return list(openai_completions.encode(model.tokenizer, text, special))
    found: list[int] = model.tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=not special)[
        "input_ids"
    ]
    return found


async def tokenize(call: RouteCall) -> Response:
    """/tokenize of a prompt or messages."""
    body = await call.read(TokenizeBody)
    return await call.parse(answer, _tokenized, call.model, body)


def _tokenized(model: TextModel, body: TokenizeBody) -> dict[str, Any]:
    if body.prompt is None and not body.messages:
        raise Refusal("validation", "messages is empty; give at least one", "messages")
    texts = [body.prompt] if body.prompt is not None else [message.text() for message in body.messages or ()]
    tgi.check_bytes(model, texts)
    if body.prompt is not None:
        ids = encoded(model, body.prompt, body.add_special_tokens is not False, True)
    else:
        tools = chosen(body.tools, body.tool_choice, None, model)
        ids = list(prompt_ids(model, body.messages or (), tools, body.continues, body.chat_template_kwargs))
    strings = [model.tokenizer.convert_ids_to_tokens(i) for i in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": model.bounds.max_total_tokens, "tokens": ids, "token_strs": strings}


async def tokenizer_info(call: RouteCall) -> Response:
    """/tokenizer_info: control tokens as texts, and the chat template."""
    tokenizer = (await call.shown()).tokenizer
    found = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return JSONResponse(
        {
            "tokenizer_class": type(tokenizer).__name__,
            **{name: str(value) for name, value in found.items() if value is not None},
            "chat_template": tokenizer.chat_template,
            "model_max_length": call.model.bounds.max_total_tokens,
        }
    )


async def _vectors(call: RouteCall, name: str | None, texts: list[str]) -> tuple[list[list[float]], int]:
    """Vectors of length 1, and the tokens of the texts; those that are equal are computed once."""
    different = list(dict.fromkeys(texts))
    body = await call.translate(lambda: {"model": name, "input": different}, to=embeddings.EmbeddingBody)
    found = await call.service.embedded(call.owner, embeddings.embed, call.model, body)
    by_text = {text: row["embedding"] for text, row in zip(different, found["data"], strict=True)}
    return [by_text[text] for text in texts], found["usage"]["prompt_tokens"]


def _cosine(left: list[float], right: list[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))


async def score(call: RouteCall) -> Response:
    """/score: the cosine of each pair."""
    body = await call.read(ScoreBody)
    left, right = body.pairs()
    vectors, tokens = await _vectors(call, body.model, [*left, *right])
    scores = [_cosine(a, b) for a, b in zip(vectors[: len(left)], vectors[len(left) :], strict=True)]
    head = {"id": f"score-{secrets.token_hex(12)}", "object": "list", "created": int(time.time())}
    data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return JSONResponse({**head, "model": body.model or call.model.names[0], "data": data, "usage": usage})


async def rerank(call: RouteCall) -> Response:
    """/rerank: documents by their cosine with the query, the nearest first."""
    body = await call.read(RerankBody)
    documents = body.documents if body.documents is not None else body.texts
    if not documents:
        raise Refusal("validation", "documents is missing or empty; give at least one", "documents")
    vectors, tokens = await _vectors(call, body.model, [body.query, *documents])
    scores = [_cosine(vectors[0], vector) for vector in vectors[1:]]
    order = sorted(range(len(documents)), key=lambda i: -scores[i])[: body.top_n or None]
    if body.documents is None:
        told = [{"index": i, "score": scores[i]} | ({"text": documents[i]} if body.return_text else {}) for i in order]
        return JSONResponse(told)
    results = [{"index": i, "document": {"text": documents[i]}, "relevance_score": scores[i]} for i in order]
    head = {"id": f"rerank-{secrets.token_hex(12)}", "object": "list", "model": body.model or call.model.names[0]}
    return JSONResponse({**head, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}, "results": results})


async def load(call: RouteCall) -> Response:
    """/load: requests that are being served."""
    return JSONResponse({"server_load": call.service.life.inside})


DIALECT = OpenAI(
    "vllm",
    get("/tokenizer_info", tokenizer_info, "vLLM: the tokenizer"),
    get("/load", load, "vLLM: requests that are being served"),
    *(post(path, score, ScoreBody, "vLLM: scores of pairs of texts") for path in ("/score", "/v1/score")),
    *(
        post(path, rerank, RerankBody, "vLLM's and llama.cpp's: documents by their nearness to a query")
        for path in ("/rerank", "/v1/rerank", "/v2/rerank", "/reranking", "/v1/reranking")
    ),
)
