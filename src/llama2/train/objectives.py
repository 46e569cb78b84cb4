"""What is trained for: from checked rows to a batch, and from a batch to a loss. The loop knows nothing else.

B rows, T tokens, D width.
"""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2 import lora
from llama2.documents import within
from llama2.errors import InputError
from llama2.pretrained import PreTrainedModel
from llama2.quantization.linear import PackedLinear
from llama2.train.data import IGNORED, EncodedPair, Example
from llama2.train.fused_layer import fuses
from llama2.train.losses import dpo_loss, head_loss, targets, token_log_probs
from llama2.train.packing import PackedRow, bins, pack
from llama2.train.preference import Preference
from llama2.train.reference import Start, is_fresh, without_dropout

Batch = dict[str, Any]
_TOLD = 64 << 20  # bytes of a reference
ONE_ROW = 2048  # tokens at most: the mask of a row is their square


@dataclass
class Loss:
    """The loss of one batch as a sum over `units` (targets, pairs, rows), and sums of what is logged besides."""

    total: Tensor
    units: int
    logs: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """One kind of training."""

    def tokens(self, item: Any) -> int:
        """Tokens of an item, for tokens per second."""

    def collate(self, items: Sequence[Any]) -> Batch:
        """Tensors of some items."""

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        """The loss of a batch, differentiable in the model's trainable parameters."""


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Rows as one tensor (B, longest), filled on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def places(rows: Sequence[Sequence[int]]) -> Tensor:
    """Positions of rows as one tensor (B, longest); they go on through the padding, which is no document of its own."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *range(row[-1] + 1, row[-1] + 1 + longest - len(row))] for row in rows])


def head_of(model: PreTrainedModel, dtype: torch.dtype) -> Tensor:
    """The head's weight (V, D), a packed one unpacked to `dtype`. Raises InputError where it is adapted: its product is
    not a plain one."""
    head = model.get_output_embeddings()
    if isinstance(head, PackedLinear):
        return head.weight_in(dtype)
    if not isinstance(head, torch.nn.Linear):
        raise InputError(f"the head is a {type(head).__name__}; train with a plain head (leave lm_head out)")
    return head.weight


def isolated(starts: Sequence[Sequence[int]], lengths: Sequence[int], longest: int) -> Tensor | None:
    """The mask (B, 1, T, T), True = sees, of rows that hold several documents; None where none does."""
    if all(len(row) == 1 for row in starts):
        return None
    document = torch.zeros((len(starts), longest), dtype=torch.long)
    for row, (begins, length) in enumerate(zip(starts, lengths, strict=True)):
        document[row, list(begins[1:])] = 1
        document[row] = document[row].cumsum(0)
        document[row, length:] = -1  # padding sees itself, so that no row of the softmax is empty
    return within(document)


def hidden_of(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The decoder's hidden states (B, T, D) of a batch and the labels that belong to them.

    On a CPU whose kernels run the layers the rows become one, which has no padding to compute.
    """
    ids, labels, positions, mask = (batch[name] for name in ("input_ids", "labels", "position_ids", "attention_mask"))
    if int(batch["lengths"].sum()) <= ONE_ROW and ids.device.type == "cpu" and fuses(model):
        ids, labels, positions, mask = one_row(ids, labels, positions, batch["lengths"])
    return model.model(ids, mask, positions, use_cache=False, return_dict=True).last_hidden_state, labels


def whole_rows(ids: Sequence[Sequence[int]]) -> Batch:
    """A batch of rows (B, T) that are judged as wholes: no token is a target, and lengths (B,) say where they end."""
    return {
        "input_ids": padded(ids, 0),
        "labels": padded([[IGNORED] * len(row) for row in ids], IGNORED),
        "position_ids": places([range(len(row)) for row in ids]),
        "lengths": torch.tensor([len(row) for row in ids]),
        "attention_mask": None,
    }


