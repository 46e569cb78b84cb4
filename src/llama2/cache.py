"""Keys and values of the tokens seen so far. The cache is an argument of forward, never module state.

    KVCache (DynamicCache)   grows with the sequence; appends without copying what is there
                             or fills buffers that it is lodged in, see `graphs`
    StaticCache              fixed length, fixed addresses: for compiled steps and CUDA graphs

Shapes: B batch, K key-value heads, S cached positions, E head width.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from llama2.config import LlamaConfig
from llama2.errors import InputError

_FIRST_ROOM = 256  # positions reserved beyond the first append; then the room doubles


class _Layer:
    """One layer's keys and values: buffers with room to grow, and how many positions are filled."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values, self.length = keys, values, keys.shape[2]

    @property
    def keys(self) -> Tensor:
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        return self._values[:, :, : self.length]

    @property
    def views(self) -> tuple[Tensor, Tensor]:
        """Keys and values for this moment, not to be kept."""
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]

    def fills(self, keys: Tensor) -> bool:
        """Whether this layer's keys lie in the buffer `keys`."""
        return self._keys is keys

    def append(self, keys: Tensor, values: Tensor) -> None:
        old, new = self.length, self.length + keys.shape[2]
        if keys.shape[:2] != self._keys.shape[:2]:
            raise InputError(
                f"the cache holds batch x heads {tuple(self._keys.shape[:2])} but got {tuple(keys.shape[:2])}; "
                "use a new cache for another batch"
            )
        if torch.is_grad_enabled() and (keys.requires_grad or self._keys.requires_grad):
            # Writing in place would break the graph that the earlier tokens still need.
            self._keys, self._values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)
        else:
            self._make_room(new)
            self._keys[:, :, old:new] = keys
            self._values[:, :, old:new] = values
        self.length = new

    def _make_room(self, needed: int) -> None:
        if needed <= self._keys.shape[2]:
            return
        room = needed + max(_FIRST_ROOM, self.length)
        self._keys, self._values = (_grown(x, room, self.length) for x in (self._keys, self._values))

    def replace(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values, self.length = keys, values, keys.shape[2]


class _Lodged(_Layer):
    """A layer in buffers of another owner, who will use them again: what it hands out to keep are copies."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__(keys, values)
        self.length = 0

    @property
    def keys(self) -> Tensor:
        return super().keys.clone()

    @property
    def values(self) -> Tensor:
        return super().values.clone()

    def replace(self, keys: Tensor, values: Tensor) -> None:
        if len(keys) != len(self._keys):
            return super().replace(keys, values)
        self.length = keys.shape[2]
        for mine, new in zip(self.views, (keys, values), strict=True):
            mine.copy_(new)
        return None


def _grown(x: Tensor, room: int, length: int) -> Tensor:
    larger = x.new_empty((x.shape[0], x.shape[1], room, x.shape[3]))
    larger[:, :, :length] = x[:, :, :length]
    return larger


class KVCache:
    """A cache that grows with the sequence, with the methods of transformers' DynamicCache of 4.46 and 5.x."""

    def __init__(self, config: LlamaConfig | None = None) -> None:
        self.layers: list[_Layer] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Appends (B, K, T, E) to one layer and returns all of its keys and values (B, K, S + T, E)."""
        if layer_idx == len(self.layers):
            self.layers.append(_Layer(key_states, value_states))
        elif layer_idx < len(self.layers):
            self.layers[layer_idx].append(key_states, value_states)
        else:
            raise InputError(f"layer {layer_idx} comes before layer {len(self.layers)} has been filled")
        return self.layers[layer_idx].views

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions held."""
        return self.layers[layer_idx].length if layer_idx < len(self.layers) else 0

    def get_max_cache_shape(self) -> int | None:
        """None: no limit but memory."""
        return None

    @property
    def key_cache(self) -> list[Tensor]:
        """Keys of each layer (B, K, S, E)."""
        return [layer.keys for layer in self.layers]

    @property
    def value_cache(self) -> list[Tensor]:
        """Values of each layer (B, K, S, E)."""
        return [layer.values for layer in self.layers]

    def crop(self, max_length: int) -> None:
        """Keeps the first `max_length` positions, or drops the last -`max_length`."""
        held = self.get_seq_length()
        keep = max_length if max_length >= 0 else held + max_length
        if keep < 0:
            raise InputError(f"cannot drop {-max_length} positions: the cache holds {held}")
        for layer in self.layers:
            layer.length = min(layer.length, keep)

    def _map(self, change: Any) -> None:
        for layer in self.layers:
            keys, values = layer.views
            layer.replace(change(keys), change(values))

    def lodge(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Moves into buffers (B, K, room, E), one of each a layer, which stay their owner's; grows out of them."""
        held = self.layers
        self.layers = [_Lodged(k, v) for k, v in zip(keys, values, strict=True)]
        for old, new in zip(held, self.layers, strict=False):
            new.append(*old.views)

    def lodges_in(self, keys: Sequence[Tensor]) -> bool:
        """Whether all layers still lie in the buffers that `lodge` was given."""
        return len(self.layers) == len(keys) and all(map(_Layer.fills, self.layers, keys))

    def move_out(self) -> None:
        """Takes memory of its own."""
        self.layers = [_Layer(layer.keys, layer.values) for layer in self.layers]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows `beam_idx` (B,) in that order: beam search."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices`."""
        self._map(lambda x: x[indices])

    def reset(self) -> None:
        """Forgets everything; the memory is kept."""
        self.crop(0)

    def to_legacy_cache(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """A tuple of (keys, values) per layer, as transformers 4.x returned."""
        return tuple(self)

    @classmethod
    def from_legacy_cache(cls, past_key_values: Iterable[tuple[Tensor, Tensor]] | None = None) -> Self:
        """A cache from a tuple of (keys, values) per layer."""
        cache = cls()
        for index, (keys, values) in enumerate(past_key_values or ()):
            cache.update(keys, values, index)
        return cache

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        return layer.keys, layer.values

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((layer.keys, layer.values) for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers)


DynamicCache = KVCache


class StaticCache:
    """A cache of fixed length: buffers (B, K, max_cache_len, E) of zeros whose addresses never change.

    Attention sees all positions; forward masks those not written yet. With `cache_position` (T,) in `cache_kwargs`
    the write goes where the tensor says, so a captured CUDA graph can be replayed for the next position.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch_size: int = 1,
        max_cache_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        max_batch_size: int | None = None,
    ) -> None:
        self.batch_size = batch_size if max_batch_size is None else max_batch_size
        self.max_cache_len = config.max_position_embeddings if max_cache_len is None else max_cache_len
        if self.max_cache_len < 1 or self.batch_size < 1:
            raise InputError(f"batch_size {self.batch_size} and max_cache_len {self.max_cache_len} must be at least 1")
        shape = (self.batch_size, config.num_key_value_heads, self.max_cache_len, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.key_cache = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.value_cache = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self._lengths = [0] * config.num_hidden_layers

    @classmethod
    def over(cls, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Self:
        """A cache whose buffers (B, K, max_cache_len, E) are these."""
        cache = cls.__new__(cls)
        cache.key_cache, cache.value_cache = list(keys), list(values)
        cache.batch_size, cache.max_cache_len = keys[0].shape[0], keys[0].shape[2]
        cache._lengths = [0] * len(keys)
        return cache

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Writes (B, K, T, E) at `cache_position`, or after what is there; returns the whole buffers."""
        keys, values = self.key_cache[layer_idx], self.value_cache[layer_idx]
        position = (cache_kwargs or {}).get("cache_position")
        start = self._lengths[layer_idx]
        end = start + key_states.shape[2]
        if position is None:
            if end > self.max_cache_len:
                raise InputError(
                    f"position {end - 1} does not fit a static cache of {self.max_cache_len}; "
                    "give a larger max_cache_len or use DynamicCache"
                )
            position = torch.arange(start, end, device=keys.device)
        keys.index_copy_(2, position, key_states.to(keys.dtype))
        values.index_copy_(2, position, value_states.to(values.dtype))
        self._lengths[layer_idx] = min(end, self.max_cache_len)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions written by this process (a replayed graph does not count)."""
        return self._lengths[layer_idx]

    def get_max_cache_shape(self) -> int:
        """Positions there is room for."""
        return self.max_cache_len

    def reset(self) -> None:
        """Zeroes the buffers in place."""
        for buffer in (*self.key_cache, *self.value_cache):
            buffer.zero_()
        self._lengths = [0] * len(self._lengths)

    def crop(self, max_length: int) -> None:
        """Keeps the first `max_length` positions, or drops the last -`max_length`."""
        keep = max_length if max_length >= 0 else self._lengths[0] + max_length
        self._lengths = [min(length, max(keep, 0)) for length in self._lengths]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows `beam_idx` (B,) in that order, in place."""
        for buffer in (*self.key_cache, *self.value_cache):
            buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self.key_cache[layer_idx], self.value_cache[layer_idx]

    def __len__(self) -> int:
        return len(self.key_cache)
