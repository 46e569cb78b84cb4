"""Log-probabilities of answers under the model and under its reference, and the objectives that are functions of them.

A answers, P pairs, T tokens. A loss of pairs is a pure function (`PairLoss`) in its task's file; here it gets its
log-probabilities.
"""

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama2 import lora
from llama2.errors import InputError
from llama2.pretrained import PreTrainedModel
from llama2.protocols import CausalLM
from llama2.train.data import IGNORED, EncodedPair, Example
from llama2.train.losses import dpo_loss, targets, token_log_probs
from llama2.train.objectives import Batch, Loss, Objective, head_of, hidden_of, padded, places
from llama2.train.preference import Preference
from llama2.train.reference import Start, is_fresh, without_dropout
from llama2.train.unpaired import Unpaired

_TOLD = 64 << 20  # bytes of a reference


class LogProbs(NamedTuple):
    """Of answers: the sum over their tokens (A,), and how many these are (A,)."""

    sums: Tensor
    counts: Tensor

    @property
    def means(self) -> Tensor:
        """The mean by token (A,)."""
        return self.sums / self.counts.clamp(min=1)

    def halves(self) -> tuple["LogProbs", "LogProbs"]:
        """Those of the first and of the second half of the answers: chosen and rejected."""
        pairs = len(self.sums) // 2
        return LogProbs(self.sums[:pairs], self.counts[:pairs]), LogProbs(self.sums[pairs:], self.counts[pairs:])


def answer_batch(examples: Sequence[Example]) -> Batch:
    """Examples as tensors: input_ids, labels, position_ids (A, T), lengths (A,)."""
    return {
        "input_ids": padded([e.input_ids for e in examples], 0),
        "labels": padded([e.labels for e in examples], IGNORED),
        "position_ids": places([range(len(e.input_ids)) for e in examples]),
        "lengths": torch.tensor([len(e.input_ids) for e in examples]),
        "attention_mask": None,
    }


def answer_log_probs(model: PreTrainedModel, batch: Batch) -> LogProbs:
    """log p of each answer of a batch, over the tokens that are targets."""
    labels = batch["labels"]
    rows, wanted = targets(*hidden_of(model, batch))
    counts = (labels[:, 1:] != IGNORED).sum(1)
    found = token_log_probs(rows, head_of(model, rows.dtype), wanted)
    owner = torch.repeat_interleave(torch.arange(len(labels), device=found.device), counts)
    sums = torch.zeros(len(labels), dtype=found.dtype, device=found.device).index_add(0, owner, found)
    return LogProbs(sums, counts)


class Referenced:
    """Base class of objectives with a reference: the model as it was before the first step, or another model.

    A Trainer says where that is (`begin`). For a loss that is called without one it is the model without its adapters,
    or what it was at the first call. reference: another model. reference_free leaves the reference out.
    """

    reference: Any
    reference_free: bool
    _start: Start | None = None

    def begin(self, model: PreTrainedModel, apart: bool = False) -> int:
        """Keeps the reference, if the model itself is to be it: as it is now. Returns the bytes that this takes.

        apart: as a model of its own, for weights that are going to be sharded.
        """
        if self.reference_free or self.reference is not None or self._start is not None:
            return 0
        if apart and not is_fresh(model):
            self.reference = copy.deepcopy(model).requires_grad_(False).eval()
            return sum(p.nbytes for p in self.reference.parameters())
        self._start = Start(model)
        return self._start.nbytes

    @torch.no_grad()
    def of_reference(self, model: PreTrainedModel, batch: Batch) -> LogProbs | None:
        """log p of each answer under the reference; None without one."""
        if self.reference_free:
            return None
        if self.reference is not None:
            return answer_log_probs(self.reference.to(batch["input_ids"].device), batch)
        if self._start is None and not lora.names(model):
            self.begin(model)
        with lora.disabled(model) if self._start is None else self._start.restored():
            return answer_log_probs(model, batch)


