"""Penalties and constraints on the next token's logits, under their public Hugging Face names.

A processor is called with ids (B, S) so far and scores (B, V), and returns new scores; it never changes its input.
`prompt_mask` (rows, P), True = a real token, keeps left padding out of what counts as "seen": a row gives the same
scores alone and in a padded batch. Rows that share a prompt (beams, several returned sequences) share its mask row.
ids, scores and masks are numpy arrays or torch tensors: each rule is written once for both (`arrays`). No torch here.
"""

import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama2.errors import InputError
from llama2.generation.arrays import Array, of, on_arrays, to_numpy
from llama2.generation.config import as_list
from llama2.lazy import door

SequenceBias = Mapping[tuple[int, ...], float] | Sequence[Sequence[Any]]


class LogitsProcessor:
    """Base of every processor: ids (B, S) and scores (B, V) -> scores (B, V)."""

    def __call__(self, input_ids: Array, scores: Array) -> Array:
        raise NotImplementedError(f"{type(self).__name__} must define __call__(input_ids, scores)")


LogitsWarper = LogitsProcessor  # the base of the filters, under the name that it had in 4.x


class LogitsProcessorList(list[Any]):
    """Processors applied in order; any callable of (input_ids, scores) will do."""

    def __call__(self, input_ids: Array, scores: Array, **kwargs: Any) -> Array:
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


_ids_tensor = door("generation.tensors", "ids_tensor", "Token ids as the tensor that transformers' processors show.")


def _need(good: bool, name: str, value: Any, bound: str) -> None:
    if not good:
        raise InputError(f"{name} is {value!r}; it must be {bound}")


def banned(scores: Array, ids: Iterable[int]) -> Array:
    """A copy of `scores` with the columns `ids` at -inf. Raises InputError for an id outside the vocabulary."""
    columns = list(ids)
    outside = [i for i in columns if not 0 <= i < scores.shape[-1]]
    if outside:
        raise InputError(f"token ids {outside} do not exist; ids run from 0 to {scores.shape[-1] - 1}")
    out = of(scores).copy(scores)
    out[:, columns] = -math.inf
    return out


