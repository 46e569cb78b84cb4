"""The decoding step of a model as a CUDA graph: one launch for a token instead of a thousand small ones.

A graph reads and writes fixed addresses, so the keys and values of the sequence being continued lie in buffers that
belong to the graphs (`KVCache.claim`), and the newest ids, positions and mask are copied into place before each replay.
Graphs are recorded for buffers cut to 256, 512, 1024, ... positions, since attention reads all that it is shown. They
stay with the model from call to call and go with it; what they have baked in is compared before they are used again.

B rows, K key-value heads, C positions there is room for, E head width, V vocabulary.
"""

import threading
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from llama2.cache import DynamicCache, StaticCache
from llama2.model import LlamaForCausalLM
from llama2.plain_network import difference, warn_once
from llama2.quantization.linear import PackedLinear
from llama2.rope_types import type_of

PATIENCE = (
    4  # steps that run plainly first: recording takes the time of four, which an answer of a few words never saves
)
LEAST = 256  # positions of the smallest graph
KEPT = 2  # numbers of rows that keep their graphs and buffers
SHARE = 0.25  # of the free memory that buffers may take

_SIMPLE = (bool, int, float, str, torch.dtype, type(None))


class Recorded(Protocol):
    """A recorded step: `replay` computes `logits` (B, 1, V) again from what its inputs hold by then."""

    logits: Tensor

    def replay(self) -> None:
        """Runs the step."""


# Recordings that failed on their way: torch's allocator goes on asking them whether a stream is theirs.
_BROKEN: list[Any] = []


class CudaGraph:
    """A step recorded by CUDA. Raises RuntimeError where it cannot be: it waits for the device, or memory is short."""

    def __init__(self, step: Callable[[], Tensor], device: torch.device) -> None:
        with torch.cuda.device(device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(2):  # compiles kernels, fills tables, makes workspaces
                    step()
            current.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                    self.logits = step()
            except RuntimeError:
                _BROKEN.append(self._graph)
                # The random generator would go on believing that it is recorded; one that succeeds tells it otherwise.
                with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
                    torch.zeros(1, device=device)
                raise

    def replay(self) -> None:
        """As Recorded.replay."""
        self._graph.replay()


record: Callable[[Callable[[], Tensor], torch.device], Recorded] = CudaGraph


def can_record(device: torch.device) -> bool:
    """Whether there are graphs for this kind of device."""
    return device.type == "cuda"


def free_bytes(device: torch.device) -> int:
    """Memory that nobody has taken yet."""
    return int(torch.cuda.mem_get_info(device)[0])


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).stream_id) if device.type == "cuda" else 0


# -- what a graph has baked in -----------------------------------------------------------------------------------


def signature(model: nn.Module) -> tuple[Any, ...] | None:
    """Returns what a recorded step depends on besides its inputs; None where the step must run in Python.

    That is: whatever `plain_network.difference` names (said once), training mode, several devices, packed weights
    that torch unpacks (which waits for the device), RoPE whose base follows the length, flash_attention_2 (which reads
    no static cache), autocast.
    """
    if not isinstance(model, LlamaForCausalLM) or model.training or not can_record(model.device):
        return None
    config = model.config
    if (
        type_of(config).constant_below is not None
        or model.attn_implementation == "flash_attention_2"
        or model.model.attn_implementation != (model.attn_implementation)
    ):
        return None
    if torch.is_autocast_enabled(model.device.type):
        return None
    if reason := difference(model):
        warn_once(model, reason, "no CUDA graphs are recorded of this model", stacklevel=7)
        return None
    parts: list[Any] = [repr(vars(config)), model.attn_implementation, torch.get_float32_matmul_precision()]
    for module in model.modules():
        attributes = vars(module)
        if isinstance(module, PackedLinear) and not module.has_kernels(model.dtype, model.device):
            return None
        parts += (type(module), _settings(attributes))
        for tensor in (*attributes["_parameters"].values(), *attributes["_buffers"].values()):
            if tensor is None:
                continue
            if tensor.device != model.device:
                return None
            # A changed float is read anew; a changed integer may have been looked at, as the order of groups is.
            version = 0 if tensor.is_floating_point() or tensor.is_inference() else tensor._version
            parts.append((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), version))
    return tuple(parts)


