"""The draws of generate(): torch's own numbers, or those of seeds (`seeded`), which need no torch.

B rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from llama2.generation.seeded import SeededSampler, Shortlisted, likeliest
from llama2.generation.tensors import lies_in_memory
from llama2.noise import can_end, is_known, some_of


class Sampler:
    """Picks the next token of each row: the likeliest, or a draw.

    Without `seeds` the draw is torch.multinomial with `generator` or torch's global state, the same numbers that
    transformers draws. With `seeds` (one per row) it is that of a `SeededSampler`.
    """

    def __init__(
        self, do_sample: bool, generator: torch.Generator | None = None, seeds: Sequence[int] | None = None
    ) -> None:
        self.do_sample, self.generator, self._seeds = do_sample, generator, seeds
        self._seeded = None if seeds is None else SeededSampler(do_sample, seeds)
        self._noise: Tensor | None = None  # of a draw that `among` began and left to `draw`

    def __call__(self, scores_BV: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B,) and the largest score of each row (B,), which is not finite where no token could be picked."""
        in_memory = lies_in_memory(scores_BV)
        if in_memory and (self._seeded is not None or not self.do_sample):
            drawn = likeliest(scores_BV.numpy()) if self._seeded is None else self._seeded(scores_BV.numpy())
            return torch.from_numpy(drawn[0]), torch.from_numpy(drawn[1])
        peak_B, best_B = scores_BV.max(dim=-1)
        if not self.do_sample:
            return best_B, peak_B
        return self.draw(scores_BV.softmax(-1), peak_B), peak_B

    def draw(self, p_BV: Tensor, peak_B: Tensor | None = None) -> Tensor:
        """One token per row from probabilities; rows whose peak is not finite get an arbitrary one."""
        if self._seeded is not None:
            tokens: Tensor = self._seeded.draw(p_BV, peak_B)
            return tokens
        if peak_B is not None:
            p_BV = torch.where(peak_B.isfinite()[:, None], p_BV, 1.0)
        if self._noise is not None:  # what it does not reach has probability 0
            noise_BV, begun = torch.ones_like(p_BV), self._noise
            noise_BV.view(-1)[: len(begun)] = begun
            self._noise = None
            return (p_BV / noise_BV).argmax(-1)
        return torch.multinomial(p_BV, 1, generator=self.generator).squeeze(1)

    def among(self, rows: Sequence[Shortlisted], vocabulary: int, margin: float) -> list[int] | None:
        """As `draw`, a token per row, from ids in ascending order with their probabilities.

        None where probabilities `margin` away could give another: the next `draw` then uses the same random numbers.
        """
        if self._seeded is not None:
            return self._seeded.among(rows, vocabulary, margin)
        # A row with one token left races alone: its numbers count as drawn and are not looked at.
        places = [i * vocabulary + column for i, (ids, _) in enumerate(rows) if len(ids) > 1 for column in ids]
        values, undo = self._noise_at(places, len(rows) * vocabulary)
        waits = iter(values)
        tokens = [ids[0] if len(ids) == 1 else _race(ids, p, [next(waits) for _ in ids], margin) for ids, p in rows]
        if None in tokens:
            undo()
        return None if None in tokens else [token for token in tokens if token is not None]

    def _noise_at(self, places: list[int], total: int) -> tuple[list[float], Callable[[], None]]:
        """Those at `places` of the `total` Exp(1) numbers that torch.multinomial would draw, which count as drawn; and
        what leaves them all to the next `draw`."""
        source = torch.default_generator if self.generator is None else self.generator
        if source.device.type == "cpu" and is_known():
            return some_of(source, places, total)
        noise = self._first_noise(max(places, default=0) + 1, total)

        def keep() -> None:
            self._noise = noise

        return noise.numpy()[places].tolist(), keep

    def _first_noise(self, count: int, total: int) -> Tensor:
        """The first `count`, or more, of the `total` Exp(1) numbers that torch.multinomial would draw."""
        count = min(total, max(count, 64)) if can_end() else total
        return torch.empty(count).exponential_(generator=self.generator)

    @cached_property
    def _generators(self) -> list[torch.Generator]:
        """One per row, at the beginning of the numbers that its seed gives."""
        return [torch.Generator().manual_seed(seed) for seed in self._seeds or ()]

    def exponential(self, like_BV: Tensor) -> Tensor:
        """Draws of Exp(1) in the shape of `like_BV`, each row from its own generator where there are seeds."""
        if self._seeds is None:
            return torch.empty_like(like_BV).exponential_(generator=self.generator)
        numbers = [
            torch.empty(like_BV.shape[1], dtype=like_BV.dtype).exponential_(generator=g) for g in self._generators
        ]
        return torch.stack(numbers).to(like_BV.device)

    def uniform(self) -> Tensor:
        """One number in [0, 1) a row, float64; one number in all without seeds."""
        if self._seeded is not None:
            return torch.from_numpy(self._seeded.uniform().copy())
        device = "cpu" if self.generator is None else self.generator.device
        return torch.rand(1, dtype=torch.float64, generator=self.generator, device=device)


def _race(ids: list[int], p: list[float], noise: list[float], margin: float) -> int | None:
    """The token of the largest p / noise, None where another is as good but for `margin`."""
    if min(noise) <= 0:
        return None
    times = [share / wait for share, wait in zip(p, noise, strict=True)]
    best = max(times)
    near = [i for i, ratio in enumerate(times) if ratio > best * (1 - 2 * margin)]
    return ids[near[0]] if len(near) == 1 else None
