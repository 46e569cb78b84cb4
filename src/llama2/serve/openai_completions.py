"""/v1/completions: raw prompts, one or several, as texts or ids."""

from itertools import accumulate
from typing import Annotated, Any

from pydantic import Field
from starlette.responses import JSONResponse, Response

from llama2.engine.engine import Event
from llama2.engine.sampler import Picked
from llama2.serve import sse
from llama2.serve.dialect import post
from llama2.serve.errors import Refusal
from llama2.serve.numbers import FIRST_FAULT, Answers, Ids, Tops
from llama2.serve.openai import (
    REASONS,
    Common,
    Head,
    OpenAI,
    OpenAIWriter,
    ResponseFormat,
    drawn,
    finite,
    salt,
    token_text,
    usage,
)
from llama2.serve.request import GenerationRequest
from llama2.serve.served_model import ServedModel
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
    response_format: ResponseFormat | None = None
    parse_special: bool | None = None


def encode(tokenizer: Any, text: str, special: bool) -> tuple[int, ...]:
    """The ids of a raw prompt. special: control tokens written in it are control tokens; one BOS in all, whoever wrote
    it."""
    if special and tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        text = text.removeprefix(tokenizer.bos_token)
        ids = tokenizer(text, verbose=False, split_special_tokens=False)["input_ids"]
        return (tokenizer.bos_token_id, *ids) if ids[:1] != [tokenizer.bos_token_id] else tuple(ids)
    return tuple(tokenizer(text, verbose=False, split_special_tokens=not special)["input_ids"])


def parse(model: ServedModel, body: CompletionBody, owner: str) -> GenerationRequest:
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
    special = model.policy.parse_special if body.parse_special is None else body.parse_special
    prompts = tuple(encode(model.tokenizer, p, special) if isinstance(p, str) else tuple(p) for p in given)
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
    return GenerationRequest(
        prompts=prompts,
        sampling=body.sampling(model),
        max_new_tokens=max(DEFAULT_NEW if body.max_tokens is None else body.max_tokens, 1),
        n=n,
        best_of=best_of,
        seed=drawn(body.seed),
        stop=body.stops,
        keep_stop=bool(body.include_stop_str_in_output),
        logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        continues=True,
        constraint=body.response_format.constraint() if body.response_format else None,
        adapter=model.adapter(body.model),
        salt=salt(owner, body.cache_salt),
        owner=owner,
        stream=bool(body.stream),
        skip_special_tokens=_skips(body),
    )


def _skips(body: CompletionBody) -> bool:
    return body.skip_special_tokens is not False


def _is_ids(prompt: list[Any]) -> bool:
    return bool(prompt) and isinstance(prompt[0], int)


async def completions(call: RouteCall) -> Response:
    """Answers one request."""
    body = await call.read(CompletionBody)
    model = call.model
    generation = await call.parse(parse, model, body, call.owner)
    session = await call.begin(generation)
    if generation.stream:
        return sse.EventStream(call, session, CompletionWriter(model, body, generation))
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
    head = Head(model, "cmpl", "text_completion", body.model)
    return JSONResponse(head(choices=choices, usage=usage(held, session)))


def _choice(
    model: ServedModel, body: CompletionBody, prompt: tuple[int, ...], index: int, answer: Answer
) -> dict[str, Any]:
    tokenizer, text, picked = model.tokenizer, answer.text, answer.picked
    if body.max_tokens == 0:
        text, picked = "", []
    if body.echo:
        text = tokenizer.decode(list(prompt), skip_special_tokens=True) + text
    logprobs = None
    if body.logprobs is not None:
        before = [Picked(prompt[0]), *answer.prompt] if body.echo else []
        logprobs = table(tokenizer, [*before, *picked], body.logprobs, skip=_skips(body))
    reason = "length" if body.max_tokens == 0 else REASONS[answer.finish or "length"]
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def table(tokenizer: Any, picked: list[Picked], tops: int, offset: int = 0, skip: bool = True) -> dict[str, Any]:
    """The logprobs of a completion; offset: characters before its first token. A first token has none: null.

    Special tokens are told too, `</s>` among them; where the text leaves them out (skip) they take no room in it.
    """
    texts = [token_text(tokenizer, p.token) for p in picked]
    sizes = [0 if skip and p.token in tokenizer.special_ids else len(t) for p, t in zip(picked, texts, strict=True)]
    best = [
        None if p.logprob is None else {token_text(tokenizer, token): finite(value) for token, value in p.top[:tops]}
        for p in picked
    ]
    return {
        "tokens": texts,
        "token_logprobs": [None if p.logprob is None else finite(p.logprob) for p in picked],
        "top_logprobs": best if tops else None,
        "text_offset": list(accumulate(sizes[:-1], initial=offset)) if texts else [],
    }


class CompletionWriter(OpenAIWriter):
    """Chunks with the text of one answer each; the reason comes with the last."""

    def __init__(self, model: ServedModel, body: CompletionBody, generation: GenerationRequest) -> None:
        self.tokenizer, self.body, self.generation = model.tokenizer, body, generation
        self.head = Head(model, "cmpl", "text_completion", body.model)
        self.offsets = [0] * generation.answers

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

    def put(self, index: int, event: Event) -> bytes:
        """One token, and the end."""
        text = "" if self.body.max_tokens == 0 else event.text
        logprobs = None
        if self.body.logprobs is not None and event.token is not None:
            picked, skip = Picked(event.token, event.logprob, event.top), _skips(self.body)
            logprobs = table(self.tokenizer, [picked], self.body.logprobs, self.offsets[index], skip)
            if not (skip and event.token in self.tokenizer.special_ids):
                self.offsets[index] += len(logprobs["tokens"][0])
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
