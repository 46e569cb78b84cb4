"""Beam search and beam sampling.

Each prompt keeps K running beams and the K best finished ones. A step takes max(2, 1 + end ids) * K continuations, so
that K of them can run on even if the best ones all end. A finished beam scores its summed log-probability divided by
(generated length ** length_penalty), the prompt not counted. N prompts, K beams, C candidates, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama2.generation.request import Request
from llama2.generation.seeded import invalid_logits
from llama2.outputs import GenerateBeamDecoderOnlyOutput
from llama2.rope import promoted

_WORST = -1e9  # below any sum of log-probabilities, yet finite, so that no NaN can come of it


@dataclass
class Beams:
    """Sequences (N, n, max_length), scores (N, n), and the row that each new token came from (N, n, new), -1: none."""

    ids: Tensor
    scores: Tensor
    origins: Tensor

    def take(self, order: Tensor, scores: Tensor | None = None) -> "Beams":
        """The beams `order` (N, m) of each prompt, with new scores where given."""
        return Beams(
            torch.take_along_dim(self.ids, order[..., None], 1),
            self.scores.gather(1, order) if scores is None else scores,
            torch.take_along_dim(self.origins, order[..., None], 1),
        )

    def and_(self, other: "Beams") -> "Beams":
        """Both sets side by side."""
        return Beams(
            torch.cat((self.ids, other.ids), 1),
            torch.cat((self.scores, other.scores), 1),
            torch.cat((self.origins, other.origins), 1),
        )


class Search:
    """The state of one beam search over a request whose rows are N * K."""

    def __init__(self, request: Request) -> None:
        config = request.config
        self.request, self.length = request, request.width
        self.prompts, self.beams = request.prompts, config.value("num_beams")
        self.candidates = max(2, 1 + len(request.eos)) * self.beams
        self.early_stopping, self.length_penalty = config.value("early_stopping"), config.value("length_penalty")
        shape, device = (self.prompts, self.beams), request.ids.device
        ids = request.ids.view(*shape, -1)
        # Only the first of the equal beams counts at the start, or all would take the same tokens.
        scores = torch.zeros(shape, device=device)
        scores[:, 1:] = _WORST
        origins = torch.full((*shape, request.max_length - request.width), -1, device=device)
        self.running = Beams(ids, scores, origins)
        self.finished = Beams(ids.clone(), torch.full(shape, _WORST, device=device), origins.clone())
        self.done = torch.zeros(shape, dtype=torch.bool, device=device)
        self.improvable = torch.ones((self.prompts, 1), dtype=torch.bool, device=device)

    @property
    def generated(self) -> int:
        """New tokens of the running beams."""
        return self.length - self.request.width

    def step(self, logits_BV: Tensor) -> bool:
        """Extends every beam by a token; whether the search goes on."""
        chosen = self._continuations(self._log_p(logits_BV))
        ends_NC = self._ends(chosen)
        self.length += 1
        best = chosen.scores + ends_NC * _WORST
        scores, order = best.topk(self.beams)
        self.running = chosen.take(order, scores)
        self._keep_finished(chosen, ends_NC)
        request = self.request
        request.ids = self.running.ids.reshape(len(request.ids), -1)
        if request.cache is not None:
            request.cache.reorder_cache(self.running.origins[..., self.generated - 1].reshape(-1))
        self._update_improvable()
        stop_early = (self.early_stopping is True) & self.done.all()
        return bool(self.improvable.any() & ~stop_early & ~ends_NC.all())

    def _log_p(self, logits_BV: Tensor) -> Tensor:
        request = self.request
        raw_BV = logits_BV.to(promoted(logits_BV.dtype))
        scores_BV = request.processors(request.ids[:, : self.length], raw_BV.log_softmax(-1))
        invalid_B = scores_BV.isnan().any(-1)
        if bool(invalid_B.any()):
            raise invalid_logits(raw_BV, scores_BV, invalid_B.nonzero().flatten().tolist(), self.generated + 1)
        request.record.add(request.runner, raw_BV, scores_BV)
        return scores_BV

    def _continuations(self, scores_BV: Tensor) -> Beams:
        vocabulary = scores_BV.shape[-1]
        total = scores_BV.view(self.prompts, self.beams, -1) + self.running.scores[..., None]
        total = total.view(self.prompts, -1)
        sampler = self.request.sampler
        if sampler.do_sample:
            # Sampling without replacement: the largest p / Exp(1). Tokens of probability 0 come last, not at all an
            # error: they carry their score of -inf. Best first as without sampling, for only the first K may end.
            p = total.softmax(-1)
            drawn = (p / sampler.exponential(p)).topk(self.candidates).indices
            scores, order = total.gather(1, drawn).sort(dim=-1, descending=True)
            places = drawn.gather(1, order)
        else:
            scores, places = total.topk(self.candidates)
        chosen = self.running.take(places // vocabulary, scores)
        rows = torch.arange(self.prompts, device=places.device)[:, None] * self.beams
        chosen.ids[:, :, self.length] = places % vocabulary
        chosen.origins[:, :, self.generated] = places // vocabulary + rows
        return chosen

    def _ends(self, chosen: Beams) -> Tensor:
        """Which candidates end with this token (N, C)."""
        request, flat = self.request, chosen.ids[:, :, : self.length + 1].flatten(0, 1)
        ends = torch.isin(flat[:, -1], request.eos)
        if request.criteria:
            ends |= request.criteria(flat, request.record.scores and tuple(request.record.scores))
        if self.length + 1 == request.max_length:
            ends = torch.ones_like(ends)
        return ends.view(self.prompts, -1)

    def _keep_finished(self, chosen: Beams, ends_NC: Tensor) -> None:
        """Merges candidates that have just ended into the best finished beams."""
        ended = ends_NC.clone()
        ended[:, self.beams :] = False  # an end ranked below K is no result, only room for the others
        closed = ~self.improvable
        if self.early_stopping is True:
            closed = closed | self.done.all(1, keepdim=True)
        scores = chosen.scores / self.generated**self.length_penalty
        scores = scores + closed * _WORST + ~ended * _WORST
        merged = self.finished.and_(Beams(chosen.ids, scores, chosen.origins))
        best, order = merged.scores.topk(self.beams)
        self.finished = merged.take(order, best)
        self.done = torch.cat((self.done, ended), 1).gather(1, order)

    def _update_improvable(self) -> None:
        """Whether a running beam of a prompt may still beat its worst finished one."""
        length = self.generated
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.request.max_length - self.request.width
        best = self.running.scores[:, :1] / length**self.length_penalty
        worst = torch.where(self.done, self.finished.scores.amin(1, keepdim=True), _WORST)
        self.improvable = self.improvable & (best > worst).any(1, keepdim=True)


@torch.no_grad()
def beam_search(request: Request) -> Tensor | GenerateBeamDecoderOnlyOutput:
    """Runs a prepared request with num_beams > 1: ids (N * num_return_sequences, L), best first for each prompt.

    Shorter rows end in pad ids. Raises InputError where a row has no token to take.
    """
    search = Search(request)
    logits_BV, goes_on = request.prefill(), True
    while goes_on:
        with request.limit_openmp:
            goes_on = search.step(logits_BV)
        if goes_on:
            logits_BV = request.advance(search.length)
    returned = request.config.value("num_return_sequences")
    ids, origins = (x[:, :returned].flatten(0, 1) for x in (search.finished.ids, search.finished.origins))
    longest = int((origins >= 0).sum(1).max())
    sequences = ids[:, : request.width + longest]
    if not request.config.value("return_dict_in_generate"):
        return sequences
    return GenerateBeamDecoderOnlyOutput(
        sequences=sequences,
        sequences_scores=search.finished.scores[:, :returned].flatten(),
        beam_indices=origins[:, :longest],
        past_key_values=_cache_of(search, returned),
        **request.record.fields(),
    )


def _cache_of(search: Search, returned: int) -> Any:
    """The cache of the sequences that come back, all but their last token: what a later call can go on from.

    The search has that of the running beams, which share beginnings with them; what differs is run once more.
    """
    request = search.request
    if request.cache is None:
        return None
    cached = request.cache.get_seq_length() - request.offset  # columns of ids
    sequences = search.finished.ids[:, :returned, :cached]
    shared = (sequences[:, :, None] == search.running.ids[:, None, :, :cached]).cumprod(-1).sum(-1)
    longest, places = shared.max(-1)
    rows = (places + torch.arange(len(places), device=places.device)[:, None] * search.beams).flatten()
    request.cache.reorder_cache(rows)
    start, end = int(longest.min()), int((search.finished.origins[:, :returned] >= 0).sum(-1).max()) + request.width - 1
    request.cache.crop(min(start, end) + request.offset)
    if start < end:
        tokens, first, last = sequences.flatten(0, 1)[:, start:end], start + request.offset, end + request.offset
        mask = None if request.mask is None else request.mask[rows, :last]
        positions = request.positions if len(request.positions) == 1 else request.positions[rows]
        request.runner.step(tokens, positions[:, first:last], mask, request.cache)
    return request.hand_back()
