"""One iteration's answers with all that is learnt from them, as a checkpoint keeps them until the last step on them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama2 import schema
from llama2.align.policy import Item
from llama2.checkpoint.hf import map_safetensors
from llama2.checkpoint.save import write_safetensors
from llama2.errors import CheckpointError
from llama2.files import replacing, write_text
from llama2.text_file import LISTING_BYTES, read_object

STATE, TENSORS = "align.json", "rollouts.safetensors"
_FIELDS = ("advantages", "old", "reference", "sampled", "values", "returns")
_SCHEMA: schema.Schema = {
    "kl_coef": schema.real(0, 1e30),
    "index": schema.whole(-1, 2**62),
    "logs": schema.table(schema.NUMBER, 1000),
}


@dataclass
class Iteration:
    """index: which iteration it is. items: its answers. logs: what is told of it beside its steps."""

    index: int
    items: list[Item]
    logs: dict[str, float] = field(default_factory=dict)


def write(folder: Path, kl_coef: float, iteration: Iteration | None) -> None:
    """Writes the state of the loop, and where steps on an iteration are left its answers."""
    index = -1 if iteration is None else iteration.index
    logs = {} if iteration is None else iteration.logs
    write_text(folder / STATE, json.dumps({"kl_coef": kl_coef, "index": index, "logs": logs}) + "\n")
    if iteration is not None:
        with replacing(folder / TENSORS) as file:
            write_safetensors(file, _tensors(iteration.items))


def read(folder: Path) -> tuple[float, Iteration | None]:
    """Reads what `write` wrote. Raises CheckpointError where it is damaged."""
    content: Mapping[str, Any] = read_object(folder / STATE, STATE, most=LISTING_BYTES)
    schema.check(dict(content), _SCHEMA, folder / STATE)
    if content["index"] < 0:
        return float(content["kl_coef"]), None
    held = {name: tensor.clone() for name, tensor in map_safetensors(folder / TENSORS).items()}
    try:
        items = _items(held)
    except (LookupError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{folder / TENSORS} does not hold the answers of an iteration: {error}") from error
    return float(content["kl_coef"]), Iteration(int(content["index"]), items, dict(content["logs"]))


def _tensors(items: list[Item]) -> dict[str, Tensor]:
    found = {
        "prompt_lengths": torch.tensor([len(item.prompt_ids) for item in items]),
        "lengths": torch.tensor([len(item.ids) for item in items]),
        "prompt_ids": torch.tensor([token for item in items for token in item.prompt_ids]),
        "ids": torch.tensor([token for item in items for token in item.ids]),
        "counts": torch.tensor([item.counts for item in items], dtype=torch.float64),
    }
    for name in _FIELDS:
        held = [getattr(item, name) for item in items]
        if all(value is not None for value in held):
            found[name] = torch.cat(held)
    return found


def _items(held: Mapping[str, Tensor]) -> list[Item]:
    lengths = held["lengths"].tolist()
    prompts = [part.tolist() for part in held["prompt_ids"].split(held["prompt_lengths"].tolist())]
    answers = [part.tolist() for part in held["ids"].split(lengths)]
    parts = {name: held[name].split(lengths) for name in _FIELDS if name in held}
    return [
        Item(prompt, answer, counts=count, **{name: part[i] for name, part in parts.items()})
        for i, (prompt, answer, count) in enumerate(zip(prompts, answers, held["counts"].tolist(), strict=True))
    ]
