"""Weights and optimizer state of a checkpoint: safetensors files, or parts written by every rank
(`shards`).

Either is read by any number of ranks, sharded or not. Names are those of the parameters; the optimiser's have the
moment before them: exp_avg.model.norm.weight.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama2.checkpoint.hf import map_safetensors
from llama2.checkpoint.save import write_safetensors
from llama2.errors import InputError
from llama2.files import replacing
from llama2.train import old_shards, shards
from llama2.train.distributed import Ranks, as_sharded, first_row, part_of
from llama2.train.optim import AdamW

WEIGHTS, OPTIMIZER, SHARDS = "trainable.safetensors", "optimizer.safetensors", "shards"
_WEIGHT, _STATE = "weights.", "optimizer."
States = dict[str, Tensor]


def write(folder: Path, optimizer: AdamW, ranks: Ranks, state: bool = True) -> None:
    """Writes the trained weights and, unless `state` is False, the optimiser's state.

    All ranks call it; whole weights are written by rank 0."""
    parameters, held = optimizer.parameters, optimizer.state() if state else {}
    if any(isinstance(p, DTensor) for p in parameters.values()):
        content = {_WEIGHT + name: p.detach() for name, p in parameters.items()}
        for key, value in held.items():
            content[_STATE + key] = as_sharded(value, _like(_STATE + key, optimizer, value))
        shards.write(folder / SHARDS, content, ranks)
    elif ranks.first:
        with replacing(folder / WEIGHTS) as file:
            write_safetensors(file, dict(parameters))
        if state:
            with replacing(folder / OPTIMIZER) as file:
                write_safetensors(file, held)


def resumable(place: Path) -> bool:
    """Whether a checkpoint holds the optimiser's state."""
    if (place / SHARDS).is_dir():
        return any(name.startswith(_STATE) for name in _shapes(place))
    return (place / OPTIMIZER).exists()


def read(place: Path, optimizer: AdamW, state: bool = True) -> tuple[States, States]:
    """This rank's parts of the weights and, unless `state` is False, of the optimiser's state.

    Raises InputError where they are of another model or adapter.
    """
    shapes = _shapes(place)
    there = {name.removeprefix(_WEIGHT): shape for name, shape in shapes.items() if name.startswith(_WEIGHT)}
    wanted = {name: tuple(parameter.shape) for name, parameter in optimizer.parameters.items()}
    if differ := sorted(name for name in {*there, *wanted} if there.get(name) != wanted.get(name)):
        raise InputError(
            f"{place} is of another run: {differ[0]} is {there.get(differ[0], 'not trained')} there and "
            f"{wanted.get(differ[0], 'not trained')} here; give the same model and adapter, or another output_dir"
        )
    names = [name for name in shapes if state or name.startswith(_WEIGHT)]
    found = _from_shards(place, names, optimizer) if (place / SHARDS).is_dir() else _whole(place, names, optimizer)
    weights = {name.removeprefix(_WEIGHT): t for name, t in found.items() if name.startswith(_WEIGHT)}
    states = {name.removeprefix(_STATE): t for name, t in found.items() if name.startswith(_STATE)}
    if state:
        _match_copies(weights, states, optimizer)
    return weights, states


def _match_copies(weights: States, states: States, optimizer: AdamW) -> None:
    """A run has float32 copies of 16-bit weights, a sharded one in bfloat16 float32 weights: each reads the other's."""
    for name in weights:
        if name in optimizer.copied:
            states.setdefault(f"master.{name}", weights[name])
        elif (master := states.pop(f"master.{name}", None)) is not None:
            weights[name] = master


# -- the formats -------------------------------------------------------------------------------------------------


def _sharded(place: Path) -> dict[str, shards.TensorParts]:
    """Reads a checkpoint whose ranks wrote their own parts."""
    folder = place / SHARDS
    return old_shards.read(folder) if (folder / old_shards.METADATA).exists() else shards.read(folder)


def _shapes(place: Path) -> dict[str, tuple[int, ...]]:
    """Of everything that a checkpoint holds, by its name with the prefix."""
    if (place / SHARDS).is_dir():
        return {name: stored.shape for name, stored in _sharded(place).items()}
    return {name: tuple(tensor.shape) for name, tensor in _files(place).items()}


def _files(place: Path) -> States:
    """Returns the tensors of the safetensors files, views of the mapped files."""
    files = {_WEIGHT: place / WEIGHTS, _STATE: place / OPTIMIZER}
    parts = {prefix: map_safetensors(path) for prefix, path in files.items() if path.exists()}
    return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


def _whole(place: Path, names: list[str], optimizer: AdamW) -> States:
    """From safetensors files."""
    files = _files(place)
    return {full: part_of(files[full], _like(full, optimizer, files[full])) for full in names}


def _from_shards(place: Path, names: list[str], optimizer: AdamW) -> States:
    """From the parts of any number of ranks, this rank's rows."""
    stored, found = _sharded(place), States()
    for full in names:
        like = _like(full, optimizer, torch.empty(0))
        if isinstance(like, DTensor):
            mesh, rows = like.device_mesh, like.shape[0]
            start, stop = (first_row(rows, mesh.get_local_rank() + i, mesh.size()) for i in (0, 1))
            found[full] = stored[full].rows(start, stop).to(like.device)
        else:
            found[full] = stored[full].whole()
    return found


def _like(full: str, optimizer: AdamW, otherwise: Tensor) -> Tensor:
    """Returns the parameter whose sharding a value has; a step count has none."""
    name = full.removeprefix(_WEIGHT) if full.startswith(_WEIGHT) else full.removeprefix(_STATE).partition(".")[2]
    step = full.startswith(f"{_STATE}step.")
    return otherwise if step else optimizer.parameters.get(name, otherwise)
