"""Several processes that train one model, as torchrun starts them: who is who, sums over all, sharded weights.

With weights whole on every rank a step ends with one sum of gradients. Sharded (FSDP), every rank holds a part of each
weight; a layer is whole only while it runs.
"""

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llama2.errors import InputError
from llama2.quantization.linear import PackedLinear

T = TypeVar("T")
_MESHES: list[DeviceMesh] = []  # of sharded models, for `shutdown`; equal ones are not the same
COMMAND = "torchrun --nproc-per-node N -m llama2 finetune ..."
_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = timedelta(hours=1)  # others wait while rank 0 hashes and syncs a checkpoint
_BUCKET = 32 << 20  # bytes of gradients that are summed at once


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. launched: by torchrun; restarts: how often it did so again."""

    rank: int = 0
    world: int = 1
    local: int = 0
    restarts: int = 0
    launched: bool = False

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone speaks and writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of what all take together."""
        return list(items[self.rank :: self.world])

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks, in float64."""
        if self.world == 1:
            return list(values)
        device = "cpu" if "gloo" in dist.get_backend_config() else "cuda"
        found = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(found)
        return found.tolist()

    def broadcast(self, ask: Callable[[], T]) -> T:
        """Calls `ask` on rank 0 and returns its result on every rank; an error of rank 0 is raised on every rank."""
        if self.world == 1:
            return ask()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = ask()
            except Exception as error:  # the others must not wait for what never comes
                box[1] = error
        dist.broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        found: T = box[0]
        return found

    def joined(self, ask: Callable[[], Sequence[T]]) -> list[T]:
        """Gathers the results of the ranks' shares, in the order that `share` took them from; an error of one rank is
        raised on every rank."""
        if self.world == 1:
            return list(ask())
        box: tuple[list[T], Exception | None] = ([], None)
        try:
            box = (list(ask()), None)
        except Exception as error:  # the others must not wait for what never comes
            box = ([], error)
        boxes: list[Any] = [None] * self.world
        dist.all_gather_object(boxes, box)
        for _, failed in boxes:
            if failed is not None:
                raise failed
        parts: list[list[T]] = [part for part, _ in boxes]
        return [parts[i % self.world][i // self.world] for i in range(sum(map(len, parts)))]

    def wait(self) -> None:
        """Until all ranks are here."""
        self.sums([0.0])

    @torch.no_grad()
    def match(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gives all ranks rank 0's values, where one has others, as adapters made from another seed do."""
        if self.world == 1:
            return
        held = list(parameters)
        sizes = [float(p.double().square().sum()) for p in held]
        same = self.broadcast(lambda: sizes) == sizes
        if self.sums([not same])[0]:
            for parameter in held:
                dist.broadcast(parameter, 0)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sums whole gradients over all ranks, in float32 or wider, a bucket at a time."""
        if self.world == 1:
            return
        for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
            wide = torch.promote_types(bucket[0].dtype, torch.float32)
            flat = torch.cat([grad.reshape(-1).to(wide) for grad in bucket])
            dist.all_reduce(flat)
            for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(part.view_as(grad))

    def device(self, wanted: str) -> str:
        """The device of this rank where `wanted` is auto, cpu, cuda, ... Raises InputError where there is none."""
        if self.world == 1 or wanted not in ("auto", "cuda"):
            if self.world > 1 and wanted != "cpu":
                raise InputError(f"the device is {wanted!r}, and {self.world} processes would share it; leave it out")
            return wanted
        count = torch.cuda.device_count()
        if wanted == "auto" and count == 0:
            return "cpu"
        if self.local >= count:
            raise InputError(
                f"process {self.local} of this machine has no GPU, there are {count}; start {count or 'none'} "
                "(torchrun --nproc-per-node), or give --device cpu"
            )
        return f"cuda:{self.local}"


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, up to _BUCKET bytes."""
    bucket: list[Tensor] = []
    for grad in grads:
        if bucket and (
            (grad.dtype, grad.device) != (bucket[0].dtype, bucket[0].device) or sum(g.nbytes for g in bucket) > _BUCKET
        ):
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket


