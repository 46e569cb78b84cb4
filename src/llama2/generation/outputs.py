"""Records of generate()'s steps.

B rows, T new tokens of a step, S positions, H heads, D model, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from llama2.generation.config import GenerationConfig
from llama2.runners.padded import PaddedRunner, TorchRunner
from llama2.runners.prepared import PreparedRunner


@dataclass
class Record:
    """The records of each step that the caller requested."""

    scores: list[Tensor] | None = None
    logits: list[Tensor] | None = None
    attentions: list[Any] | None = None
    hidden_states: list[Any] | None = None

    @classmethod
    def of(cls, config: GenerationConfig) -> "Record":
        """Empty lists for what `config` asks for."""
        as_dict = config.value("return_dict_in_generate")
        names = ("scores", "logits", "attentions", "hidden_states")
        return cls(**{name: [] for name in names if as_dict and getattr(config, f"output_{name}")})

    def add(self, runner: PaddedRunner, logits: Tensor, scores: Tensor, index: int | None = None) -> None:
        """Keeps one step; of attentions and hidden states those of the new token `index`, None for all of them."""
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(logits)
        if isinstance(runner, TorchRunner | PreparedRunner):
            if self.attentions is not None:
                self.attentions.append(_rows_at(runner.attentions, index))
            if self.hidden_states is not None:
                self.hidden_states.append(
                    runner.hidden_states
                    if index is None or runner.hidden_states is None
                    else tuple(x_BTD[:, index : index + 1] for x_BTD in runner.hidden_states)
                )

    def fields(self) -> dict[str, tuple[Any, ...]]:
        """Returns the records, as the fields of an output."""
        return {name: tuple(kept) for name, kept in vars(self).items() if kept is not None}


def _rows_at(weights: tuple[Tensor, ...] | None, index: int | None) -> tuple[Tensor, ...] | None:
    """Attention of new token `index` of T, (B, H, 1, S - its followers) per layer; all of it for None."""
    if weights is None or index is None:
        return weights
    behind = weights[0].shape[2] - 1 - index
    return tuple(w_BHTS[:, :, index : index + 1, : w_BHTS.shape[3] - behind] for w_BHTS in weights)
