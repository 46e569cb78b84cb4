"""/v1/completions: raw prompts, one or several, as texts or ids."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field
from starlette.responses import JSONResponse, Response

from llama2.engine.engine import TokenEvent
from llama2.engine.sampler import SampledToken
from llama2.serve import sse
from llama2.serve.common import Common
from llama2.serve.dialect import post
from llama2.serve.errors import Refusal
from llama2.serve.numbers import FIRST_FAULT, Answers, Ids, Tops
from llama2.serve.openai import REASONS, Head, OpenAI, OpenAIWriter, finite, token_text, usage
from llama2.serve.request import GenerationRequest
from llama2.serve.served_model import TextModel
from llama2.serve.service import RouteCall
from llama2.serve.session import Answer, Session, fold
from llama2.serve.validation import Text, Texts

DEFAULT_NEW = 16  # OpenAI's


class CompletionBody(Common):
    """The body of /v1/completions."""

    prompt: Text | Ids | Texts | Annotated[list[Ids], FIRST_FAULT] = Field(max_length=4_000_000)
    best_of: Answers | None = None
    echo: bool | None = None
    logprobs: Tops | None = None
    suffix: str | None = None
    parse_special: bool | None = None
    add_special_tokens: bool | None = None


def encode(tokenizer: Any, text: str, special: bool) -> tuple[int, ...]:
    """The ids of a raw prompt. special: control tokens written in it are control tokens; one BOS in all, whatever its
    origin."""
    if special and tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        text = text.removeprefix(tokenizer.bos_token)
        ids = tokenizer(text, verbose=False, split_special_tokens=False)["input_ids"]
        return (tokenizer.bos_token_id, *ids) if ids[:1] != [tokenizer.bos_token_id] else tuple(ids)
    return tuple(tokenizer(text, verbose=False, split_special_tokens=not special)["input_ids"])


def parse(model: TextModel, body: CompletionBody, owner: str) -> GenerationRequest:
    """The body as a generation. Raises Refusal."""
    if body.suffix:
        raise Refusal(
            "validation", "suffix is not supported: Llama 2 continues text, it fills no gaps; drop it", "suffix"
        )
    prompt = body.prompt
    given: list[Any] = list(prompt) if isinstance(prompt, list) and not _is_ids(prompt) else [prompt]
    if not given:
        raise Refusal("validation", "prompt is an empty list; give at least one", "prompt")
    if len(given) > model.bounds.max_client_batch_size:  # before any of them is encoded
        raise Refusal(
            "validation", f"{len(given)} prompts; {model.bounds.max_client_batch_size} are the most", "prompt"
        )
    prompts = tuple(_ids(model, body, p) if isinstance(p, str) else tuple(p) for p in given)
    n = body.n or 1
    best_of = n if body.best_of is None else body.best_of
    if body.stream and best_of != n:
        raise Refusal(
            "validation", f"best_of is {best_of} but a stream cannot choose afterwards; set it to n", "best_of"
        )
    if body.stream and body.echo and body.logprobs is not None:
        raise Refusal("validation", "echo with logprobs needs the whole answer; set stream to false", "echo")
    if body.max_tokens == 0 and not body.echo:
        raise Refusal("validation", "max_tokens is 0; ask for at least 1, or echo the prompt", "max_tokens")
    return body.request(
        model,
        owner,
        prompts,
        max(body.max_tokens, 1)
        if body.max_tokens == 0
        else DEFAULT_NEW
        if body.max_tokens is None
        else body.max_tokens,
        n=n,
        best_of=best_of,
        logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        continues=True,
        constraint=body.constraint(),
    )


def _ids(model: TextModel, body: CompletionBody, prompt: str) -> tuple[int, ...]:
    special = model.policy.parse_special if body.parse_special is None else body.parse_special
    if body.truncate_prompt_tokens is None:
        model.check_texts((prompt,))
    ids = encode(model.tokenizer, prompt, special)
    if body.add_special_tokens is False and ids[:1] == (model.tokenizer.bos_token_id,):
        return ids[1:]
    return ids


def _skips(body: CompletionBody) -> bool:
    return body.skip_special_tokens is not False


def _is_ids(prompt: list[Any]) -> bool:
    return bool(prompt) and isinstance(prompt[0], int)


async def begin(call: RouteCall, body: CompletionBody, **changes: Any) -> tuple[GenerationRequest, Session]:
    """Submits prompts, for every dialect that has raw ones. changes: fields of the request that the body cannot name.

    Raises Refusal.
    """
    generation = replace(await call.parse(parse, call.model, body, call.owner), **changes)
    return generation, await call.begin(generation)


async def completions(call: RouteCall) -> Response:
    """Answers one request."""
    body = await call.read(CompletionBody)
    model = call.model
    generation, session = await begin(call, body)
    if generation.stream:
        return sse.EventStream(call, session, CompletionWriter(model, body, generation, call.warnings))
    answers = await call.until_gone(session, fold(session, generation.answers))
    choices: list[dict[str, Any]] = []
    for i, prompt in enumerate(generation.prompts):
        tried = answers[i * generation.best_of : (i + 1) * generation.best_of]
        first = tried[0]
        if generation.best_of > generation.n:
            tried.sort(key=lambda answer: -answer.mean_logprob)
        for answer in tried[: generation.n]:
            answer.prompt = first.prompt
            choices.append(_choice(model, body, prompt, len(choices), answer))
    held = sum(map(len, generation.prompts))
    head = Head(model, "cmpl", "text_completion", body.model, call.warnings)
    return JSONResponse(head(choices=choices, usage=usage(held, session)))


def _choice(
    model: TextModel, body: CompletionBody, prompt: tuple[int, ...], index: int, answer: Answer
) -> dict[str, Any]:
    tokenizer, text, picked = model.tokenizer, answer.text, answer.picked
    if body.max_tokens == 0:
        text, picked = "", []
    if body.echo:
        text = tokenizer.decode(list(prompt), skip_special_tokens=True) + text
    logprobs = None
    if body.logprobs is not None:
        before = [SampledToken(prompt[0]), *answer.prompt] if body.echo else []
        offsets = Offsets(tokenizer, _skips(body), () if body.echo else prompt)
        logprobs = table(tokenizer, [*before, *picked], body.logprobs, offsets)
    reason = "length" if body.max_tokens == 0 else REASONS[answer.finish or "length"]
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


class Offsets:
    """Where in the text each token begins; those inside a character begin where it does."""

    def __init__(self, tokenizer: Any, skip: bool, prompt: Sequence[int] = ()) -> None:
        """skip: special tokens take no room. prompt: what the text goes on from, where it is not part of it."""
        self._decoder, self._at = tokenizer.stream_decoder(skip_special_tokens=skip), 0
        for token in prompt[-8:]:
            self._decoder.put(token)

    def __call__(self, token: int) -> int:
        """The place of the next token."""
        at = self._at
        self._at += len(self._decoder.put(token))
        return at


def table(tokenizer: Any, picked: list[SampledToken], tops: int, offsets: Offsets) -> dict[str, Any]:
    """The logprobs of a completion. A first token has none: null.

    Special tokens are told too, `</s>` among them. The token itself is always among the likeliest that are told.
    """
    return {
        "tokens": [token_text(tokenizer, p.token) for p in picked],
        "token_logprobs": [None if p.logprob is None else finite(p.logprob) for p in picked],
        "top_logprobs": [None if p.logprob is None else _likeliest(tokenizer, p, tops) for p in picked],
        "text_offset": [offsets(p.token) for p in picked],
    }


def _likeliest(tokenizer: Any, picked: SampledToken, tops: int) -> dict[str, float]:
    """By their texts; of two with the same text, as broken bytes have it, the likelier."""
    found: dict[str, float] = {}
    for token, logprob in (*picked.top[:tops], (picked.token, picked.logprob)):
        found.setdefault(token_text(tokenizer, token), finite(logprob))
    return found


class CompletionWriter(OpenAIWriter):
    """Chunks with the text of one answer each; the reason comes with the last."""

    def __init__(
        self, model: TextModel, body: CompletionBody, generation: GenerationRequest, warnings: Sequence[str] = ()
    ) -> None:
        self.tokenizer, self.body, self.generation = model.tokenizer, body, generation
        self.head = Head(model, "cmpl", "text_completion", body.model, warnings)
        self.offsets = [
            Offsets(self.tokenizer, _skips(body), prompt) for prompt in generation.prompts for _ in range(generation.n)
        ]

    def begin(self) -> bytes:
        """The prompts, where they are to be echoed."""
        if not self.body.echo:
            return b""
        found = b""
        for i, prompt in enumerate(self.generation.prompts):
            text = self.tokenizer.decode(list(prompt), skip_special_tokens=True)
            for j in range(self.generation.n):
                found += self.chunk(i * self.generation.n + j, text)
        return found

    def put(self, index: int, event: TokenEvent) -> bytes:
        """One token, and the end."""
        text = "" if self.body.max_tokens == 0 else event.text
        logprobs = None
        if self.body.logprobs is not None and event.token is not None:
            picked = SampledToken(event.token, event.logprob, event.top)
            logprobs = table(self.tokenizer, [picked], self.body.logprobs, self.offsets[index])
        reason = None if event.finish is None else REASONS[event.finish]
        return self.chunk(index, text, logprobs, reason) if text or logprobs or reason else b""

    def chunk(self, index: int, text: str, logprobs: Any = None, reason: str | None = None) -> bytes:
        """One event."""
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        more = {"usage": None} if self.body.usage else {}
        return sse.data(self.head(choices=[choice], **more))

    def end(self, session: Session) -> bytes:
        """Usage and [DONE]."""
        held = sum(map(len, self.generation.prompts))
        told = sse.data(self.head(choices=[], usage=usage(held, session))) if self.body.usage else b""
        return told + b"data: [DONE]\n\n"


DIALECT = OpenAI(
    "openai completions",
    post("/v1/completions", completions, CompletionBody, "continue one prompt or several", counted=True),
)