def join() -> Ranks:
    """Meets the other processes, if torchrun has started this one. Raises InputError for half an environment."""
    given = {name: os.environ[name] for name in _NEEDED if os.environ.get(name)}
    if not dist.is_available() or not (dist.is_initialized() or "RANK" in given or given.get("WORLD_SIZE", "1") != "1"):
        return Ranks()
    if not dist.is_initialized():
        if lost := [name for name in _NEEDED if name not in given]:
            raise InputError(
                f"{', '.join(f'{name}={value}' for name, value in given.items())} say that there are several "
                f"processes, but {', '.join(lost)} is not set; start them with `{COMMAND}`, or unset the others"
            )
        cuda = torch.cuda.is_available()
        if cuda and _local() < torch.cuda.device_count():
            torch.cuda.set_device(_local())
        store, rank, world = next(dist.rendezvous("env://", timeout=_PATIENCE))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun with a fixed port keeps the addresses of ranks that have died; machines count restarts otherwise
            store = dist.PrefixStore(f"attempt-{_restarts()}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size(), _local(), _restarts(), True)


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def _local() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")))


def shutdown() -> None:
    """Leaves the process group at the end of a run that went well."""
    if not dist.is_initialized():
        return
    dist.barrier()  # none closes connections that another still reads
    dist.destroy_process_group()
    for mesh in _MESHES:
        # torch's caches keep the mesh, it keeps the group, and that its threads: one which frees a tensor while Python
        # ends is killed, and ends the process with "terminate called without an active exception".
        getattr(mesh, "_pg_registry", {}).clear()
    _MESHES.clear()
    gc.collect()


# -- sharded weights ---------------------------------------------------------------------------------------------


class Root(nn.Module):
    """The model beneath a forward pass that ends with the loss, so that all weights it reads are whole meanwhile."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, objective: Any, batch: dict[str, Any]) -> tuple[Tensor, int, dict[str, float]]:
        """The parts of Objective.loss, in a tuple because FSDP looks for tensors in those."""
        loss = objective.loss(self.model, batch)
        return loss.total, loss.units, loss.logs


def shard(model: Any, device: str, dtype: torch.dtype | None = None) -> Root:
    """Shards the parameters of `model` over all ranks, by decoder layer and the rest. Gradients are sums over ranks.

    device: cpu or cuda, to which they move layer by layer. dtype: what to compute in, where that is not the weights'
    own; gradients are summed in float32. Raises InputError for packed weights.
    """
    if any(isinstance(module, PackedLinear) for module in model.modules()):
        raise InputError("packed weights cannot be sharded, each rank holds them whole; leave fsdp out")
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    _MESHES.append(mesh)
    policy = MixedPrecisionPolicy(dtype, None if dtype is None else torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    root = Root(model)
    fully_shard(root, mesh=mesh, mp_policy=policy)
    for module in _sharded(root):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    return root


def _sharded(root: nn.Module) -> list[FSDPModule]:
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, which shares its memory; a tensor that is not sharded itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_sharded(part: Tensor, like: Tensor) -> Tensor:
    """This rank's part of something that is sharded as `like` is."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has whole."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    start, stop = (first_row(len(whole), mesh.get_local_rank() + i, mesh.size()) for i in (0, 1))
    return whole[start:stop]


def first_row(rows: int, rank: int, ranks: int) -> int:
    """Where a rank's part begins, as FSDP shards: ceil(rows / ranks) rows each, the last ranks fewer or none."""
    return min(rank * -(-rows // ranks), rows)


@contextmanager
def gathered(root: Root | None, ranks: Ranks, every: bool, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within it rank 0's model has whole parameters on the CPU, for others to write: all, or those that are trained.

    All ranks enter. Nothing happens to a model that is not sharded (root None). dtype: of the copies.
    """
    if root is None:
        yield
        return
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    found: dict[int, nn.Parameter] = {}  # a tied weight is one parameter in two modules
    for part in _sharded(root):
        part.reshard()
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor) and (every or parameter.requires_grad):
                if id(parameter) not in found:
                    whole: Tensor = parameter.detach().full_tensor()
                    copy = whole.to("cpu", dtype) if ranks.first else torch.empty(0)
                    found[id(parameter)] = nn.Parameter(copy, requires_grad=parameter.requires_grad)
                held.append((module, name, parameter))
    try:
        for module, name, parameter in held if ranks.first else []:
            module._parameters[name] = found[id(parameter)]
        yield
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter
