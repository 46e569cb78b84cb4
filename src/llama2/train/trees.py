"""Nested state of an optimiser or scheduler that is not this library's, as JSON beside safetensors: NAME.json holds the
containers and numbers, NAME.safetensors the tensors, which JSON calls by number.

A node of the JSON is null, a truth value, a number or a text, or one of
    {"list": [...]}, {"tuple": [...]}, {"dict": [[KEY, VALUE], ...]}, {"counter": [[KEY, COUNT], ...]}, {"tensor": "0"}
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llama2.checkpoint.hf import map_safetensors
from llama2.checkpoint.save import write_safetensors
from llama2.errors import CheckpointError, InputError
from llama2.files import replacing, write_text
from llama2.plain import plain
from llama2.text_file import LISTING_BYTES, read_object, shown

_MAX_DEPTH = 16  # of containers; each is two levels of JSON


def write(folder: Path, name: str, tree: object) -> None:
    """Writes NAME.json and NAME.safetensors. Raises InputError for what a tree cannot hold: an object of a class."""
    tensors: dict[str, Tensor] = {}
    content = _node(tree, tensors, name)
    with replacing(folder / f"{name}.safetensors") as file:
        write_safetensors(file, tensors)
    write_text(folder / f"{name}.json", json.dumps({"tree": content}) + "\n")


def _node(value: object, tensors: dict[str, Tensor], place: str, depth: int = 0) -> object:
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value.detach()
        return {"tensor": str(len(tensors) - 1)}
    value = plain(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth == _MAX_DEPTH:
        raise InputError(f"{place} of the optimiser's state is nested more than {_MAX_DEPTH} deep; it cannot be saved")
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_node(one, tensors, f"{place}[{i}]", depth + 1) for i, one in enumerate(value)]}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str | int | float | None):
                raise InputError(
                    f"{place} of the optimiser's state has the key {key!r}; texts and numbers can be saved"
                )
        pairs = [[key, _node(one, tensors, f"{place}.{key}", depth + 1)] for key, one in value.items()]
        return {"counter" if isinstance(value, Counter) else "dict": pairs}
    raise InputError(
        f"{place} of the optimiser's state is a {type(value).__name__}, which is not saved: state is made of tensors, "
        "numbers, texts and containers of them. Leave it out of state_dict(), or set save_only_model"
    )


def read(folder: Path, name: str) -> Any:
    """Reads what `write` wrote; tensors are views of the mapped file. Raises CheckpointError for anything else."""
    where = folder / f"{name}.json"
    content = read_object(where, where.name, most=LISTING_BYTES)
    return _value(content.get("tree"), map_safetensors(folder / f"{name}.safetensors"), where)


def _value(node: object, tensors: Mapping[str, Tensor], where: Path) -> object:
    if not isinstance(node, dict):
        if isinstance(node, list):
            raise CheckpointError(f"{where} has a bare list, {shown(node)}; it is damaged")
        return node
    kind, held = next(iter(node.items()), ("", None))
    if len(node) == 1 and kind == "tensor" and isinstance(held, str) and held in tensors:
        return tensors[held]
    if len(node) != 1 or kind not in _CONTAINERS or not isinstance(held, list):
        raise CheckpointError(f"{where} has {shown(node)}, which is no part of a state; it is damaged")
    if kind in ("list", "tuple"):
        return _CONTAINERS[kind](_value(one, tensors, where) for one in held)
    if not all(isinstance(pair, list) and len(pair) == 2 and not isinstance(pair[0], list | dict) for pair in held):
        raise CheckpointError(f"{where} has {shown(node)}, which is no {kind}; it is damaged")
    return _CONTAINERS[kind]({key: _value(one, tensors, where) for key, one in held})


_CONTAINERS: dict[str, Callable[[Any], Any]] = {"list": list, "tuple": tuple, "dict": dict, "counter": Counter}