def keep_reference(objective: Objective, model: PreTrainedModel, tell: bool = True, apart: bool = False) -> None:
    """The model as it is now, for an objective that compares with it; a large copy is told by a warning.

    apart: see `Referenced.begin`."""
    nbytes = objective.begin(model, apart) if isinstance(objective, Referenced) else 0
    if tell and nbytes > _TOLD:
        warnings.warn(
            f"the reference is a copy of what is trained, as it is now: {nbytes >> 20:,} MiB; a fresh adapter "
            "(peft_config) needs none",
            stacklevel=3,
        )


def reward_logs(up: Tensor, down: Tensor) -> dict[str, float]:
    """Sums over pairs of what TRL logs of the rewards of chosen and rejected answers (P,)."""
    return {
        "rewards/chosen": float(up.sum()),
        "rewards/rejected": float(down.sum()),
        "rewards/margins": float((up - down).sum()),
        "rewards/accuracies": float((up > down).sum()),
    }


# -- pairs with a reference --------------------------------------------------------------------------------------


class ReferencedPair(NamedTuple):
    """Two answers, and what the reference gives each: the sum of its log-probabilities, for ipo their mean."""

    chosen: Example
    rejected: Example
    reference: tuple[float, float]


@dataclass
class Preferences(Referenced):
    """Direct preference optimisation. The reference is the model as it was before the first step, or another model.

    Items are pairs, or pairs with what the reference gives them (`with_reference`), which need no reference any more.
    disable_dropout: of adapters, in policy and reference. See `Referenced` and `losses.dpo_loss` for the rest.
    precomputed: no reference is kept, since all items have theirs.
    """

    beta: float = 0.1
    kind: Preference = "sigmoid"
    label_smoothing: float = 0.0
    reference: CausalLM | None = None
    reference_free: bool = False
    disable_dropout: bool = True
    precomputed: bool = False

    def begin(self, model: PreTrainedModel, apart: bool = False) -> int:
        """As Referenced.begin; nothing where all items have their reference."""
        return 0 if self.precomputed else super().begin(model, apart)

    def tokens(self, item: EncodedPair | ReferencedPair) -> int:
        """As Objective.tokens."""
        return len(item.chosen.input_ids) + len(item.rejected.input_ids)

    def collate(self, items: Sequence[EncodedPair | ReferencedPair]) -> Batch:
        """As Objective.collate: those of `answer_batch`, the chosen answers first; reference (2 P,) where items have
        it."""
        batch = answer_batch([item.chosen for item in items] + [item.rejected for item in items])
        if all(isinstance(item, ReferencedPair) for item in items):
            values = [item.reference[i] for i in (0, 1) for item in items if isinstance(item, ReferencedPair)]
            batch["reference"] = torch.tensor(values, dtype=torch.float64)
        return batch

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        """As Objective.loss; units are pairs."""
        if self.disable_dropout:
            without_dropout(model)
        reference = self.reference_values(model, batch)
        policy = self._values(answer_log_probs(model, batch))
        pairs = len(policy) // 2
        if reference is None:
            reference = torch.zeros_like(policy)
        result = dpo_loss(
            *policy.split(pairs), *reference.to(policy.dtype).split(pairs),
            beta=self.beta, kind=self.kind, label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return Loss(result.loss * pairs, pairs, reward_logs(result.chosen_rewards, result.rejected_rewards))

    def reference_values(self, model: PreTrainedModel, batch: Batch) -> Tensor | None:
        """Reference values of each answer (2 P,): the sum of its log-probabilities, for ipo their mean."""
        if "reference" in batch:
            found: Tensor = batch["reference"]
            return found
        of_model = self.of_reference(model, batch)
        return None if of_model is None else self._values(of_model)

    def _values(self, found: LogProbs) -> Tensor:
        return found.means if self.kind == "ipo" else found.sums


# -- pairs without a reference -----------------------------------------------------------------------------------


# (chosen, rejected, tokens, **settings) -> losses of pairs, and the rewards of chosen and rejected, each (P,)
PairLoss = Callable[..., tuple[Tensor, Tensor, Tensor]]


class PairObjective:
    """A loss of the log-probabilities of both answers of a pair: CPO, SimPO, ORPO.

    kind and settings stand in checkpoints, so that a run goes on with the same ones. tokens: mean targets of a chosen
    answer in the data set, by which a sum over a batch's tokens becomes the mean by token over the whole set, whatever
    the batches are.
    """

    def __init__(self, kind: str, loss: PairLoss, items: Sequence[EncodedPair], **settings: float) -> None:
        self.kind = kind
        vars(self).update(settings)
        counts = [sum(label != IGNORED for label in item.chosen.labels[1:]) for item in items]
        self._tokens = sum(counts) / max(len(counts), 1)
        self._loss: PairLoss = partial(loss, **settings)

    def tokens(self, item: EncodedPair) -> int:
        """As Objective.tokens."""
        return len(item.chosen.input_ids) + len(item.rejected.input_ids)

    def collate(self, items: Sequence[EncodedPair]) -> Batch:
        """As Objective.collate: those of `answer_batch`, the chosen answers first."""
        return answer_batch([item.chosen for item in items] + [item.rejected for item in items])

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        """As Objective.loss; units are pairs."""
        without_dropout(model)
        chosen, rejected = answer_log_probs(model, batch).halves()
        losses, up, down = self._loss(chosen, rejected, self._tokens)
        return Loss(losses.sum(), len(losses), reward_logs(up.detach(), down.detach()))


# -- answers that are good or bad --------------------------------------------------------------------------------


class _Mismatched:
    """The mean of log pi - log reference of prompts with answers that are not theirs, as an objective's loss."""

    def __init__(self, owner: "UnpairedObjective") -> None:
        self._owner = owner

    def tokens(self, item: Unpaired) -> int:
        return len(item.mismatched.input_ids)

    def collate(self, items: Sequence[Unpaired]) -> Batch:
        return answer_batch([item.mismatched for item in items])

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        if self._owner.disable_dropout:
            without_dropout(model)
        policy, reference = answer_log_probs(model, batch).sums, self._owner.of_reference(model, batch)
        ratios = policy if reference is None else policy - reference.sums
        return Loss(ratios.sum(), len(ratios))


@dataclass
class UnpairedObjective(Referenced):
    """Answers that are desirable or not (KTO): a loss of log pi - log reference, its label, and z0.

    z0 is the mean over the answers of a step, of all ranks, of that difference for mismatched answers, at least 0 and
    without a gradient. The loop measures `before` first and sets it, so that it does not depend on the size of a pass.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: CausalLM | None = None
    reference_free: bool = False
    disable_dropout: bool = True
    function: Callable[..., Tensor] | None = None
    _z0: float = field(default=math.nan, init=False, repr=False, compare=False)

    @property
    def before(self) -> _Mismatched:
        """Returns the measures over a step that its losses need."""
        return _Mismatched(self)

    def take(self, mean: float) -> None:
        """Sets z0 from the mean that `before` has over a step."""
        self._z0 = max(mean, 0.0)

    def tokens(self, item: Unpaired) -> int:
        """As Objective.tokens."""
        return len(item.example.input_ids) + len(item.mismatched.input_ids)

    def collate(self, items: Sequence[Unpaired]) -> Batch:
        """As Objective.collate: those of `answer_batch`, and desirable (A,)."""
        batch = answer_batch([item.example for item in items])
        return {**batch, "desirable": torch.tensor([item.desirable for item in items])}

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        """As Objective.loss; units are answers."""
        assert self.function is not None
        if math.isnan(self._z0):
            raise InputError("KTO measures z0 over a whole step, which an overridden training_step leaves out")
        if self.disable_dropout:
            without_dropout(model)
        policy, reference = answer_log_probs(model, batch).sums, self.of_reference(model, batch)
        ratios = policy if reference is None else policy - reference.sums
        good = batch["desirable"]
        losses = self.function(ratios, good, self._z0, self.beta, self.desirable_weight, self.undesirable_weight)
        rewards = self.beta * ratios.detach()
        count, share = len(losses), max(float(good.float().mean()), 1e-9)
        logs = {
            "rewards/chosen": float(rewards[good].sum()),
            "rewards/rejected": float(rewards[~good].sum()),
            "desirable": share * count,
            "kl": self._z0 * count,
        }
        return Loss(losses.sum(), count, logs)
