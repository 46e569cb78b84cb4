"""Training objectives: from checked rows to a batch, and from a batch to a loss. The loop knows nothing else.

B rows, T tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llama2.documents import within
from llama2.errors import InputError
from llama2.pretrained import PreTrainedModel
from llama2.quantization.linear import PackedLinear
from llama2.train.data import IGNORED, Example
from llama2.train.fused_layer import fuses
from llama2.train.losses import head_loss, targets
from llama2.train.packing import PackedRow, bins, pack

Batch = dict[str, Any]
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

    On a CPU whose kernels run the layers the rows become one, which has no padding to compute, and where rows begin
    alike, as the answers to one prompt do, that beginning is computed once.
    """
    ids, labels, positions, mask = (batch[name] for name in ("input_ids", "labels", "position_ids", "attention_mask"))
    index = None
    if int(batch["lengths"].sum()) <= ONE_ROW and ids.device.type == "cpu" and fuses(model):
        index = shared_index(ids, positions, batch["lengths"])
        if index is None:
            ids, labels, positions, mask = one_row(ids, labels, positions, batch["lengths"])
        else:
            ids, labels, positions, mask = one_row_shared(ids, labels, positions, batch["lengths"], index)
    hidden = model.model(ids, mask, positions, use_cache=False, return_dict=True).last_hidden_state
    return hidden if index is None else hidden[:, index], labels


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


def shared_index(ids_BT: Tensor, positions_BT: Tensor, lengths_B: Tensor) -> Tensor | None:
    """Where rows begin alike: for each token of all rows (N,), one behind the other, its place in a row in which such a
    beginning stands once; None where that would save less than a sixteenth.

    A row takes its beginning from an earlier one that is whole there. It is whole itself where a later row is more like
    it than any whole one before. Rows of several documents are left alone.
    """
    lengths, count = lengths_B.tolist(), len(lengths_B)
    within_row = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
    alike = (ids_BT[:, None] == ids_BT[None]) & within_row[:, None] & within_row[None]
    common = alike.long().cumprod(-1).sum(-1).tolist()  # tokens that two rows have in common from their begin on
    single = (positions_BT[torch.arange(count), lengths_B - 1] == lengths_B - 1).tolist()
    whole, parts, places, saved = list[int](), list[Tensor](), dict[int, int](), 0
    begin = 0
    for row, length in enumerate(lengths):
        from_row, most = max(((w, common[row][w]) for w in whole), key=lambda pair: pair[1], default=(row, 0))
        later = max((common[row][w] for w in range(row + 1, count) if single[w]), default=0)
        taken = min(most, length - 1) if single[row] and most >= later else 0
        if not taken and single[row]:
            whole.append(row)
        places[row] = begin
        parts += [torch.arange(taken) + places[from_row], torch.arange(begin, begin + length - taken)]
        begin, saved = begin + length - taken, saved + taken
    return torch.cat(parts) if 16 * saved > sum(lengths) else None


def one_row_shared(
    ids_BT: Tensor, labels_BT: Tensor, positions_BT: Tensor, lengths_B: Tensor, index_N: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `one_row`, of fewer tokens: ids, positions (1, M) and their mask (1, 1, M, M), with the labels (1, N) of what
    `index_N` makes of them: all rows, one behind the other."""
    real = torch.arange(ids_BT.shape[1]) < lengths_B[:, None]
    ids, positions = ids_BT[real], positions_BT[real]
    labels = labels_BT[real].masked_fill(positions == 0, IGNORED)
    count = int(index_N.max()) + 1
    own = torch.full((count,), len(index_N))
    own.scatter_reduce_(0, index_N, torch.arange(len(index_N)), "amin")  # the first token at a place is the one kept
    seen = within((positions == 0).cumsum(0)[None])[0, 0][own]  # (count, N)
    rows, columns = seen.nonzero(as_tuple=True)
    fill = -count % 64
    mask = torch.zeros((count + fill, count + fill), dtype=torch.bool)
    mask[rows, index_N[columns]] = True
    mask[count:, count:] = torch.ones((fill, fill), dtype=torch.bool).tril()
    ids, kept = F.pad(ids[own], (0, fill)), torch.cat((positions[own], torch.arange(fill)))
    return ids[None], labels[None], kept[None], mask[None, None]


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
