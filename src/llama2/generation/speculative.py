"""Assisted decoding: cheap drafts, checked by the model in one pass (Leviathan et al. 2023, arXiv 2211.17192).

Greedy search gives what it gives without drafts. Sampling keeps its exact distribution: a drafted token x is accepted
with probability min(1, p(x) / q(x)), and in its place comes a draw from max(p - q, 0). One row only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from llama2.cache import DynamicCache
from llama2.errors import InputError
from llama2.generation.drafts import check_drafts, check_vocabularies, heuristic_count, look_up
from llama2.generation.request import GenerateArguments, Request
from llama2.generation.seeded import invalid_logits
from llama2.rope import promoted
from llama2.runners.native import NativeCache
from llama2.runners.padded import PaddedRunner, make_runner


class DraftSource(Protocol):
    """Where drafts come from."""

    def propose(self, ids: Tensor, most: int) -> tuple[Tensor, Tensor | None]:
        """At most `most` ids (n,) to follow ids (1, S), and what they were drawn from (n, V); None: certain."""

    def learn(self, proposed: int, accepted: int) -> None:
        """Receives how many of its last proposal were accepted."""


class PromptLookup:
    """Proposes what followed the latest earlier occurrence of the last few ids."""

    def __init__(self, count: int, max_ngram: int = 2) -> None:
        self.count, self.max_ngram = count, max_ngram

    def propose(self, ids: Tensor, most: int) -> tuple[Tensor, Tensor | None]:
        """As Drafter.propose: the longest n-gram that was seen before wins."""
        guesses = look_up(ids[0].tolist(), min(self.count, most), self.max_ngram, None)
        return ids.new_tensor(guesses), None

    def learn(self, proposed: int, accepted: int) -> None:
        """Nothing to adapt."""


class AssistantModel:
    """Proposes what a smaller model with the same vocabulary would write, with the same processors."""

    def __init__(
        self,
        runner: PaddedRunner,
        request: Request,
        count: int,
        threshold: float | None,
        schedule: str,
        kept: Any = None,
    ) -> None:
        """kept: the assistant's settings, whose num_assistant_tokens follows the schedule "heuristic" over calls."""
        self.runner, self.request = runner, request
        self.count, self.threshold, self.schedule = count, threshold, schedule
        self.kept = kept if schedule == "heuristic" else None
        self.cache = runner.new_cache(None, 1, request.max_length)

    def propose(self, ids: Tensor, most: int) -> tuple[Tensor, Tensor | None]:
        """As Drafter.propose. A draft ends with an end id, or where the assistant is not confident."""
        request, length = self.request, ids.shape[1]
        # All but the newest id are either older or drafts that were accepted: their keys are right.
        cached = min(self.cache.get_seq_length(), length - 1)
        self.cache.crop(cached)
        text, new = ids, ids[:, cached:]
        tokens: list[Tensor] = []
        drawn_from: list[Tensor] = []
        for _ in range(min(self.count, most)):
            end = text.shape[1]
            mask = None if request.mask is None else request.mask[:, :end]
            logits = self.runner.step(new, request.positions[:, end - new.shape[1] : end], mask, self.cache)[:, -1]
            scores = request.processors(text, logits.to(promoted(logits.dtype)))
            p = scores.softmax(-1)
            token = request.sampler.draw(p) if request.sampler.do_sample else scores.argmax(-1)
            tokens.append(token)
            drawn_from.append(p)
            new = token[:, None]
            text = torch.cat((text, new), 1)
            doubtful = self.threshold is not None and float(p[0, token]) < self.threshold
            if doubtful or bool(torch.isin(token, request.eos).any()):
                break
        if not tokens:
            return ids[0, :0], None
        return torch.cat(tokens), torch.cat(drawn_from) if request.sampler.do_sample else None

    def learn(self, proposed: int, accepted: int) -> None:
        """Two more drafts after a full success, else one less, unless the schedule is constant."""
        if self.schedule != "constant" and proposed:
            self.count = heuristic_count(self.count, proposed, accepted)
            if self.kept is not None:
                self.kept.num_assistant_tokens = self.count


def drafting_model(model: Any, assistant: Any, request: Request, call: GenerateArguments) -> AssistantModel:
    """The drafter around `assistant`. Raises InputError where its vocabulary or tokenizer differs."""
    if call.assistant_tokenizer is not None and call.assistant_tokenizer is not call.tokenizer:
        raise InputError(
            "an assistant with a tokenizer of its own is not implemented; use an assistant with the model's tokenizer "
            "and leave assistant_tokenizer out"
        )
    check_vocabularies("assistant", assistant.config.vocab_size, model.config.vocab_size)
    config, own = request.config, getattr(assistant, "generation_config", None)

    def setting(name: str) -> Any:
        return config.value(name) if own is None or config.is_set(name) else own.value(name)

    return AssistantModel(
        make_runner(call.runner if isinstance(call.runner, str) else "auto", assistant),
        request,
        setting("num_assistant_tokens"),
        setting("assistant_confidence_threshold") or None,
        setting("num_assistant_tokens_schedule"),
        own,
    )