def repeated(rows_of_prompts: Array, rows: int) -> Array:
    """Rows of prompts, each repeated, so that there are as many as in the batch."""
    prompts = len(rows_of_prompts)
    return rows_of_prompts if prompts == rows else rows_of_prompts[[i * prompts // rows for i in range(rows)]]


def without_padding(input_ids: Array, prompt_mask: Array | None) -> Array:
    """ids whose padding is replaced by the row's last prompt token, which is there anyway."""
    if prompt_mask is None:
        return input_ids
    arrays, width = of(input_ids), prompt_mask.shape[1]
    real, prompt = arrays.array(repeated(prompt_mask, len(input_ids)), input_ids), input_ids[:, :width]
    return arrays.concat((arrays.where(real, prompt, prompt[:, -1:]), input_ids[:, width:]))


class RepetitionPenaltyLogitsProcessor(LogitsProcessor):
    """Divides positive and multiplies negative logits of ids seen before (Keskar et al. 2019, arXiv 1909.05858).

    The first `prompt_ignore_length` ids, padding included, do not count.
    """

    def __init__(
        self, penalty: float, prompt_ignore_length: int | None = None, *, prompt_mask: Array | None = None
    ) -> None:
        _need(isinstance(penalty, int | float) and penalty > 0, "penalty", penalty, "a positive number")
        ignored = prompt_ignore_length
        good = ignored is None or (isinstance(ignored, int) and ignored >= 0)
        _need(good, "prompt_ignore_length", ignored, "an integer of at least 0")
        self.penalty, self.prompt_ignore_length, self.prompt_mask = float(penalty), ignored, prompt_mask

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        seen = without_padding(input_ids, self.prompt_mask)[:, self.prompt_ignore_length or 0 :]
        if seen.shape[1] == 0:
            return scores
        arrays = of(scores)
        score = arrays.take(scores, seen)
        return arrays.put(scores, seen, arrays.where(score < 0, score * self.penalty, score / self.penalty))


class EncoderRepetitionPenaltyLogitsProcessor(RepetitionPenaltyLogitsProcessor):
    """The inverse for the prompt: above 1 it favours ids of the prompt (rows, P)."""

    def __init__(self, penalty: float, encoder_input_ids: Array, prompt_mask: Array | None = None) -> None:
        super().__init__(penalty, prompt_mask=prompt_mask)
        self.penalty, self.encoder_input_ids = 1 / self.penalty, encoder_input_ids

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        prompts = of(scores).array(self.encoder_input_ids, scores)
        return super().__call__(repeated(prompts, len(scores)), scores)


def _banned_after(context: list[int], ngrams: list[int], size: int) -> list[int]:
    """Tokens that would complete an n-gram of `ngrams` after the end of `context`."""
    if len(context) + 1 < size:
        return []
    tail = context[len(context) - size + 1 :]
    return [ngrams[i + size - 1] for i in range(len(ngrams) - size + 1) if ngrams[i : i + size - 1] == tail]


class NoRepeatNGramLogitsProcessor(LogitsProcessor):
    """Forbids any n-gram of `ngram_size` ids that prompt and continuation hold already."""

    def __init__(self, ngram_size: int, prompt_mask: Array | None = None) -> None:
        _need(isinstance(ngram_size, int) and ngram_size > 0, "ngram_size", ngram_size, "an integer of at least 1")
        self.ngram_size = ngram_size
        self.skip = [] if prompt_mask is None else (~to_numpy(prompt_mask)).sum(1).tolist()

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        out = of(scores).copy(scores)
        rows = input_ids.tolist()
        per_prompt = len(rows) // len(self.skip) if self.skip else 1
        for row, ids in enumerate(rows):
            real = ids[self.skip[row // per_prompt] :] if self.skip else ids
            out[row, _banned_after(real, real, self.ngram_size)] = -math.inf
        return out


class EncoderNoRepeatNGramLogitsProcessor(LogitsProcessor):
    """Forbids the prompt's n-grams in the continuation."""

    def __init__(self, encoder_ngram_size: int, encoder_input_ids: Array, prompt_mask: Array | None = None) -> None:
        size = encoder_ngram_size
        _need(isinstance(size, int) and size > 0, "encoder_ngram_size", size, "an integer of at least 1")
        self.ngram_size = size
        prompts = to_numpy(encoder_input_ids).reshape(-1, encoder_input_ids.shape[-1])
        self.batch_size = len(prompts)
        real = prompts == prompts if prompt_mask is None else to_numpy(prompt_mask).astype(bool)
        self.prompts = [ids[keep].tolist() for ids, keep in zip(prompts, real, strict=True)]

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        out = of(scores).copy(scores)
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
        single = {key[0]: bias for key, bias in self.sequence_bias.items() if len(key) == 1}
        self._single, self._biases = list(single), list(single.values())
        self._longer = [(key[:-1], key[-1], bias) for key, bias in self.sequence_bias.items() if len(key) > 1]
        self._largest = max(i for key in self.sequence_bias for i in key)

    def _check(self, size: int) -> None:
        if self._largest >= size:
            outside = sorted({i for key in self.sequence_bias for i in key if i >= size})
            raise InputError(f"sequence_bias names token ids {outside}; ids run from 0 to {size - 1}")

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        self._check(scores.shape[-1])
        arrays = of(scores)
        out = arrays.copy(scores)
        if self._single:
            out[:, self._single] += arrays.array(self._biases, scores)
        for prefix, last, bias in self._longer:
            if len(prefix) <= input_ids.shape[1]:
                matches = (input_ids[:, -len(prefix) :] == arrays.array(prefix, input_ids)).all(1)
                out[:, last] = arrays.where(matches, out[:, last] + bias, out[:, last])
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

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        return scores if self._allowed else super().__call__(input_ids, scores)


class MinLengthLogitsProcessor(LogitsProcessor):
    """No end before `min_length` ids, prompt and padding counted."""

    def __init__(self, min_length: int, eos_token_id: Any, device: Any = "cpu") -> None:
        _need(isinstance(min_length, int) and min_length >= 0, "min_length", min_length, "an integer of at least 0")
        self.min_length, self._ends, self._device = min_length, as_list(eos_token_id), device

    @property
    def eos_token_id(self) -> Any:
        """The end ids as a tensor."""
        return _ids_tensor(self._ends, self._device)

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        return banned(scores, self._ends) if input_ids.shape[1] < self.min_length else scores


class MinNewTokensLengthLogitsProcessor(MinLengthLogitsProcessor):
    """No end before `min_new_tokens` ids after a prompt of `prompt_length_to_skip`."""

    def __init__(self, prompt_length_to_skip: int, min_new_tokens: int, eos_token_id: Any, device: Any = "cpu") -> None:
        super().__init__(prompt_length_to_skip + min_new_tokens, eos_token_id, device)
        self.prompt_length_to_skip, self.min_new_tokens = prompt_length_to_skip, min_new_tokens


class ForcedBOSTokenLogitsProcessor(LogitsProcessor):
    """The first generated id after a prompt of one token."""

    def __init__(self, bos_token_id: int) -> None:
        self.bos_token_id = bos_token_id

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        return _only(scores, [self.bos_token_id]) if input_ids.shape[1] == 1 else scores


class ForcedEOSTokenLogitsProcessor(LogitsProcessor):
    """The last id when `max_length` is reached."""

    def __init__(self, max_length: int, eos_token_id: Any, device: Any = "cpu") -> None:
        self.max_length, self._ends, self._device = max_length, as_list(eos_token_id), device

    @property
    def eos_token_id(self) -> Any:
        """The end ids as a tensor."""
        return _ids_tensor(self._ends, self._device)

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        return _only(scores, self._ends) if input_ids.shape[1] == self.max_length - 1 else scores


def _only(scores: Array, ids: list[int]) -> Array:
    _need(max(ids) < scores.shape[-1], "a forced token id", max(ids), f"below the vocabulary size {scores.shape[-1]}")
    out = of(scores).full_like(scores, -math.inf)
    out[:, ids] = 0.0
    return out


class InfNanRemoveLogitsProcessor(LogitsProcessor):
    """NaN -> 0, +inf and -inf -> the largest and the smallest finite number of the dtype."""

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        return of(scores).without_nan(scores)


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
        self._ends, self._device = as_list(eos_token_id), device

    @property
    def eos_token_id(self) -> Any:
        """The end ids as a tensor."""
        return _ids_tensor(self._ends, self._device)

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        beyond = input_ids.shape[1] - self.regulation_start
        if beyond <= 0:
            return scores
        arrays = of(scores)
        out, end = arrays.copy(scores), scores[:, self._ends]
        raised = end + abs(end) * (self.regulation_factor**beyond - 1)
        out[:, self._ends] = arrays.where(arrays.finite(end), raised, end)
        return out


class SuppressTokensLogitsProcessor(LogitsProcessor):
    """Forbids ids everywhere."""

    def __init__(self, suppress_tokens: Any, device: Any = "cpu") -> None:
        self._ids, self._device = as_list(suppress_tokens), device

    @property
    def suppress_tokens(self) -> Any:
        """The ids as a tensor."""
        return _ids_tensor(self._ids, self._device)

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        return banned(scores, self._ids)


class SuppressTokensAtBeginLogitsProcessor(SuppressTokensLogitsProcessor):
    """Forbids ids as the first one after `begin_index` ids."""

    def __init__(self, begin_suppress_tokens: Any, begin_index: int, device: Any = "cpu") -> None:
        super().__init__(begin_suppress_tokens, device)
        self.begin_index = begin_index

    @property
    def begin_suppress_tokens(self) -> Any:
        """The ids as a tensor."""
        return self.suppress_tokens

    def set_begin_index(self, begin_index: int) -> None:
        """Moves the place at which the ids are forbidden."""
        self.begin_index = begin_index

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        return super().__call__(input_ids, scores) if input_ids.shape[1] == self.begin_index else scores


class LogitNormalization(LogitsProcessor):
    """log_softmax, so that the scores are log-probabilities again."""

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        return of(scores).log_softmax(scores)


class ClassifierFreeGuidanceLogitsProcessor(LogitsProcessor):
    """Guidance where the batch holds the conditional rows first and then as many unconditional ones."""

    def __init__(self, guidance_scale: float) -> None:
        _need(guidance_scale > 1, "guidance_scale", guidance_scale, "above 1; 1 switches it off")
        self.guidance_scale = guidance_scale

    @on_arrays
    def __call__(self, input_ids: Array, scores: Array) -> Array:
        if len(scores) != 2 * len(input_ids):
            raise InputError(
                f"scores have {len(scores)} rows for {len(input_ids)} rows of ids; give conditional and unconditional "
                "rows, twice as many"
            )
        conditional, other = scores[: len(input_ids)], scores[len(input_ids) :]
        return other + (conditional - other) * self.guidance_scale
