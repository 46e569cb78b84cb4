"""One model over several processes, on one machine or many: each holds a part of every layer (Shoeybi et al. 2019).

Attention heads and the MLP's channels are shared out, so a layer needs two sums over the processes; where there are
fewer key-value heads than processes, several hold the same one. The head of the vocabulary is shared out by tokens,
the embedding is with everyone. The process of rank 0 plans and picks tokens; the others run the plans it tells, each
with its part of the cache, and end when it says so or is gone.

    torchrun --nproc-per-node 2 -m llama2 serve MODEL        (or: llama2 serve MODEL --tensor-parallel 2)
"""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llama2.checkpoint import Checkpoint, Stored
from llama2.checkpoint.arguments import DTYPES, resolve_dtype
from llama2.checkpoint.covered import covered
from llama2.checkpoint.load import fill, match
from llama2.checkpoint.packed_names import settings_of
from llama2.checkpoint.source import open_source
from llama2.config import LlamaConfig
from llama2.cpu import CacheView
from llama2.engine.plan_runners import PlanRunner
from llama2.errors import InputError
from llama2.generation.config import GenerationConfig
from llama2.model import LlamaForCausalLM
from llama2.runners.contract import Ints
from llama2.runners.torch_pages import TorchPageRunner, new_pages

_PATIENCE = timedelta(minutes=30)  # until all processes are there, and within a step
_FOREVER = timedelta(days=3650)  # an idle server tells no plan for hours; who is gone is noticed by its connection
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_COLUMNS = ("o_proj", "down_proj")  # their inputs are shared out, and their outputs summed


@dataclass(frozen=True)
class Place:
    """Which process of how many, and how they talk: `control` carries plans, `data` sums."""

    rank: int
    size: int
    control: "dist.ProcessGroup | None" = None
    data: "dist.ProcessGroup | None" = None


def join(device: torch.device, store: str | None = None, rank: int = -1, size: int = -1) -> Place:
    """Meets the other processes, through the file `store` or as torchrun says; returns when all are there."""
    backend = "gloo" if device.type == "cpu" else "nccl"
    meeting: dict[str, Any] = {} if store is None else {"init_method": store, "rank": rank, "world_size": size}
    dist.init_process_group(backend, timeout=_PATIENCE, **meeting)
    control = dist.new_group(backend="gloo", timeout=_FOREVER)
    return Place(dist.get_rank(), dist.get_world_size(), control, dist.group.WORLD)


# -- parts -------------------------------------------------------------------------------------------------------


def part_of(config: LlamaConfig, size: int) -> LlamaConfig:
    """The configuration of one process's part. Raises InputError where heads or channels cannot be shared out."""
    heads, kv, channels = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    fits = [n for n in range(1, heads + 1) if heads % n == channels % n == 0 and (kv % n == 0 or n % kv == 0)]
    if size not in fits:
        raise InputError(
            f"{heads} heads, {kv} key-value heads and {channels} channels cannot be shared out to {size} processes; "
            f"take one of {fits}"
        )
    own_config = copy.deepcopy(config)
    own_config.keep_head_dim()
    own_config.num_attention_heads, own_config.num_key_value_heads = heads // size, max(kv // size, 1)
    own_config.intermediate_size, own_config.tie_word_embeddings, own_config.pretraining_tp = channels // size, False, 1
    return own_config