def _settings(attributes: dict[str, Any]) -> tuple[Any, ...]:
    """The numbers and names among a module's attributes: the active adapters and their scales, sizes, an eps."""
    settings: list[Any] = []
    for name, value in attributes.items():
        if name[0] == "_":
            continue
        if isinstance(value, _SIMPLE):
            settings.append((name, value))
        elif isinstance(value, tuple | dict):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            settings.append((name, tuple(item for item in items if isinstance(item[1], _SIMPLE))))
    return tuple(settings)


# -- buffers and their owner ------------------------------------------------------------------------------------


class _Slot:
    """Buffers for so many rows, the cache that lies in them, and the graphs recorded over them, by positions."""

    def __init__(self) -> None:
        self.seen, self.refused = 0, False
        self.graphs: dict[int, Recorded] = {}
        self.room = 0
        self._buffers: Tensor | None = None  # (layers, 2, B, K, C, E)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._owner: ref[DynamicCache] | None = None
        self._thread: threading.Thread | None = None

    @property
    def opened(self) -> bool:
        """Whether there are buffers."""
        return self._buffers is not None

    def reserve(self, cache: DynamicCache, need: int, most: int) -> bool:
        """Whether `cache` now lies in buffers with room for `need` positions, best for `most`."""
        if need <= self.room and cache.lies_in(self.keys):
            return True
        owner = None if self._owner is None else self._owner()
        if owner is not None:
            other = self._thread is not threading.current_thread()
            if owner is not cache and other and self._thread is not None and self._thread.is_alive():
                return False  # in use at this moment, perhaps inside a layer
            owner.move_out()
            self._owner = None
        if cache.layers and not self._takes(cache):
            return False
        if need > self.room:
            if not cache.layers and not self.opened:
                return False
            self._build(cache, need, most)
        elif self._buffers is not None:
            self._buffers.zero_()  # a NaN left behind would come through the mask
        if self._buffers is None or need > self.room:
            return False
        cache.claim(self.keys, self.values)
        self._owner, self._thread = ref(cache), threading.current_thread()
        return True

    def _takes(self, cache: DynamicCache) -> bool:
        keys = cache.layers[0].views[0]
        return not self.opened or (
            (keys.shape[0], keys.shape[1], keys.shape[3]) == self._shape and keys.dtype == self.keys[0].dtype
        )

    @property
    def _shape(self) -> tuple[int, int, int]:
        rows, heads, _, width = self.keys[0].shape
        return rows, heads, width

    def _build(self, cache: DynamicCache, need: int, most: int) -> None:
        like = cache.layers[0].views[0] if cache.layers else self.keys[0]
        layers, (rows, heads, _, width) = len(cache.layers) or len(self.keys), like.shape
        each = 2 * layers * rows * heads * width * like.element_size()
        free = SHARE * free_bytes(like.device)
        for room in (bucket(max(need, most)), bucket(need)):
            if each * room <= free:
                self.drop()
                self._buffers = torch.zeros((layers, 2, rows, heads, room, width), dtype=like.dtype, device=like.device)
                self.keys, self.values = ([layer[i] for layer in self._buffers] for i in (0, 1))
                self.room = room
                self.tokens, self.positions = (
                    torch.zeros((rows, 1), dtype=torch.long, device=like.device) for _ in range(2)
                )
                self.place = torch.zeros(1, dtype=torch.long, device=like.device)
                self.real = torch.ones((rows, room), dtype=torch.bool, device=like.device)
                self._padded = False
                return

    def drop(self) -> None:
        """Forgets graphs and buffers; a cache that lies in these keeps them."""
        self.graphs, self._buffers, self.room, self.keys, self.values = {}, None, 0, [], []

    def fill(self, tokens: Tensor, positions: Tensor, mask_BS: Tensor | None, position: int) -> None:
        """Puts a step's inputs where graphs read them."""
        self.tokens.copy_(tokens)
        self.positions.copy_(positions)
        self.place.fill_(position)
        if mask_BS is not None:
            self.real[:, : mask_BS.shape[1]].copy_(mask_BS)
            self._padded = True
        elif self._padded:
            self.real.fill_(True)
            self._padded = False

    def graph(self, model: Any, need: int) -> Recorded:
        """The graph for `need` positions, recorded where it is not there yet. Raises RuntimeError as `record`."""
        shown = min(bucket(need), self.room)
        if shown not in self.graphs:
            keys, values = ([x[:, :, :shown] for x in parts] for parts in (self.keys, self.values))
            cache = StaticCache.over(keys, values)

            def step() -> Tensor:
                # What a recording reads must live as long as it does: made inside of it, or held by the slot.
                places = torch.arange(shown, device=self.place.device)
                seen_BS = (places <= self.place) & self.real[:, :shown]
                logits: Tensor = model(
                    input_ids=self.tokens,
                    attention_mask=seen_BS[:, None, None],
                    position_ids=self.positions,
                    past_key_values=cache,
                    use_cache=True,
                    cache_position=self.place,
                    logits_to_keep=1,
                    return_dict=True,
                ).logits
                return logits

            self.graphs[shown] = record(step, self.place.device)
        return self.graphs[shown]


