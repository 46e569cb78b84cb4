"""Penalties and constraints on the next token's logits, under their public Hugging Face names.

A processor is called with ids (B, S) so far and scores (B, V), and returns new scores; it never changes its input.
`prompt_mask` (rows, P), True = a real token, keeps left padding out of what counts as "seen": a row gives the same
scores alone and in a padded batch. Rows that share a prompt (beams, several returned sequences) share its mask row.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llama2.errors import InputError
from llama2.generation.config import as_list

SequenceBias = Mapping[tuple[int, ...], float] | Sequence[Sequence[Any]]


class LogitsProcessor:
    """Base of every processor: ids (B, S) and scores (B, V) -> scores (B, V)."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(input_ids, scores)")


LogitsWarper = LogitsProcessor  # the base of the filters, under the name that it had in 4.x


class LogitsProcessorList(list[Any]):
    """Processors applied in order; any callable of (input_ids, scores) will do."""

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Keywords go to the processors that take more than (input_ids, scores), which must all be given."""
        for processor in self:
            scores = processor(input_ids, scores, **(_further(processor, kwargs) if kwargs else {}))
        return scores


def _further(processor: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The keywords that a processor's further arguments are; raises InputError where one of them is not given."""
    names = list(inspect.signature(processor).parameters)[2:]
    if missing := [name for name in names if name not in kwargs]:
        raise InputError(f"{type(processor).__name__} needs {', '.join(missing)}, which the call does not give")
    return kwargs if names else {}


def _ids_tensor(ids: Any, device: Any) -> Tensor:
    """Token ids as the tensor that transformers' processors show."""
    return torch.tensor(as_list(ids), dtype=torch.long, device=device)


def _need(good: bool, name: str, value: Any, bound: str) -> None:
    if not good:
        raise InputError(f"{name} is {value!r}; it must be {bound}")


def banned(scores: Tensor, ids: Iterable[int]) -> Tensor:
    """A copy of `scores` with the columns `ids` at -inf. Raises InputError for an id outside the vocabulary."""
    columns = list(ids)
    outside = [i for i in columns if not 0 <= i < scores.shape[-1]]
    if outside:
        raise InputError(f"token ids {outside} do not exist; ids run from 0 to {scores.shape[-1] - 1}")
    out = scores.clone()
    out[:, columns] = -math.inf
    return out


