"""Keys and values of the tokens seen so far. The cache is an argument of forward, never module state.

    Cache                    base class of both
    KVCache (DynamicCache)   grows with the sequence; appends without copying what is there
                             or fills buffers that it has claimed, see `graphs`
                             or stands for a store elsewhere (the native engine's pages) until someone looks into it
    StaticCache              fixed length, fixed addresses: for compiled steps and CUDA graphs

Shapes: B batch, K key-value heads, S cached positions, E head width.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, Self

import torch
import torch.utils._pytree as pytree
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
        graph = torch.is_grad_enabled() and (keys.requires_grad or self._keys.requires_grad)
        if graph or torch.compiler.is_compiling():
            # Writing in place would break the graph that the earlier tokens still need.
            self._keys, self._values = torch.cat((self.keys, keys), 2), torch.cat((self.values, values), 2)
        else:
            self._make_room(new)
            self._keys[:, :, old:new] = keys
            self._values[:, :, old:new] = values
        self.length = new

    def _make_room(self, needed: int) -> None:
        # What was made in inference mode may not be written to outside of it.
        stale = self._keys.is_inference() and not torch.is_inference_mode_enabled()
        if needed <= self._keys.shape[2] and not stale:
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


class Store(Protocol):
    """Keys and values that another engine holds for a KVCache."""

    @property
    def rows(self) -> int:
        """Rows of the batch."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions held, padding included."""

    def crop(self, max_length: int) -> None:
        """As KVCache.crop."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As KVCache.reorder_cache; the number of rows may change."""

    def tensors(self) -> list[tuple[Tensor, Tensor]]:
        """A copy of the keys and values of each layer (B, K, S, E), zeros where there is padding."""


