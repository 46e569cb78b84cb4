"""Reference values of preference pairs, computed once and kept in a file."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llama2.errors import InputError
from llama2.files import write_text
from llama2.pretrained import PreTrainedModel
from llama2.train.answers import Preferences, ReferencedPair
from llama2.train.data import EncodedPair
from llama2.train.distributed import Ranks
from llama2.train.saving import digest

FILE = "reference.json"
_PIECE = 1 << 16  # bytes of each tensor that its fingerprint is made of


def with_reference(
    objective: Preferences,
    model: PreTrainedModel,
    sets: Sequence[Sequence[EncodedPair]],
    ranks: Ranks,
    folder: Path,
    size: int,
    tell: Callable[[str], None] | None = None,
) -> list[list[ReferencedPair]]:
    """The pairs of each set with what `model` as it is now, without a fresh adapter, gives their answers.

    The values are read from FILE in `folder` where that was made of the same weights, rows and loss, and are written
    there else. Ranks share the pairs. size: pairs of a pass.
    """
    mark = _fingerprint(objective, model, sets)
    kept = ranks.broadcast(lambda: _read(folder / FILE, mark, [len(items) for items in sets]))
    if kept is None:
        if tell is not None and ranks.first:
            tell(f"computing the reference of {sum(map(len, sets)):,} pairs")
        measure = Preferences(objective.beta, objective.kind, objective.label_smoothing)
        measure.begin(model)
        kept = [_values(measure, model, items, ranks, size) for items in sets]
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / FILE, json.dumps({"fingerprint": mark, "values": kept}) + "\n")
    return [_paired(items, values) for items, values in zip(sets, kept, strict=True)]


def _paired(items: Sequence[EncodedPair], values: Sequence[Sequence[float]]) -> list[ReferencedPair]:
    return [
        ReferencedPair(item.chosen, item.rejected, (up, down)) for item, (up, down) in zip(items, values, strict=True)
    ]


@torch.no_grad()
def _values(
    objective: Preferences, model: PreTrainedModel, items: Sequence[EncodedPair], ranks: Ranks, size: int
) -> list[list[float]]:
    """Values of chosen and rejected of each pair; every rank computes those of its share."""
    found = [0.0] * (2 * len(items))
    was = model.training
    model.eval()
    mine = list(range(ranks.rank, len(items), ranks.world))
    for first in range(0, len(mine), size):
        part = mine[first : first + size]
        batch = objective.collate([items[i] for i in part])
        batch = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
        values = objective.reference_values(model, batch)
        assert values is not None
        for place, value in enumerate(values.tolist()):
            found[2 * part[place % len(part)] + place // len(part)] = value
    model.train(was)
    found = ranks.sums(found)
    if any(value != value or value in (float("inf"), float("-inf")) for value in found):
        raise InputError("the reference gives an answer a log-probability that is not finite; load it in float32")
    return [found[i : i + 2] for i in range(0, len(found), 2)]


def _fingerprint(objective: Preferences, model: PreTrainedModel, sets: Sequence[Sequence[EncodedPair]]) -> str:
    """Of the weights (a piece of each tensor), the rows as tokens (so of tokenizer, template and lengths), and the
    loss, which decides whether values are sums or means."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        if "lora_" not in name and isinstance(tensor, torch.Tensor):
            flat = tensor.detach().reshape(-1)[: _PIECE // tensor.element_size()].contiguous().cpu()
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(flat.view(torch.uint8).numpy().tobytes())
    found.update(f"{objective.kind == 'ipo'} {[digest(items) for items in sets]}".encode())
    return found.hexdigest()


def _read(file: Path, mark: str, lengths: Sequence[int]) -> list[list[list[float]]] | None:
    """The values of a file of the same fingerprint; None where there is none, or where it is of something else."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        values = content["values"]
        known = content["fingerprint"] == mark and [len(of) for of in values] == list(lengths)
    except (ValueError, KeyError, TypeError):
        return None
    return values if known else None