def _rows(mask: Tensor, rows: int) -> Tensor:
    """`mask` with each row repeated, so that it has as many rows as the batch."""
    return mask if len(mask) == rows else mask.repeat_interleave(rows // len(mask), dim=0)


def without_padding(input_ids: Tensor, prompt_mask: Tensor | None) -> Tensor:
    """ids whose padding is replaced by the row's last prompt token, which is there anyway."""
    if prompt_mask is None:
        return input_ids
    width = prompt_mask.shape[1]
    real, prompt = _rows(prompt_mask, len(input_ids)), input_ids[:, :width]
    return torch.cat((torch.where(real, prompt, prompt[:, -1:]), input_ids[:, width:]), dim=1)


class RepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Divides positive and multiplies negative logits of ids seen before (Keskar et al. 2019, arXiv 1909.05858).

    The first `prompt_ignore_length` ids, padding included, do not count.
    """

    def __init__(
        self, penalty: float, prompt_ignore_length: int | None = None, *, prompt_mask: Tensor | None = None
    ) -> None:
        _need(isinstance(penalty, int | float) and penalty > 0, "penalty", penalty, "a positive number")
        ignored = prompt_ignore_length
        good = ignored is None or (isinstance(ignored, int) and ignored >= 0)
        _need(good, "prompt_ignore_length", ignored, "an integer of at least 0")
        self.penalty, self.prompt_ignore_length, self.prompt_mask = float(penalty), ignored, prompt_mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        seen = without_padding(input_ids, self.prompt_mask)[:, self.prompt_ignore_length or 0 :]
        if seen.shape[1] == 0:
            return scores
        score = scores.gather(1, seen)
        return scores.scatter(1, seen, torch.where(score < 0, score * self.penalty, score / self.penalty))


class EncoderRepetitionPenaltyLogitsProcessor(RepetitionPenaltyLogitsProcessor):
    """The inverse for the prompt: above 1 it favours ids of the prompt (rows, P)."""

    def __init__(self, penalty: float, encoder_input_ids: Tensor, prompt_mask: Tensor | None = None) -> None:
        super().__init__(penalty, prompt_mask=prompt_mask)
        self.penalty, self.encoder_input_ids = 1 / self.penalty, encoder_input_ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return super().__call__(_rows(self.encoder_input_ids, len(scores)), scores)


def _banned_after(context: list[int], ngrams: list[int], size: int) -> list[int]:
    """Tokens that would complete an n-gram of `ngrams` after the end of `context`."""
    if len(context) + 1 < size:
        return []
    tail = context[len(context) - size + 1 :]
    return [ngrams[i + size - 1] for i in range(len(ngrams) - size + 1) if ngrams[i : i + size - 1] == tail]


class NoRepeatNGramLogitsProcessor(LogitsProcessor):
    """Forbids any n-gram of `ngram_size` ids that prompt and continuation hold already."""

    def __init__(self, ngram_size: int, prompt_mask: Tensor | None = None) -> None:
        _need(isinstance(ngram_size, int) and ngram_size > 0, "ngram_size", ngram_size, "an integer of at least 1")
        self.ngram_size = ngram_size
        self.skip = [] if prompt_mask is None else (~prompt_mask).sum(1).tolist()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = scores.clone()
        rows = input_ids.tolist()
        per_prompt = len(rows) // len(self.skip) if self.skip else 1
        for row, ids in enumerate(rows):
            real = ids[self.skip[row // per_prompt] :] if self.skip else ids
            out[row, _banned_after(real, real, self.ngram_size)] = -math.inf
        return out


class EncoderNoRepeatNGramLogitsProcessor(LogitsProcessor):
    """Forbids the prompt's n-grams in the continuation."""

    def __init__(self, encoder_ngram_size: int, encoder_input_ids: Tensor, prompt_mask: Tensor | None = None) -> None:
        size = encoder_ngram_size
        _need(isinstance(size, int) and size > 0, "encoder_ngram_size", size, "an integer of at least 1")
        self.ngram_size = size
        encoder_input_ids = encoder_input_ids.reshape(-1, encoder_input_ids.shape[-1])
        self.batch_size = len(encoder_input_ids)
        self.prompts = [
            [i for i, real in zip(ids, keep, strict=True) if real]
            for ids, keep in zip(
                encoder_input_ids.tolist(),
                (torch.ones_like(encoder_input_ids) if prompt_mask is None else prompt_mask).tolist(),
                strict=True,
            )
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = scores.clone()
        rows = input_ids.tolist()
        per_prompt = max(len(rows) // max(len(self.prompts), 1), 1)
        for row, ids in enumerate(rows):
            out[row, _banned_after(ids, self.prompts[row // per_prompt], self.ngram_size)] = -math.inf
        return out


class SequenceBiasLogitsProcessor(LogitsProcessor):
    """Adds a bias to the last id of each given sequence where the ids before it have just been written.

    `sequence_bias`: {(ids): bias} or [[[ids], bias], ...].
    """

    def __init__(self, sequence_bias: SequenceBias) -> None:
        pairs = sequence_bias.items() if isinstance(sequence_bias, Mapping) else sequence_bias
        self.sequence_bias = {tuple(int(i) for i in key): float(bias) for key, bias in pairs}
        bad = [key for key in self.sequence_bias if not key or min(key) < 0]
        _need(bool(self.sequence_bias) and not bad, "sequence_bias", sequence_bias, "{(id, ...): bias} with ids >= 0")
        self._single: Tensor | None = None
        self._longer: list[tuple[Tensor, int, float]] = []

    def _prepare(self, scores: Tensor) -> Tensor:
        size = scores.shape[-1]
        outside = sorted({i for key in self.sequence_bias for i in key if i >= size})
        if outside:
            raise InputError(f"sequence_bias names token ids {outside}; ids run from 0 to {size - 1}")
        self._single = scores.new_zeros(size)
        for key, bias in self.sequence_bias.items():
            if len(key) == 1:
                self._single[key[0]] = bias
            else:
                self._longer.append((torch.tensor(key[:-1], device=scores.device), key[-1], bias))
        return self._single

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        single = self._prepare(scores) if self._single is None else self._single
        out = scores + single
        for prefix, last, bias in self._longer:
            if len(prefix) <= input_ids.shape[1]:
                matches = (input_ids[:, -len(prefix) :] == prefix).all(1)
                out[:, last] += torch.where(matches, bias, 0.0)
        return out


class NoBadWordsLogitsProcessor(SequenceBiasLogitsProcessor):
    """Forbids sequences of ids; a word that is just an end id is allowed, or no text could end."""

    def __init__(self, bad_words_ids: Sequence[Sequence[int]], eos_token_id: Any = None) -> None:
        good = bool(bad_words_ids) and all(isinstance(w, list | tuple) and w for w in bad_words_ids)
        _need(good, "bad_words_ids", bad_words_ids, "a non-empty list of non-empty lists of token ids")
        self.bad_word_ids = bad_words_ids
        ends = [[i] for i in as_list(eos_token_id)]
        words = [tuple(word) for word in bad_words_ids if list(word) not in ends]
        self._allowed = not words
        if words:
            super().__init__(dict.fromkeys(words, -math.inf))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores if self._allowed else super().__call__(input_ids, scores)


class MinLengthLogitsProcessor(LogitsProcessor):
    """No end before `min_length` ids, prompt and padding counted."""

    def __init__(self, min_length: int, eos_token_id: Any, device: Any = "cpu") -> None:
        _need(isinstance(min_length, int) and min_length >= 0, "min_length", min_length, "an integer of at least 0")
        self.min_length, self._ends = min_length, as_list(eos_token_id)
        self.eos_token_id = _ids_tensor(eos_token_id, device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return banned(scores, self._ends) if input_ids.shape[1] < self.min_length else scores


class MinNewTokensLengthLogitsProcessor(MinLengthLogitsProcessor):
    """No end before `min_new_tokens` ids after a prompt of `prompt_length_to_skip`."""

    def __init__(self, prompt_length_to_skip: int, min_new_tokens: int, eos_token_id: Any, device: Any = "cpu") -> None:
        super().__init__(prompt_length_to_skip + min_new_tokens, eos_token_id, device)
        self.prompt_length_to_skip, self.min_new_tokens = prompt_length_to_skip, min_new_tokens


class PrefixConstrainedLogitsProcessor(LogitsProcessor):
    """Allows only the ids that `prefix_allowed_tokens_fn(batch_id, ids (S,))` returns."""

    def __init__(self, prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]], num_beams: int) -> None:
        self._prefix_allowed_tokens_fn, self._num_beams = prefix_allowed_tokens_fn, num_beams

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out = torch.full_like(scores, -math.inf)
        for row, ids in enumerate(input_ids):
            allowed = list(self._prefix_allowed_tokens_fn(row // self._num_beams, ids))
            if not allowed:
                raise InputError(
                    f"prefix_allowed_tokens_fn allowed no token after {ids.tolist()[-8:]} (row {row}); it must return "
                    "at least one id, such as the end id"
                )
            out[row, allowed] = scores[row, allowed]
        return out


class ForcedBOSTokenLogitsProcessor(LogitsProcessor):
    """The first generated id after a prompt of one token."""

    def __init__(self, bos_token_id: int) -> None:
        self.bos_token_id = bos_token_id

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _only(scores, [self.bos_token_id]) if input_ids.shape[1] == 1 else scores


class ForcedEOSTokenLogitsProcessor(LogitsProcessor):
    """The last id when `max_length` is reached."""

    def __init__(self, max_length: int, eos_token_id: Any, device: Any = "cpu") -> None:
        self.max_length, self._ends = max_length, as_list(eos_token_id)
        self.eos_token_id = _ids_tensor(eos_token_id, device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _only(scores, self._ends) if input_ids.shape[1] == self.max_length - 1 else scores


def _only(scores: Tensor, ids: list[int]) -> Tensor:
    _need(max(ids) < scores.shape[-1], "a forced token id", max(ids), f"below the vocabulary size {scores.shape[-1]}")
    out = torch.full_like(scores, -math.inf)
    out[:, ids] = 0.0
    return out


class InfNanRemoveLogitsProcessor(LogitsProcessor):
    """NaN -> 0, +inf and -inf -> the largest and the smallest finite number of the dtype."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.nan_to_num(nan=0.0)


class ExponentialDecayLengthPenalty(LogitsProcessor):
    """From `start` new tokens on, raises the end logit by |logit| * (factor ** tokens beyond - 1)."""

    def __init__(
        self,
        exponential_decay_length_penalty: tuple[int, float],
        eos_token_id: Any,
        input_ids_seq_length: int,
        device: Any = "cpu",
    ) -> None:
        start, self.regulation_factor = exponential_decay_length_penalty
        self.regulation_start = start + input_ids_seq_length
        self._ends, self.eos_token_id = as_list(eos_token_id), _ids_tensor(eos_token_id, device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        beyond = input_ids.shape[1] - self.regulation_start
        if beyond <= 0:
            return scores
        out = scores.clone()
        end = scores[:, self._ends]
        raised = end + end.abs() * (self.regulation_factor**beyond - 1)
        out[:, self._ends] = torch.where(end.isfinite(), raised, end)
        return out


class SuppressTokensLogitsProcessor(LogitsProcessor):
    """Forbids ids everywhere."""

    def __init__(self, suppress_tokens: Any, device: Any = "cpu") -> None:
        self._ids, self.suppress_tokens = as_list(suppress_tokens), _ids_tensor(suppress_tokens, device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return banned(scores, self._ids)


class SuppressTokensAtBeginLogitsProcessor(SuppressTokensLogitsProcessor):
    """Forbids ids as the first one after `begin_index` ids."""

    def __init__(self, begin_suppress_tokens: Any, begin_index: int, device: Any = "cpu") -> None:
        super().__init__(begin_suppress_tokens, device)
        self.begin_suppress_tokens, self.begin_index = self.suppress_tokens, begin_index

    def set_begin_index(self, begin_index: int) -> None:
        """Moves the place at which the ids are forbidden."""
        self.begin_index = begin_index

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return super().__call__(input_ids, scores) if input_ids.shape[1] == self.begin_index else scores


class LogitNormalization(LogitsProcessor):
    """log_softmax, so that the scores are log-probabilities again."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.log_softmax(dim=-1)


class Forward(Protocol):
    """The part of a causal language model that guidance calls."""

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any: ...


class UnbatchedClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
    """Moves away from an unconditional run of the same model (Sanchez et al. 2023, arXiv 2306.17806).

    log p = scale * (log p(cond) - log p(uncond)) + log p(uncond). The unconditional prompt (rows, P) defaults to the
    last token of the prompt. Holds a cache: one object serves one generate() call, without beams.
    """

    def __init__(
        self,
        guidance_scale: float,
        model: Forward,
        unconditional_ids: Tensor | None = None,
        unconditional_attention_mask: Tensor | None = None,
        use_cache: bool = True,
    ) -> None:
        self.guidance_scale, self.model, self.use_cache = guidance_scale, model, use_cache
        self.ids, self.mask = unconditional_ids, unconditional_attention_mask
        self._cache: Any = None
        self._started = False

    def get_unconditional_logits(self, input_ids: Tensor) -> Tensor:
        """Logits (rows, T, V) of the unconditional run behind the last of these ids."""
        if not self._started:
            ids = input_ids[:, -1:] if self.ids is None else _rows(self.ids, len(input_ids))
            mask = torch.ones_like(ids) if self.mask is None else _rows(self.mask, len(input_ids))
            self._started, new = True, ids
        else:
            assert self.ids is not None and self.mask is not None
            new = input_ids[:, -1:]
            ids, mask = torch.cat((self.ids, new), 1), torch.cat((self.mask, torch.ones_like(new)), 1)
            if not self.use_cache:
                new = ids
        self.ids, self.mask = ids, mask
        # Positions are given where padding moves them; the model knows the others.
        moved = {} if bool(mask.all()) else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -new.shape[1] :]}
        output = self.model(
            new,
            attention_mask=mask,
            past_key_values=self._cache if self.use_cache else None,
            use_cache=self.use_cache,
            **moved,
        )
        self._cache = output.past_key_values
        logits: Tensor = output.logits
        return logits

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.guidance_scale == 1:
            return scores.log_softmax(-1)
        wanted = scores.log_softmax(-1)
        other = self.get_unconditional_logits(input_ids)[:, -1].to(scores.dtype).log_softmax(-1)
        return self.guidance_scale * (wanted - other) + other


class ClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
    """Guidance where the batch holds the conditional rows first and then as many unconditional ones."""

    def __init__(self, guidance_scale: float) -> None:
        _need(guidance_scale > 1, "guidance_scale", guidance_scale, "above 1; 1 switches it off")
        self.guidance_scale = guidance_scale

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(scores) != 2 * len(input_ids):
            raise InputError(
                f"scores have {len(scores)} rows for {len(input_ids)} rows of ids; give conditional and unconditional "
                "rows, twice as many"
            )
        wanted, other = scores.chunk(2)
        return other + (wanted - other) * self.guidance_scale