class Cache:
    """Base of the caches that `forward` and `generate` take and return."""

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        raise NotImplementedError

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions held."""
        raise NotImplementedError

    def get_usable_length(self, new_seq_length: int = 0, layer_idx: int = 0) -> int:
        """Positions held (the name in transformers 4.x)."""
        return self.get_seq_length(layer_idx)

    @property
    def seen_tokens(self) -> int:
        """Positions held (the name in transformers 4.x)."""
        return self.get_seq_length()


class KVCache(Cache):
    """A cache that grows with the sequence, with the methods of transformers' DynamicCache of 4.46 and 5.x."""

    is_compileable = False

    def __init__(self, config: LlamaConfig | None = None) -> None:
        self._layers: list[_Layer] = []
        self._store: Store | None = None
        self._in_use = False  # the store, by a call of generate()

    @classmethod
    def over(cls, store: Store) -> Self:
        """A cache that stands for `store`."""
        cache = cls()
        cache._store = store
        return cache

    @property
    def store(self) -> Store | None:
        """The external store of keys and values, if one replaces this cache's tensors."""
        return self._store

    def stand_for(self, store: Store, in_use: bool = False) -> None:
        """Forgets its own content: from now on it is what `store` holds. in_use: the store grows meanwhile, so what is
        looked at is a copy for that moment."""
        self._layers, self._store, self._in_use = [], store, in_use

    @property
    def layers(self) -> list[_Layer]:
        """The layers. Looking at them ends standing for a store: its content is copied into tensors once."""
        if self._store is not None:
            layers = [_Layer(*pair) for pair in self._store.tensors()]
            if self._in_use:
                return layers
            self._layers, self._store = layers, None
        return self._layers

    @layers.setter
    def layers(self, layers: list[_Layer]) -> None:
        self._layers, self._store, self._in_use = layers, None, False

    @property
    def rows(self) -> int:
        """Rows of the batch, 0 where nothing is held."""
        if self._store is not None:
            return self._store.rows
        return len(self._layers[0].views[0]) if self._layers else 0

    def __getstate__(self) -> dict[str, Any]:
        return {"_layers": self.layers, "_store": None, "_in_use": False}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Appends (B, K, T, E) to one layer and returns all of its keys and values (B, K, S + T, E)."""
        self._in_use = False
        layers = self.layers
        while layer_idx > len(layers):  # a model without some of its layers, or with them in another order
            layers.append(_Layer(key_states[:, :, :0], value_states[:, :, :0]))
        if layer_idx == len(layers):
            layers.append(_Layer(key_states, value_states))
        else:
            layers[layer_idx].append(key_states, value_states)
        return layers[layer_idx].views

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions held; of a layer that was never run, those of the others."""
        if self._store is not None:
            return self._store.get_seq_length()
        layers = self._layers
        if layer_idx < len(layers) and layers[layer_idx].length:
            return layers[layer_idx].length
        return max([layer.length for layer in layers]) if layers else 0  # a form that torch.compile takes

    def get_max_cache_shape(self) -> int | None:
        """None: no limit but memory."""
        return None

    get_max_length = get_max_cache_shape

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
        cached = self.get_seq_length()
        keep = max_length if max_length >= 0 else cached + max_length
        if keep < 0:
            raise InputError(f"cannot drop {-max_length} positions: the cache holds {cached}")
        if self._store is not None:
            return self._store.crop(keep)
        for layer in self._layers:
            layer.length = min(layer.length, keep)
        return None

    def _map(self, change: Any) -> None:
        for layer in self.layers:
            keys, values = layer.views
            layer.replace(change(keys), change(values))

    def claim(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Moves into buffers (B, K, room, E), one of each per layer, which stay their owner's; grows out of them."""
        layers = self.layers
        self.layers = [_Lodged(k, v) for k, v in zip(keys, values, strict=True)]
        for old, new in zip(layers, self.layers, strict=False):
            new.append(*old.views)

    def lies_in(self, keys: Sequence[Tensor]) -> bool:
        """Whether all layers still lie in the buffers that `claim` was given."""
        return len(self.layers) == len(keys) and all(map(_Layer.fills, self.layers, keys))

    def move_out(self) -> None:
        """Takes memory of its own."""
        self.layers = [_Layer(layer.keys, layer.values) for layer in self.layers]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Takes the rows `beam_idx` (B,) in that order: beam search."""
        if self._store is not None:
            self._store.reorder_cache(beam_idx)
        else:
            self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times."""
        self.reorder_cache(torch.arange(self.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows `indices` (ids, or a mask of rows)."""
        self.reorder_cache(torch.arange(self.rows)[torch.as_tensor(indices).cpu()])

    def batch_split(self, full_batch_size: int, split_size: int) -> list[Self]:
        """Caches of `split_size` rows each, the last one of what is left."""
        parts = []
        for first in range(0, full_batch_size, split_size):
            piece = type(self)()
            for index, (keys, values) in enumerate(self):
                piece.update(keys[first : first + split_size], values[first : first + split_size], index)
            parts.append(piece)
        return parts

    @classmethod
    def from_batch_splits(cls, splits: Sequence["KVCache"]) -> Self:
        """One cache of the rows of several."""
        cache = cls()
        for index in range(len(splits[0]) if splits else 0):
            pairs = [split[index] for split in splits]
            cache.update(torch.cat([keys for keys, _ in pairs]), torch.cat([values for _, values in pairs]), index)
        return cache

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


class LayerPlaces:
    """A cache in which a layer goes by its place in the model instead of its own index, where a layer stands twice."""

    def __init__(self, cache: Any) -> None:
        self.cache, self.place = cache, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, cache_kwargs: dict[str, Any] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As KVCache.update, of the layer at `place`."""
        updated: tuple[Tensor, Tensor] = self.cache.update(key_states, value_states, self.place, cache_kwargs)
        return updated


class StaticCache(Cache):
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
        with torch.inference_mode(False):  # or calls outside of inference mode could not write to them
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

    @property
    def layers(self) -> list[_Layer]:
        """The buffers of each layer, all of their positions: `cache.layers[0].keys` (B, K, max_cache_len, E)."""
        return [_Layer(keys, values) for keys, values in zip(self.key_cache, self.value_cache, strict=True)]

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
        """Takes the rows `beam_idx` (B,) in that order, in place where there are as many."""
        if len(beam_idx) != self.batch_size:
            for buffers in (self.key_cache, self.value_cache):
                buffers[:] = [buffer.index_select(0, beam_idx.to(buffer.device)) for buffer in buffers]
            self.batch_size = len(beam_idx)
            return
        for buffer in (*self.key_cache, *self.value_cache):
            buffer.copy_(buffer.index_select(0, beam_idx.to(buffer.device)))

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.batch_size

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self.key_cache[layer_idx], self.value_cache[layer_idx]

    def __len__(self) -> int:
        return len(self.key_cache)


# -- pytrees: torch.export, torch.func and torch.compile take caches apart into tensors -----------------------------


def _parts_of(cache: Any) -> tuple[list[Any], Any]:
    lengths = tuple(cache._lengths) if isinstance(cache, StaticCache) else None
    return [list(cache.key_cache), list(cache.value_cache)], lengths


def _named_parts_of(cache: Any) -> tuple[list[tuple[Any, Any]], Any]:
    parts, lengths = _parts_of(cache)
    return [(pytree.GetAttrKey(name), part) for name, part in zip(("key_cache", "value_cache"), parts)], lengths


def _growing(parts: Iterable[Any], lengths: Any) -> KVCache:
    keys, values = parts
    cache = KVCache()
    cache.layers = [_Layer(*pair) for pair in zip(keys, values, strict=True)]
    return cache


def _static(parts: Iterable[Any], lengths: Any) -> StaticCache:
    keys, values = parts
    cache = StaticCache.over(keys, values)
    cache._lengths = list(lengths)
    return cache


for _kind, _made in ((KVCache, _growing), (StaticCache, _static)):
    pytree.register_pytree_node(
        _kind,
        _parts_of,
        _made,
        serialized_type_name=f"llama2.cache.{_kind.__name__}",
        flatten_with_keys_fn=_named_parts_of,
    )
