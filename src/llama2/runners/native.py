"""The native CPU engine for generate(): rows of a batch packed for the runner contract (`contract.Runner`).

    NativeRunner(weights)     step() over the engine's paged cache; rows of a batch are sequences, padding is skipped
    NativeModel               a model that exists in the engine only: a GGUF file runs packed, torch holds no weights
    native_weights(model)     the engine's view of a torch model, made anew when a parameter is replaced

B rows, T new tokens, S context columns, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from llama2 import cpu
from llama2.cache import Cache, KVCache
from llama2.checkpoint.gguf import GgufFile
from llama2.checkpoint.packing_note import warn_of_packing
from llama2.checkpoint.peft_adapter import read_adapter
from llama2.errors import InputError, Llama2Error
from llama2.lora import LoraLinear
from llama2.model import LlamaForCausalLM
from llama2.model_methods import GenerationMethods
from llama2.plain_network import difference, warn_once

NATIVE_CACHES = (None, "dynamic", "quantized")  # cache_implementation
_NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Hidden(NamedTuple):
    """Columns (n,) of a row that a mask hides, and their keys and values (layers, kv heads, n, width)."""

    columns: np.ndarray
    parts: tuple[np.ndarray, ...]

    def among(self, chosen: np.ndarray) -> "_Hidden":
        """Those columns of them that are chosen (n,)."""
        return _Hidden(self.columns[chosen], tuple(x[:, :, chosen] for x in self.parts))


class NativeCache:
    """Keys and values of the rows of one batch in the engine's pages. Columns count padding, pages do not hold it.

    What a mask hides is kept beside the pages: another call may show it again. Padding that the engine ran over itself
    has no keys and values; `tensors` gives zeros for it.

    Inside the library only: callers of generate() get a KVCache that stands for one of these (`cache.Store`).
    """

    def __init__(
        self,
        weights: cpu.CpuWeights,
        rows: int,
        columns: int,
        dtype: cpu.KvDtype,
        tensor_dtype: torch.dtype = torch.float32,
    ) -> None:
        """tensor_dtype: what `tensors` gives, the model's."""
        self._weights, self._tensor_dtype = weights, tensor_dtype
        self._pages = pages_for(weights, rows, columns, dtype)
        self.sequences = [self._pages.sequence() for _ in range(rows)]
        self._real = np.zeros((rows, columns), bool)
        self._hidden: list[_Hidden | None] = [None] * rows
        self.columns = 0

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.sequences)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Context columns held, padding included."""
        return self.columns

    def get_max_cache_shape(self) -> int:
        """Context columns there is room for."""
        return self._real.shape[1]

    def append(self, new: int, real_BT: np.ndarray | None = None) -> cpu.CacheView[cpu.PagedCache]:
        """Room for `new` tokens of every row, or for those marked True (B, new) of the rows that have any; counts the
        columns."""
        end = self.columns + new
        if end > self.get_max_cache_shape():
            raise InputError(
                f"column {end - 1} does not fit a native cache of {self.get_max_cache_shape()}; "
                "start with a new cache, or ask for fewer new tokens"
            )
        counts = [new] * self.rows if real_BT is None else real_BT.sum(1).tolist()
        view = self._pages.view([(s, n) for s, n in zip(self.sequences, counts, strict=True) if n])
        self._real[:, self.columns : end] = True if real_BT is None else real_BT
        self.columns = end
        return view

    def append_padding(self, new: int) -> None:
        """Counts `new` columns that are padding in every row."""
        self._real[:, self.columns : self.columns + new] = False
        self.columns += new

    def crop(self, max_length: int) -> None:
        """Keeps the first `max_length` columns, or drops the last -`max_length`."""
        keep = max(max_length if max_length >= 0 else self.columns + max_length, 0)
        if keep < self.columns:
            self.columns = keep
            for sequence, real in zip(self.sequences, self._real, strict=True):
                sequence.crop(min(sequence.length, int(real[:keep].sum())))
            self._hidden = [None if row is None else row.among(row.columns < keep) for row in self._hidden]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row beam_idx[i]; copies share their full pages."""
        order, old = [int(i) for i in beam_idx], self.sequences
        if len(order) > self.rows:
            return self._move(order, self.get_max_cache_shape())
        self.sequences = [old[i].fork() for i in order]
        self._real = self._real[order]
        self._hidden = [self._hidden[i] for i in order]
        for sequence in old:
            sequence.free()
        return None

    def fits(self, weights: cpu.CpuWeights) -> bool:
        """Whether a model of these weights can go on from it."""
        return _shape(self._weights) == _shape(weights)

    def tensors(self) -> list[tuple[Tensor, Tensor]]:
        """As Store.tensors."""
        c, shape = self._pages, (self.rows, self._pages.heads, self.columns, self._pages.width)
        both = torch.zeros((c.layers, 2, *shape), dtype=self._tensor_dtype)
        for row, (sequence, real) in enumerate(zip(self.sequences, self._real, strict=True)):
            where = torch.from_numpy(np.flatnonzero(real[: self.columns]))
            for side, cached in enumerate(sequence.read()):
                both[:, side, row, :, where] = torch.from_numpy(cached).to(both.dtype)
            if (hidden := self._hidden[row]) is not None:
                for side, cached in enumerate(hidden.parts):
                    both[:, side, row, :, torch.from_numpy(hidden.columns)] = torch.from_numpy(cached).to(both.dtype)
        return [(layer[0], layer[1]) for layer in both]

    def fill(self, layers: Sequence[tuple[Tensor, Tensor]], real: np.ndarray | None) -> None:
        """Takes keys and values (B, K, S, E) of each layer into the empty cache; real (B, S): False hides."""
        keys, values = (torch.stack([pair[i].detach() for pair in layers]).float() for i in (0, 1))
        self.columns = keys.shape[3]
        shown = np.ones((self.rows, self.columns), bool) if real is None else real
        for row in range(self.rows):
            self._write(row, np.arange(self.columns), (keys[:, row].numpy(), values[:, row].numpy()), shown[row])

    def prepare(self, rows: int, columns: int, mask: np.ndarray | None) -> None:
        """Makes it hold `rows` rows, each of its own repeated, with room for `columns`; columns that `mask` (rows, ...)
        marks False are hidden from now on, and those that it marks True are shown. None shows all."""
        if rows != self.rows or columns > self.get_max_cache_shape():
            room = max(columns, self.get_max_cache_shape())
            self._move([i * self.rows // rows for i in range(rows)], room)
        shown = np.ones((self.rows, self.columns), bool) if mask is None else mask[:, : self.columns].astype(bool)
        for row, sequence in enumerate(self.sequences):
            real, hidden = self._real[row, : self.columns], self._hidden[row]
            if np.array_equal(real, shown[row]):
                continue
            where, parts = np.flatnonzero(real), tuple(sequence.read())
            if hidden is not None:
                where = np.concatenate((where, hidden.columns))
                parts = tuple(np.concatenate(pair, 2) for pair in zip(parts, hidden.parts, strict=True))
            if len(lost := np.setdiff1d(np.flatnonzero(shown[row]), where)):
                raise InputError(
                    f"column {lost[0]} of row {row} was padding when past_key_values was made, so it holds nothing "
                    "there, and attention_mask shows it now; give the attention_mask of that call, continued with 1"
                )
            order = np.argsort(where)
            sequence.free()
            self._write(row, where[order], tuple(x[:, :, order] for x in parts), shown[row])

    def _write(self, row: int, where: np.ndarray, parts: tuple[np.ndarray, ...], shown: np.ndarray) -> None:
        """Puts keys and values of the columns `where` into the row's empty sequence, or beside it where not shown."""
        chosen = shown[where]
        self.sequences[row].write(*(np.ascontiguousarray(x[:, :, chosen]) for x in parts))
        self._hidden[row] = None if chosen.all() else _Hidden(where, parts).among(~chosen)
        self._real[row, : self.columns] = shown

    def _move(self, order: list[int], columns: int) -> None:
        """Takes the rows `order` into new pages with room for `columns`."""
        old, real = self.sequences, self._real
        self._pages = pages_for(self._weights, len(order), columns, self._pages.dtype)
        moved: dict[int, cpu.CachedSequence] = {}
        self.sequences = []
        for i in order:
            if i in moved:
                self.sequences.append(moved[i].fork())
                continue
            moved[i] = self._pages.sequence()
            moved[i].copy_of(old[i])
            self.sequences.append(moved[i])
        self._real = np.zeros((len(order), columns), bool)
        self._real[:, : real.shape[1]] = real[order]
        self._hidden = [self._hidden[i] for i in order]


def pages_for(weights: cpu.CpuWeights, rows: int, columns: int, dtype: cpu.KvDtype) -> cpu.PagedCache:
    # For each row a page more for its end, and one to copy a page to that it shares with another row.
    return cpu.PagedCache(weights, rows * (-(-columns // cpu.PAGE) + 2) * cpu.PAGE, dtype)


def _shape(weights: cpu.CpuWeights) -> tuple[int, int, int]:
    c = weights.config
    return c.num_hidden_layers, c.num_key_value_heads, c.head_dim


class NativeRunner:
    """`weights` on the engine's own threads, as generation's PaddedRunner. cache_dtype: see `cpu.PagedCache`."""

    def __init__(
        self,
        weights: cpu.CpuWeights,
        cache_dtype: cpu.KvDtype = "bfloat16",
        adapter: str | None = None,
        dtype: torch.dtype = torch.float32,
        precision: str = "fast",
    ) -> None:
        """adapter: one of `weights.adapters`, for every row; the engine itself takes another for each sequence. dtype:
        the model's, that of the tensors of a cache that leaves the library. precision: see `cpu.CpuRunner`."""
        self.weights, self.cache_dtype, self.adapter, self.dtype = weights, cache_dtype, adapter, dtype
        self._engine = cpu.CpuRunner(weights, precision)

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return self._engine.isa

    def new_cache(self, kind: str | None, rows: int, length: int) -> NativeCache:
        """As PaddedRunner.new_cache; there is no static kind. "quantized" is int8 whatever cache_dtype is."""
        if kind not in NATIVE_CACHES:
            raise InputError(
                f"the native engine has no {kind!r} cache; leave cache_implementation out or runner='torch'"
            )
        dtype = "int8" if kind == "quantized" else self.cache_dtype
        return NativeCache(self.weights, rows, length, dtype, self.dtype)

    def takes(self, cache: Any) -> bool:
        """Whether `adopt` can go on from a caller's cache; else torch has to."""
        if isinstance(cache, NativeCache):
            return cache.fits(self.weights)
        if type(cache) is not KVCache:
            return False
        if cache.store is not None:
            return isinstance(cache.store, NativeCache) and cache.store.fits(self.weights)
        if not cache.layers:
            return True
        layers, heads, width = _shape(self.weights)
        pairs = list(cache)
        alike = {(x.shape, x.dtype, x.device.type, type(x), x.requires_grad) for pair in pairs for x in pair}
        keys = pairs[0][0]
        expected = (keys.shape[1], keys.shape[3], keys.dtype, keys.device.type, type(keys), keys.requires_grad)
        return len(pairs) == layers and len(alike) == 1 and expected == (heads, width, self.dtype, "cpu", Tensor, False)

    def adopt(self, cache: Any, rows: int, length: int, mask: Tensor | None) -> NativeCache:
        """A caller's cache in pages, for `rows` rows and `length` columns; mask (rows, ...): True = a real token.

        A KVCache stands for the pages while the call runs, and afterwards until its caller looks into it.
        """
        real = None if mask is None else mask.numpy()
        if isinstance(cache, NativeCache):
            native = cache
        elif cache.store is not None:
            native = cache.store
        else:
            cached = cache.get_seq_length()
            batch = cache.rows or rows
            native = NativeCache(self.weights, batch, max(length, cached), self.cache_dtype, self.dtype)
            if cached:
                native.fill(list(cache), None if real is None else real[:: max(rows // batch, 1), :cached])
        native.prepare(rows, length, real)
        if native is not cache:
            cache.stand_for(native, in_use=True)
        return native

    def step(
        self, tokens: Tensor, positions: Tensor, mask_BS: Tensor | None, cache: NativeCache | None, keep: int = 1
    ) -> Tensor:
        """As PaddedRunner.step, float32 logits; those of padding are 0. tokens are ids: embeddings need torch."""
        rows, new = tokens.shape
        if cache is None:
            cache = self.new_cache(None, rows, new)
        if cache.rows != rows:
            raise InputError(f"the native cache holds {cache.rows} rows but the step has {rows}; use a new cache")
        ids, places, kept = tokens.numpy(), positions.numpy(), min(keep, new)
        if len(places) != rows:
            places = np.broadcast_to(places, ids.shape)
        if mask_BS is None:
            # As many tokens in every row: what is asked for are the ends of equal stretches.
            logit_rows = None if kept == 1 else np.arange(rows * new).reshape(rows, new)[:, new - kept :].ravel()
            logits_of_real = self._run(ids.ravel(), places.ravel(), logit_rows, cache, new)
            return torch.from_numpy(logits_of_real).view(rows, kept, -1)
        real = mask_BS[:, -new:].numpy() != 0
        logits = torch.zeros((rows, kept, self.weights.config.vocab_size))
        if not real.any():
            cache.append_padding(new)
            return logits
        asked = np.zeros(ids.shape, bool)
        asked[:, new - kept :] = True
        logits_of_real = self._run(ids[real], places[real], np.flatnonzero(asked[real]), cache, new, real)
        target = torch.from_numpy(asked & real)[:, new - kept :]
        if bool(target.all()):
            return torch.from_numpy(logits_of_real).view_as(logits)
        logits[target] = torch.from_numpy(logits_of_real)
        return logits

    def _run(
        self,
        ids: np.ndarray,
        places: np.ndarray,
        logit_rows: np.ndarray | None,
        cache: NativeCache,
        new: int,
        real_BT: np.ndarray | None = None,
    ) -> np.ndarray:
        """Logits (len(wanted), V) of a packed step; the cache is as before where it fails."""
        cached = cache.columns
        try:
            view = cache.append(new, real_BT)
            chosen = None if self.adapter is None else [self.adapter] * len(view.past)
            return self._engine.step(ids, places, view, logit_rows, chosen)
        except BaseException:
            cache.columns = cached  # the engine has left the sequences as they were
            raise


class NativeModel(cpu.CpuModel, GenerationMethods):
    """A model of the native engine with generate(): tensors of torch in and out, and no torch parameters.

    It has what `generate` needs of a model (config, generation_config, device, dtype), so a 4-bit file stays 4-bit. For
    forward passes, training or other devices load the file with AutoModelForCausalLM.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    @classmethod
    def from_gguf(cls, path: str | Path, threads: int | None = None) -> "NativeModel":
        """The model of a GGUF file; see `cpu.CpuModel.from_source`."""
        return cls.from_source(GgufFile(path), threads)

    @classmethod
    def from_module(cls, model: LlamaForCausalLM, threads: int | None = None) -> "NativeModel":
        """A torch model's own weights, in place: a change of them shows here too."""
        if reason := why_not(model):
            raise InputError(f"the native engine cannot run this model: {reason}")
        return cls(cpu.CpuWeights.from_module(model, threads), model.generation_config, kept_in(model))

    def load_adapter(self, folder: str | Path, name: str = "default") -> None:
        """Adds a LoRA adapter that peft wrote and uses it from now on; the weights stay as they are.

        Raises as `checkpoint.peft.read_adapter`, and InputError where there is an adapter of that name.
        """
        warn_of_packing(Path(folder), self.config)
        self.add_adapter(name, read_adapter(folder, self.config).plain)


class _Held:
    """The engine's weights of one torch model, and the state of what they were made from."""

    def __init__(self, stamp: tuple[Any, ...], weights: cpu.CpuWeights | None, reason: str = "") -> None:
        self.stamp, self.weights, self.reason = stamp, weights, reason


_HELD: WeakKeyDictionary[nn.Module, _Held] = WeakKeyDictionary()


def stamp_of(model: Any) -> tuple[Any, ...]:
    """Which tensors and settings the weights are made from. The content of parameters needs no stamp: the engine reads
    it in place, or copies it at every call. Buffers (packed weights) are copied, so their versions count."""
    config = model.config
    settings = (config.rms_norm_eps, config.max_position_embeddings, repr(config.rope_parameters))
    tensors: list[tuple[int, ...]] = []
    for module in model.modules():
        attributes = module.__dict__
        tensors += [(id(p), p.data_ptr()) for p in attributes["_parameters"].values() if p is not None]
        tensors += [(id(b), b.data_ptr(), _version(b)) for b in attributes["_buffers"].values() if b is not None]
        if type(module) is LoraLinear and any(name in module.lora_magnitude_vector for name in module.active):
            tensors.append((id(module),))  # DoRA, which the engine has not
    return (*settings, *tensors)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def unsuited(model: Any, expected: Any = LlamaForCausalLM) -> str:
    """Why the engine is not meant for `model`, or "": what its kind, device and dtype say."""
    if not cpu.available():
        return "it is not built; install a C++17 compiler and llama2 again"
    if not isinstance(model, expected):
        return f"it runs {expected.__name__}, not {type(model).__name__}"
    if model.training or model.device.type != "cpu":
        return f"the model is {'in training mode' if model.training else 'on ' + str(model.device)}"
    if model.dtype not in _NATIVE_DTYPES:
        return f"the model is {model.dtype}; it computes in float32, float16 and bfloat16"
    if model.config.pretraining_tp > 1:
        return "pretraining_tp asks for torch's order of summation"
    if torch.is_autocast_enabled("cpu"):
        return "autocast asks for torch's arithmetic"
    return ""


def why_not(model: Any) -> str:
    """Why torch has to run `model` whatever its weights are, or "": known without looking at a parameter's content."""
    return "" if isinstance(model, cpu.CpuModel) else unsuited(model) or difference(model)


def native_weights(model: Any) -> cpu.CpuWeights | None:
    """The engine's weights of `model`, or None where torch has to run it.

    What makes it another network than the engine computes (`plain_network.difference`, adapters, an activation without
    a kernel) is said in a warning, once per model and reason.
    """
    if isinstance(model, cpu.CpuModel):
        return model.weights
    if unsuited(model):
        return None
    if reason := difference(model):
        warn_once(model, reason, _TORCH_RUNS, stacklevel=9)
        return None
    stamp = stamp_of(model)
    entry = _HELD.get(model)
    if entry is None or entry.stamp != stamp:
        try:
            if model.config.hidden_act not in ("silu", "swish"):
                raise InputError(f"hidden_act {model.config.hidden_act!r} has no native kernel")
            entry = _Held(stamp, cpu.CpuWeights.from_module(model))
        except (Llama2Error, ValueError) as error:
            entry = _Held(stamp, None, str(error))
        _HELD[model] = entry
    elif entry.weights is not None:
        entry.weights.refresh()
    if entry.weights is None:
        warn_once(model, entry.reason, _TORCH_RUNS, stacklevel=9)
    return entry.weights


_TORCH_RUNS = "torch runs this model, not the native engine"


def kept_in(model: Any) -> cpu.KvDtype:
    """Returns the default dtype of keys and values for `model`: float32 for float32 weights, else bfloat16, and
    so for GGUF's blocks, whatever dtype torch computes in."""
    if isinstance(model, cpu.CpuModel):
        return model.cache_dtype
    packed = (getattr(model.config, "quantization_config", None) or {}).get("quant_method")
    return "float32" if getattr(model, "dtype", None) == torch.float32 and packed != "gguf" else "bfloat16"


def native_runner(model: Any, cache_dtype: cpu.KvDtype | None = None, precision: str = "fast") -> NativeRunner | None:
    """A runner over `native_weights(model)`; cache_dtype=None: `kept_in`. precision: see `cpu.CpuRunner`."""
    weights = native_weights(model)
    if weights is None:
        return None
    if isinstance(model, cpu.CpuModel):
        return NativeRunner(weights, cache_dtype or model.cache_dtype, model.adapter, precision=precision)
    return NativeRunner(weights, cache_dtype or kept_in(model), dtype=model.dtype, precision=precision)


def row_count(cache: Any) -> int:
    """Rows of a batch that a cache of either engine, or of another library, holds."""
    return int(cache.rows) if isinstance(cache, NativeCache | Cache) else len(cache[0][0])