class Shares:
    """A checkpoint's tensors cut to one process's part; each is read, cut and let go."""

    def __init__(self, source: Checkpoint, config: LlamaConfig, place: Place) -> None:
        self._source, self._config, self._place = source, config, place
        self._names = {name: name for name in source.tensors}
        if _HEAD not in self._names and config.tie_word_embeddings:
            self._names[_HEAD] = self._names[_EMBEDDING]
        whole = source.tensors
        self.tensors: Mapping[str, Stored] = {
            name: Stored(self._shape(name, whole[stored].shape), whole[stored].type)
            for name, stored in self._names.items()
        }

    @property
    def auto_dtype(self) -> str:
        """As the checkpoint's."""
        return str(self._source.auto_dtype)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """This process's part of a tensor."""
        tensor: Tensor = self._source.read(self._names[name], dtype)
        axis, begin, end = self._cut(name, tuple(tensor.shape))
        if axis is None:
            # A bias behind a sum belongs to one of those who are summed.
            summed = name.endswith(".bias") and name.split(".")[-2] in _COLUMNS
            return torch.zeros_like(tensor) if summed and self._place.rank else tensor
        return tensor.narrow(axis, begin, end - begin).clone()

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        axis, begin, end = self._cut(name, shape)
        return shape if axis is None else (*shape[:axis], end - begin, *shape[axis + 1 :])

    def _cut(self, name: str, shape: tuple[int, ...]) -> tuple[int | None, int, int]:
        """Along which axis this process has what of a tensor; None for all of it."""
        rank, size = self._place.rank, self._place.size
        layer = name.split(".")[-2]
        if name == _HEAD:
            return 0, *_rows(shape[0], self._place)
        if layer in ("k_proj", "v_proj"):
            rows_held = max(self._config.num_key_value_heads // size, 1) * self._config.head_dim
            first = rank * self._config.num_key_value_heads // size * self._config.head_dim
            return 0, first, first + rows_held
        if layer in ("q_proj", "gate_proj", "up_proj"):
            return 0, shape[0] // size * rank, shape[0] // size * (rank + 1)
        if layer in _COLUMNS and name.endswith(".weight"):
            return 1, shape[1] // size * rank, shape[1] // size * (rank + 1)
        return None, 0, 0


def _rows(vocabulary: int, place: Place) -> tuple[int, int]:
    """The tokens whose logits a process computes; the last may have fewer."""
    most = -(-vocabulary // place.size)
    return min(most * place.rank, vocabulary), min(most * (place.rank + 1), vocabulary)


class Summed(nn.Linear):
    """A linear whose input is shared out: its output is the sum over the processes."""

    group: "dist.ProcessGroup | None" = None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x).contiguous()
        dist.all_reduce(out, group=self.group)
        return out


class HeadPart(nn.Linear):
    """The head's rows of one process. Rank 0 gets the logits of all (..., V); the others zeros in their shape."""

    place: Place
    vocabulary: int

    def forward(self, x: Tensor) -> Tensor:
        place, most = self.place, -(-self.vocabulary // self.place.size)
        mine = F.pad(super().forward(x), (0, most - self.out_features)).contiguous()
        parts = [torch.empty_like(mine) for _ in range(place.size)] if place.rank == 0 else None
        dist.gather(mine, parts, dst=0, group=place.data)
        if parts is None:
            return mine.new_zeros(1).expand(*mine.shape[:-1], self.vocabulary)
        return torch.cat(parts, -1)[..., : self.vocabulary]


class PartOfLlama(LlamaForCausalLM):
    """One process's part of a model; a forward pass is one of all processes together.

    neighbours: processes that share this one's memory, itself among them.
    """

    place: Place
    neighbours: int = 1

    def plan_runner(self, pages: int) -> "ParallelPlanRunner":
        """Returns the runner of plans on all parts, for the engine in the process of rank 0."""
        return ParallelPlanRunner(self, pages)


def load_part(
    path: str | Path, place: Place, dtype: object = None, device: torch.device | None = None, neighbours: int = 1
) -> PartOfLlama:
    """This process's part of a checkpoint folder, file or hub id; nobody ever holds the whole.

    Raises InputError for packed checkpoints and for models that cannot be shared out so, else as `from_pretrained`.
    """
    source = open_source(path, {})
    config = source.config
    if settings_of(config, Path(path)) is not None:
        raise InputError(f"{path} is packed, and packed linears are not shared out; dequantise it, or serve it whole")
    source = covered(source)
    with torch.device("meta"):
        model = PartOfLlama(part_of(config, place.size))
        model.place, model.neighbours = place, neighbours
        begin, end = _rows(config.vocab_size, place)
        model.lm_head = HeadPart(config.hidden_size, end - begin, bias=False)
        model.lm_head.place, model.lm_head.vocabulary = place, config.vocab_size
        for layer in model.model.layers:
            for module, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
                old = getattr(module, name)
                new = Summed(old.in_features, old.out_features, bias=old.bias is not None)
                new.group = place.data
                setattr(module, name, new)
    shares = Shares(source, config, place)
    chosen = resolve_dtype(dtype) or DTYPES[shares.auto_dtype]
    fill(model, shares, match(model, shares), chosen, device or torch.device("cpu"))
    settings = source.generation_settings
    sampling = GenerationConfig.from_model_config(config) if settings is None else GenerationConfig.from_dict(settings)
    model.generation_config, model.config.name_or_path = sampling, str(path)
    return model.eval()


# -- steps -------------------------------------------------------------------------------------------------------


class ToldRunner:
    """Tells every step to the other processes and runs it with them: `contract.Runner` in the process of rank 0.

    failed: the error of a step, after which none runs any more.
    """

    def __init__(self, model: PartOfLlama) -> None:
        self._local, self._place = TorchPageRunner(model), model.place
        self.failed: Exception | None = None

    def step(
        self,
        tokens: Ints,
        positions: Ints,
        view: CacheView[Tensor],
        rows: Ints | None = None,
        adapters: Sequence[str | None] | None = None,
    ) -> np.ndarray:
        """As Runner.step. Raises InputError for adapters, RuntimeError once the processes have lost each other."""
        if self.failed is not None:
            raise RuntimeError(f"the processes of this model have lost each other: {self.failed}") from self.failed
        if any(name is not None for name in adapters or ()):
            raise InputError(f"a model over several processes has no adapters, but {adapters!r} are asked for")
        logit_rows = view.last if rows is None else rows
        try:
            _tell(as_integers(view.cache.shape[2], tokens, positions, view, logit_rows), self._place)
            return self._local.step(tokens, positions, view, logit_rows)
        except Exception as error:
            self.failed = error
            raise

    def end(self) -> None:
        """Lets the other processes end."""
        if self.failed is None:
            self.failed = RuntimeError("the runner is closed")
            with contextlib.suppress(RuntimeError):  # where they are gone there is nothing to end
                _tell([], self._place)
                _leave(self._place)


class ParallelPlanRunner(PlanRunner[Tensor]):
    """Runs plans on all parts of a model."""

    def __init__(self, model: PartOfLlama, pages: int) -> None:
        self._told, cache = ToldRunner(model), new_pages(model, pages)
        super().__init__(self._told, cache, pages, cache.nbytes)

    @property
    def failed(self) -> Exception | None:
        """As PlanRunner.failed."""
        return self._told.failed

    def close(self) -> None:
        """As PlanRunner.close."""
        self._told.end()


def as_integers(pages: int, tokens: Ints, positions: Ints, view: CacheView[Tensor], rows: Ints) -> list[int]:
    """A step over `pages` pages as integers: four counts, and what `from_integers` gives back."""
    arrays = (tokens, positions, rows, view.starts, view.past, view.tables.ravel())
    return [pages, len(tokens), len(rows), len(view.past), *np.concatenate(arrays).tolist()]


def from_integers(numbers: Sequence[int], cache: Tensor) -> tuple[Ints, Ints, CacheView[Tensor], Ints]:
    """The step of those integers, over this process's pages: tokens, positions, view, rows."""
    _, new, logit_count, sequences = numbers[:4]
    bounds = np.cumsum([new, new, logit_count, sequences + 1, sequences])
    tokens, positions, rows, starts, past, tables = np.split(np.array(numbers[4:], np.int32), bounds)
    view = CacheView(cache, starts, past, tables.reshape(sequences, -1), starts[1:] - 1)
    return tokens, positions, view, rows


def follow(model: PartOfLlama) -> None:
    """Runs steps as rank 0 tells them, until it has no more. Raises RuntimeError where it is gone."""
    runner, cache = TorchPageRunner(model), None
    while numbers := _hear(model.place):
        cache = new_pages(model, numbers[0]) if cache is None else cache
        runner.step(*from_integers(numbers, cache))
    _leave(model.place)


def _leave(place: Place) -> None:
    """Ends together: a process that goes first would look like one that has died."""
    dist.barrier(group=place.control)
    dist.destroy_process_group()


def _tell(numbers: Sequence[int], place: Place) -> None:
    dist.broadcast(torch.tensor([len(numbers)]), 0, group=place.control)
    if numbers:
        dist.broadcast(torch.tensor(numbers), 0, group=place.control)


def _hear(place: Place) -> list[int]:
    length = torch.zeros(1, dtype=torch.long)
    dist.broadcast(length, 0, group=place.control)
    numbers = torch.zeros(int(length), dtype=torch.long)
    if len(numbers):
        dist.broadcast(numbers, 0, group=place.control)
    received: list[int] = numbers.tolist()
    return received