def bucket(positions: int) -> int:
    """The power of two, LEAST or more, that holds so many positions."""
    return max(LEAST, 1 << (positions - 1).bit_length())


# -- of one model ------------------------------------------------------------------------------------------------


class Graphs:
    """The graphs of one model. Threads may share it: a second one runs plainly while the first is in the buffers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._signature: tuple[Any, ...] | None = None
        self._slots: dict[tuple[int, int], _Slot] = {}  # by rows and stream; the latest last

    def current(self, model: nn.Module) -> bool:
        """Forgets everything where the model is not as it was recorded; whether it can be recorded now."""
        now = signature(model)
        with self._lock:
            if now != self._signature:
                self._slots.clear()
                self._signature = now
        return now is not None

    def receive(self, cache: DynamicCache, device: torch.device, rows: int, length: int) -> None:
        """Lodges an empty cache at once where there are buffers, so that the prompt is written straight into them."""
        with self._lock:
            slot = self._slots.get((rows, _stream(device)))
            if slot is not None and slot.opened and not slot.refused:
                with torch.inference_mode(False), torch.no_grad():
                    slot.reserve(cache, length, length)

    def step(
        self, model: Any, tokens: Tensor, positions: Tensor, mask_BS: Tensor | None, cache: DynamicCache, most: int
    ) -> Tensor | None:
        """Logits (B, 1, V) of the newest tokens (B, 1), as PaddedRunner.step; None where this step runs plainly."""
        # Outside of inference mode, since what is made in it could not be written to by a later call without it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            slot = self._slot(len(tokens), _stream(tokens.device))
            slot.seen += 1
            if slot.refused or slot.seen <= PATIENCE or not cache.layers:
                return None
            cached = cache.get_seq_length()
            if not slot.reserve(cache, cached + 1, most):
                return None
            slot.fill(tokens, positions, mask_BS, cached)
            try:
                graph = slot.graph(model, cached + 1)
            except RuntimeError:  # waits for the device, or no memory: the plain step says so where that is an error
                slot.refused = True
                cache.move_out()
                slot.drop()
                return None
            graph.replay()
            for layer in cache.layers:
                layer.length += 1
            return graph.logits.clone()

    def _slot(self, rows: int, stream: int) -> _Slot:
        slot = self._slots.pop((rows, stream), None) or _Slot()
        self._slots[rows, stream] = slot
        while len(self._slots) > KEPT:
            del self._slots[next(iter(self._slots))]
        return slot


# Beside the models and not in them: a model stays what torch can copy, pickle and compile.
_HELD: WeakKeyDictionary[nn.Module, Graphs] = WeakKeyDictionary()


def graphs_of(model: Any) -> Graphs | None:
    """The graphs of `model`, made at the first call; None for what never has any."""
    if not isinstance(model, LlamaForCausalLM) or not can_record(model.device):
        _HELD.pop(model, None) if isinstance(model, nn.Module) else None
        return None
    return _HELD.setdefault(model, Graphs())


def forget(model: nn.Module) -> None:
    """Frees the graphs of `model` and their buffers, as deleting it does."""
    _HELD.pop(model, None)