def last_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The decoder's hidden states (B, D) at the last tokens of the rows."""
    hidden, lengths = hidden_of(model, batch)[0], batch["lengths"]
    if len(hidden) == 1:  # the rows have become one, or there is one
        begins = lengths.cumsum(0) - lengths
    else:
        begins = torch.arange(len(lengths), device=lengths.device) * hidden.shape[1]
    return hidden.reshape(-1, hidden.shape[-1])[begins + lengths - 1]


def one_row(
    ids_BT: Tensor, labels_BT: Tensor, positions_BT: Tensor, lengths_B: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The documents of all rows one behind the other: ids, labels, positions (1, N) and their mask (1, 1, N, N).

    A document begins where a position is 0, and its first token is no target. N is made a multiple of 64 by one more
    document without targets: torch keeps about half a megabyte for every shape of a product that it has seen.
    """
    real = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
    fill = -int(lengths_B.sum()) % 64
    positions = torch.cat((positions_BT[real], torch.arange(fill)))
    labels = F.pad(labels_BT[real], (0, fill), value=IGNORED).masked_fill(positions == 0, IGNORED)
    ids, mask = F.pad(ids_BT[real], (0, fill)), within((positions == 0).cumsum(0)[None])
    return ids[None], labels[None], positions[None], mask


class NextToken:
    """Continuing text: pretraining and instruction tuning (the labels say which tokens are targets)."""

    def tokens(self, item: PackedRow) -> int:
        """As Objective.tokens."""
        return len(item.input_ids)

    def collate(self, items: Sequence[PackedRow]) -> Batch:
        """As Objective.collate: input_ids, labels, position_ids (B, T), lengths (B,), and the mask of `isolated`."""
        lengths = [len(item.input_ids) for item in items]
        return {
            "input_ids": padded([item.input_ids for item in items], 0),
            "labels": padded([item.labels for item in items], IGNORED),
            "position_ids": places([item.position_ids for item in items]),
            "lengths": torch.tensor(lengths),
            "attention_mask": isolated([item.starts for item in items], lengths, max(lengths)),
        }

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        """As Objective.loss; units are targets."""
        rows, wanted = targets(*hidden_of(model, batch))
        return Loss(head_loss(rows, head_of(model, rows.dtype), wanted), len(wanted))


def packed_rows(examples: Sequence[Example], length: int | None, packing: bool = True) -> list[PackedRow]:
    """Examples as rows of at most `length` tokens: several a row with packing, else one."""
    if not packing or length is None:
        return [pack([example]) for example in examples]
    return [pack([examples[i] for i in rows]) for rows in bins([len(e.input_ids) for e in examples], length)]


@dataclass
class Preferences:
    """Direct preference optimisation. The reference is the model as it was before the first step, or another model.

    A Trainer says where that is (`begin`). For a loss that is called without one it is the model without its adapters,
    or what it was at the first call. reference: another model. reference_free leaves the reference out.
    disable_dropout: of adapters, in policy and reference.
    See `losses.dpo_loss` for the rest.
    """

    beta: float = 0.1
    kind: Preference = "sigmoid"
    label_smoothing: float = 0.0
    reference: Any = None
    reference_free: bool = False
    disable_dropout: bool = True
    _start: Start | None = field(default=None, init=False, repr=False, compare=False)

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

    def tokens(self, item: EncodedPair) -> int:
        """As Objective.tokens."""
        return len(item.chosen.input_ids) + len(item.rejected.input_ids)

    def collate(self, items: Sequence[EncodedPair]) -> Batch:
        """As Objective.collate: input_ids, labels, position_ids (2 B, T), lengths (2 B,), the chosen answers first."""
        examples = [item.chosen for item in items] + [item.rejected for item in items]
        return {
            "input_ids": padded([e.input_ids for e in examples], 0),
            "labels": padded([e.labels for e in examples], IGNORED),
            "position_ids": places([range(len(e.input_ids)) for e in examples]),
            "lengths": torch.tensor([len(e.input_ids) for e in examples]),
            "attention_mask": None,
        }

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        """As Objective.loss; units are pairs."""
        if self.disable_dropout:
            without_dropout(model)
        reference = self._of_reference(model, batch)
        policy = self._answers(model, batch)
        pairs = len(policy) // 2
        if reference is None:
            reference = torch.zeros_like(policy)
        result = dpo_loss(
            *policy.split(pairs), *reference.split(pairs),
            beta=self.beta, kind=self.kind, label_smoothing=self.label_smoothing,
        )  # fmt: skip
        up, down = result.chosen_rewards, result.rejected_rewards
        logs = {
            "rewards/chosen": float(up.sum()),
            "rewards/rejected": float(down.sum()),
            "rewards/margins": float((up - down).sum()),
            "rewards/accuracies": float((up > down).sum()),
        }
        return Loss(result.loss * pairs, pairs, logs)

    @torch.no_grad()
    def _of_reference(self, model: PreTrainedModel, batch: Batch) -> Tensor | None:
        """log p of each answer (2 B,) under the reference."""
        if self.reference_free:
            return None
        if self.reference is not None:
            return self._answers(self.reference.to(batch["input_ids"].device), batch)
        if self._start is None and not lora.names(model):
            self.begin(model)
        with lora.disabled(model) if self._start is None else self._start.restored():
            return self._answers(model, batch)

    def _answers(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """log p of each answer (2 B,): the sum over its targets, for ipo their mean."""
        labels = batch["labels"]
        rows, wanted = targets(*hidden_of(model, batch))
        counts = (labels[:, 1:] != IGNORED).sum(1)
        found = token_log_probs(rows, head_of(model, rows.dtype), wanted)
        owner = torch.repeat_interleave(torch.arange(len(labels), device=found.device), counts)
        sums = torch.zeros(len(labels), dtype=found.dtype, device=found.device).index_add(0, owner, found)
        return sums / counts.clamp(min=1) if self.kind == "ipo" else sums


def keep_reference(objective: Objective, model: PreTrainedModel, tell: bool = True, apart: bool = False) -> None:
    """The model as it is now, for an objective that compares with it; a large copy is told by a warning.

    apart: see `Preferences.begin`."""
    nbytes = objective.begin(model, apart) if isinstance(objective, Preferences) else 0
    if tell and nbytes > _TOLD:
        warnings.warn(
            f"the reference is a copy of what is trained, as it is now: {nbytes >> 20:,} MiB; a fresh adapter "
            "(peft_config) needs none",
            stacklevel=3,
        )


@dataclass
class Classification:
    """Labels of whole texts with LlamaForSequenceClassification: one, several, or a number.

    Logged are the accuracy of one label, the share of rows all of whose labels are right (those whose probability
    reaches `threshold`), or the mean absolute error of a number.
    """

    threshold: float = 0.5

    def tokens(self, item: tuple[list[int], Any]) -> int:
        """As Objective.tokens."""
        return len(item[0])

    def collate(self, items: Sequence[tuple[list[int], Any]]) -> Batch:
        """As Objective.collate: input_ids, position_ids, labels (B, T), lengths (B,), wanted (B,) or (B, labels).

        Padding stands on the right, where no token sees it."""
        return {**whole_rows([item[0] for item in items]), "wanted": torch.tensor([item[1] for item in items])}

    def loss(self, model: Any, batch: Batch) -> Loss:
        """As Objective.loss; units are rows."""
        labels, rows = batch["wanted"], len(batch["wanted"])
        output, loss = model.classify(last_of(model, batch), labels)
        kind, logits = model.config.problem_type, output.detach().float()
        if kind == "single_label_classification":
            logs = {"accuracy": float((logits.argmax(-1) == labels).sum())}
        elif kind == "multi_label_classification":
            logs = {"accuracy": float(((logits.sigmoid() >= self.threshold) == labels.bool()).all(-1).sum())}
        else:
            logs = {"absolute_error": float((logits.reshape(-1) - labels.reshape(-1)).abs().sum())}
        return Loss(loss * rows, rows, logs)
