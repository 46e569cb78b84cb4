"""What a request adds to the logits beside the settings of generate(): penalties by count, biases, a watermark.

Each is a logits processor for one sequence: ids (1, S) so far and scores (1, V).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

WATERMARK_KEY = 15485863  # text-generation-inference's, so that its detectors work


class CountPenalty:
    """OpenAI's penalties: scores minus frequency times the count of an id in the answer, minus presence if it is there.

    Ids of the prompt do not count.
    """

    def __init__(self, frequency: float, presence: float, prompt: int, vocabulary: int) -> None:
        """prompt: tokens of the prompt."""
        self.frequency, self.presence, self.seen = frequency, presence, prompt
        self.penalty_V = torch.zeros(vocabulary)
        self._present: set[int] = set()

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        for token in ids[0, self.seen :].tolist():
            self.penalty_V[token] += self.frequency + (0.0 if token in self._present else self.presence)
            self._present.add(token)
        self.seen = ids.shape[1]
        return scores - self.penalty_V.to(scores.device)


class Bias:
    """Adds a number to the scores of some ids."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self.ids, self.values = torch.tensor(list(bias)), torch.tensor(list(bias.values()), dtype=torch.float32)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_add(1, self.ids.to(scores.device), self.values.to(scores)[None])


class Watermark:
    """Favours a list of ids that the previous id seeds (Kirchenbauer et al. 2023, arXiv 2301.10226)."""

    def __init__(self, gamma: float = 0.5, delta: float = 2.0) -> None:
        self.gamma, self.delta = gamma, delta

    def green(self, previous: int, vocabulary: int) -> Tensor:
        """The favoured ids."""
        generator = torch.Generator().manual_seed(WATERMARK_KEY * previous)
        return torch.randperm(vocabulary, generator=generator)[: int(self.gamma * vocabulary)]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        green = self.green(int(ids[0, -1]), scores.shape[1]).to(scores.device)
        return scores.index_add(1, green, torch.full((1, len(green)), self.delta).to(scores))