def _check(request: Request) -> None:
    config = request.config
    if len(request.ids) != 1:
        raise InputError(f"assisted decoding takes one row but there are {len(request.ids)}; generate one at a time")
    if request.cache is None or not isinstance(request.cache, DynamicCache | NativeCache):
        raise InputError("assisted decoding takes back tokens, which needs use_cache=True and the dynamic cache")
    if config.guidance_scale not in (None, 1):
        raise InputError("guidance_scale does not work with assisted decoding; leave one of them out")
    if request.offset:
        raise InputError("assisted decoding needs the prompt as input_ids, not as inputs_embeds")


class _Writer:
    """Writes accepted tokens into the request, one by one, until the row is done."""

    def __init__(self, request: Request, put: Callable[[Tensor], None] | None) -> None:
        self.request, self.put, self.length, self.done = request, put, request.width, False

    def processed(self, logits_V: Tensor, index: int | None = None) -> Tensor:
        """Scores (1, V) of the next token; kept, if the caller asked, with the logits and the rest of the step.

        index: which of the tokens that were fed it follows, None for the prompt's.
        """
        request = self.request
        raw = logits_V[None].to(promoted(logits_V.dtype))
        scores: Tensor = request.processors(request.ids[:, : self.length], raw)
        invalid = ~scores.amax(-1).isfinite()
        if bool(invalid):
            raise invalid_logits(raw, scores, [0], self.length - request.width + 1)
        request.record.add(request.runner, raw, scores, index)
        return scores

    def write(self, token: Tensor) -> None:
        """Appends a token (1,) and finds out whether the row is done."""
        request = self.request
        request.ids[:, self.length] = token
        self.length += 1
        self.done = self.length == request.max_length or bool(torch.isin(token, request.eos).any())
        if request.criteria:
            kept = None if request.record.scores is None else tuple(request.record.scores)
            self.done |= bool(request.criteria(request.ids[:, : self.length], kept).any())
        if self.put is not None:
            self.put(token.cpu())


def _choose(request: Request, scores: Tensor, draft: Tensor | None, q_V: Tensor | None) -> tuple[Tensor, bool]:
    """The token (1,) to write, given the draft's (or None) and its distribution, and whether the draft was right."""
    sampler = request.sampler
    if not sampler.do_sample:
        token = scores.argmax(-1)
        return token, draft is not None and bool(token == draft)
    p = scores.softmax(-1)
    if draft is None:
        return sampler.draw(p), False
    q = torch.zeros_like(p).index_fill_(1, draft, 1.0) if q_V is None else q_V[None]
    if float(sampler.uniform()) * float(q[0, draft]) < float(p[0, draft]):
        return draft, True
    rest = (p - q).clamp(min=0)
    return sampler.draw(rest if bool(rest.sum() > 0) else p), False


def _take(
    request: Request, writer: _Writer, drafts: Tensor, drawn_from: Tensor | None, index: int, logits_V: Tensor
) -> tuple[bool, bool]:
    """Writes the token behind `index` drafts; whether the draft there was right, and whether the row is done."""
    draft = drafts[index : index + 1] if index < len(drafts) else None
    q_V = None if draft is None or drawn_from is None else drawn_from[index]
    token, right = _choose(request, writer.processed(logits_V, index), draft, q_V)
    writer.write(token)
    return right, writer.done


@torch.no_grad()
def speculate(request: Request, drafter: DraftSource, put: Callable[[Tensor], None] | None = None) -> int:
    """Fills `request.ids` and returns how many columns of it are used; `put` receives each new token (1,).

    Raises InputError for more than one row, without a dynamic cache, and where no token can be picked.
    """
    _check(request)
    writer = _Writer(request, put)
    writer.write(_choose(request, writer.processed(request.prefill()[0]), None, None)[0])
    while not writer.done:
        start = writer.length
        drafts, drawn_from = drafter.propose(request.ids[:, :start], request.max_length - start - 1)
        new = torch.cat((request.ids[0, start - 1 : start], drafts))[None]
        logits_TV = request.feed(new, start - 1, keep=new.shape[1])[0]
        accepted = check_drafts(len(drafts), logits_TV, partial(_take, request, writer, drafts, drawn_from))
        drafter.learn(len(drafts), accepted)
        request.cache.crop(writer.length - 1)
    return writer.length
