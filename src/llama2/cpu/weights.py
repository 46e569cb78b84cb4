"""A model's weights where the kernels want them.

Float weights stay where they are (the file's memory map, or the module's own parameters); GGUF's 4- to 8-bit blocks
are repacked once into tiles of 16 rows, losslessly. No torch here, except inside `from_module`.
"""

import copy
import warnings
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llama2.architecture import EMBEDDING
from llama2.compiled import make_pool, native
from llama2.config import LlamaConfig
from llama2.cpu.adapters import PARTS as LINEARS
from llama2.cpu.adapters import Tensors, make_adapter
from llama2.cpu.gguf_reader import PARTS, BlockMatrix, GgufSource, Reader, check_coverage
from llama2.cpu.packed_file import find
from llama2.errors import InputError, MismatchError
from llama2.lazy import door
from llama2.quantization.formats import BLOCKS, PACKED_BLOCKS
from llama2.quantization.packable import PackableWeight
from llama2.rope_types import attention_scaling, inverse_frequencies, type_of
from llama2.stored_arrays import BFLOAT16, CODES, patterns, to_float32

_blocks_of = door("cpu.modules", "blocks_of", "The blocks of a layer of a GGUF file, None for any other layer.")
_base_of = door("cpu.modules", "base_of", "The linear beneath a layer with adapters.")
_pair_of = door("cpu.modules", "pair_of", "A, B and scale of a layer's active adapters.")
_packable = door("cpu.modules", "packable", "The codes of a packed linear, None for a plain one.")


class PackedMatrices(Protocol):
    """Matrices packed before; `packed.PackedFile` is one."""

    def bytes(self, name: str) -> NDArray[np.uint8]: ...


class ArraySource(Protocol):
    """A model's tensors by Hugging Face's names; `checkpoint.native_model` makes one of a folder."""

    def parameter(self, name: str) -> NDArray[Any]:
        """A parameter that is not packed, rows in order. Raises CheckpointError where there is none."""

    def bias(self, path: str) -> NDArray[Any] | None:
        """The bias of a linear; None where it has none."""

    def packed(self, path: str) -> PackableWeight | None:
        """The packed weight of a linear; None where that is not packed."""


class CpuWeights:
    """Weights ready for `CpuRunner`; keeps alive whatever they point into."""

    def __init__(self, config: LlamaConfig, threads: int | None = None) -> None:
        self.config = config
        self.pool = make_pool(threads)
        self.rope_scale = attention_scaling(config.rope_parameters)
        self.inv_freq = inverse_frequencies(config, xp=np, dtype=np.float32)
        self.rope_by_length = type_of(config).constant_below is not None
        self.model: Any = None
        self._layers_made: list[tuple[Any, ...]] = []  # what `states` makes a second model of
        self._states: dict[bool, CpuWeights] = {}
        self._arena = native().Arena()
        self._packed: PackedMatrices | None = None
        self._beside: GgufSource | None = None  # whose packed file that is
        self._widened: set[str] = set()
        self._matrices: list[Any] = []
        self._copies: list[tuple[NDArray[np.float32], Any]] = []
        self._adapters: dict[str, Any] = {}
        self._adapted: dict[str, Any] = {}  # layers with adapters of their own, by path
        self.own: Any = None  # the native adapter that these are

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices, each counted once."""
        return sum(m.nbytes for m in self._matrices)

    @property
    def decode_bytes(self) -> int:
        """Bytes that one decoded token reads: every matrix but an embedding of its own."""
        tied = self.model_head is self.model_embed
        return self.nbytes - (0 if tied else self.model_embed.nbytes)

    def frequencies(self, length: int) -> NDArray[np.float32]:
        """RoPE frequencies for a sequence of `length`."""
        return (
            inverse_frequencies(self.config, length, xp=np, dtype=np.float32) if self.rope_by_length else self.inv_freq
        )

    @classmethod
    def from_gguf(
        cls, file: GgufSource, threads: int | None = None, packed: PackedMatrices | None = None
    ) -> "CpuWeights":
        """Weights of an opened GGUF file; `packed` (packed.find) spares the packing.

        Raises InputError for a block type without kernels (Q2_K, Q3_K), MismatchError where the tensors are not
        exactly those of the configuration.
        """
        check_coverage(file)
        self = cls(file.config, threads)
        self._packed = packed
        reader = Reader(self, file)
        embed = reader.matrix("token_embd.weight")
        head = embed if file.config.tie_word_embeddings else reader.matrix("output.weight")
        self._begin(embed, head, reader.vector("output_norm.weight"))
        for i in range(file.config.num_hidden_layers):
            parts = {ours: reader.linear(f"blk.{i}.{theirs}", ours) for ours, theirs in PARTS.items()}
            self._layer(reader.vector(f"blk.{i}.attn_norm.weight"), reader.vector(f"blk.{i}.ffn_norm.weight"), parts)
        return self

    @classmethod
    def from_arrays(cls, config: LlamaConfig, source: ArraySource, threads: int | None = None) -> "CpuWeights":
        """Weights of arrays (`stored_arrays`) float32, float16 or bfloat16, used in place, and of packed linears.

        Raises InputError for values that no kernel takes, MismatchError where shapes are not the configuration's.
        """
        self = cls(config, threads)
        embed = self._array(source.parameter(EMBEDDING), EMBEDDING)
        head = embed if config.tie_word_embeddings else self._of_arrays(source, "lm_head")
        self._begin(embed, head, to_float32(source.parameter("model.norm.weight")).copy())
        for i in range(config.num_hidden_layers):
            layer = f"model.layers.{i}"
            parts = {part: self._of_arrays(source, f"{layer}.{path}") for path, part in LINEARS.items()}
            norms = [
                to_float32(source.parameter(f"{layer}.{name}.weight")).copy()
                for name in ("input_layernorm", "post_attention_layernorm")
            ]
            self._layer(norms[0], norms[1], parts)
        return self

    def _of_arrays(self, source: ArraySource, path: str) -> Any:
        """The matrix of a linear, with its bias where it has one."""
        packed, bias = source.packed(path), source.bias(path)
        weight = f"{path}.weight"
        matrix = self._array(source.parameter(weight), weight) if packed is None else self.pack_codes(packed)
        if bias is not None:
            matrix.set_bias(to_float32(bias).copy())
        return matrix

    def _array(self, array: NDArray[Any], name: str) -> Any:
        if CODES.get(array.dtype) not in ("F32", "F16", "BF16"):
            raise InputError(
                f"{name} is {CODES.get(array.dtype, array.dtype)}; the native engine takes float32, float16 and "
                "bfloat16: use runner='torch'"
            )
        return self.view(patterns(array), bfloat16=True) if array.dtype == BFLOAT16 else self.view(array)

    @classmethod
    def from_module(cls, module: Any, threads: int | None = None) -> "CpuWeights":
        """Weights of a LlamaForCausalLM on the CPU, float32, float16 or bfloat16, used in place without a copy.

        Packed linears (GPTQ, bitsandbytes) are copied once into the kernels' layout, without losing a bit, and so are
        GGUF's blocks, whose pages of the file may then leave the memory; what `packed.write` has left beside the file
        is used instead. Q2_K and Q3_K have no kernels: they are unpacked to bfloat16, which a warning says.

        LoRA adapters on linears of the layers become the engine's, for every sequence that chooses no other.

        Later in-place changes of the linears show at once; norms, biases and adapters are copied: `refresh` copies them
        again.
        """
        self = cls(module.config, threads)
        body = module.model
        embed, head = self._blocks(body.embed_tokens, "embed_tokens"), module.lm_head
        if _base_of(head) is not head:
            raise InputError("lm_head has an adapter, which has no native kernel; use runner='torch'")
        if embed is None:
            embed = self._parameter(body.embed_tokens.weight, "embed_tokens")
            tied = head.weight is body.embed_tokens.weight
        else:
            tied = getattr(head, "tied", None) is body.embed_tokens
        head = embed if tied else self._linear(head, "lm_head")
        self._begin(embed, head, self._copied(body.norm.weight))
        for i, layer in enumerate(body.layers):
            a, f = layer.self_attn, layer.mlp
            linears = {"q": a.q_proj, "k": a.k_proj, "v": a.v_proj, "o": a.o_proj, "gate": f.gate_proj, "up": f.up_proj}
            linears["down"] = f.down_proj
            paths = {part: f"model.layers.{i}.{path}" for path, part in LINEARS.items()}
            parts = {name: self._linear(linear, paths[name]) for name, linear in linears.items()}
            norms = (self._copied(layer.input_layernorm.weight), self._copied(layer.post_attention_layernorm.weight))
            self._layer(*norms, parts)
        self._take_own()
        if self._widened:
            warnings.warn(
                f"{' and '.join(sorted(self._widened))} have no native kernel; the native engine holds these weights "
                f"in bfloat16, {self.nbytes / 1e9:.1f} GB in all",
                stacklevel=2,
            )
        return self

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that a step can choose."""
        return list(self._adapters)

    def add_adapter(self, name: str, tensors: Tensors) -> None:
        """Makes an adapter choosable by `name`: {module path: (A, B, scale)}, copied once (see cpu/adapters.py).

        Raises InputError where the name is taken or a path is no linear of a layer, MismatchError where a shape does
        not fit. A running step keeps the adapters it began with, so adding and removing need not wait for it.
        """
        if name in self._adapters:
            raise InputError(
                f"there is an adapter {name!r} already; remove_adapter({name!r}) first, or take a new name"
            )
        self._adapters[name] = make_adapter(self.model, self.config.num_hidden_layers, tensors)

    def remove_adapter(self, name: str) -> None:
        """Forgets an adapter; its memory is freed when no step uses it any more."""
        self.adapter(name)
        del self._adapters[name]

    def adapter(self, name: str) -> Any:
        """The native adapter called `name`. Raises InputError where there is none."""
        if name not in self._adapters:
            loaded = ", ".join(map(repr, self._adapters)) or "none"
            raise InputError(f"there is no adapter {name!r}; there are: {loaded}. add_adapter adds one")
        return self._adapters[name]

    def states(self, wide: bool = False) -> "CpuWeights":
        """The same weights with the identity for a head: the first hidden_size "logits" are the final hidden states.

        Matrices are shared; the head takes vocabulary x width bfloat16, made at the first call. Adapters are left out.
        wide: a head of float32, twice as large, which precision="fast" does not round states to bfloat16 for.
        """
        if wide not in self._states:
            c, twin = self.config, copy.copy(self)
            identity: Any = np.zeros((c.vocab_size, c.hidden_size), np.float32 if wide else np.uint16)
            np.fill_diagonal(identity, 1.0 if wide else 0x3F80)  # 1.0 in bfloat16
            sizes = (c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size)
            head = native().view(identity, not wide)
            twin.model = native().make_model(*sizes, c.vocab_size, c.rms_norm_eps, self.model_embed, head, self._norm)
            twin._adapters, twin.own, twin._states = {}, None, {}
            for layer in self._layers_made:
                twin.model.add_layer(*layer)
            self._states[wide] = twin
        return self._states[wide]

    def refresh(self) -> None:
        """Copies norms, biases and adapters from the module again; a change through `.data` leaves no other trace."""
        for array, tensor in self._copies:
            np.copyto(array, tensor.detach().float().numpy())
        if self._adapted:
            self._take_own()

    def _take_own(self) -> None:
        """The native adapter of what the module's own adapters hold now."""
        pairs = {path: pair for path, layer in self._adapted.items() if (pair := _pair_of(layer)) is not None}
        self.own = make_adapter(self.model, self.config.num_hidden_layers, pairs) if pairs else None

    def _copied(self, tensor: Any) -> NDArray[np.float32]:
        array: NDArray[np.float32] = tensor.detach().float().numpy().copy()
        self._copies.append((array, tensor))
        return array

    def pack(
        self, raw: NDArray[np.uint8], type_name: str, shape: tuple[int, int], rows: NDArray[np.int32] | None = None
    ) -> Any:
        """A matrix (rows, columns) from GGUF blocks; `rows` gives the file row of each row where the order differs."""
        if type_name not in PACKED_BLOCKS:
            raise InputError(
                f"no native kernel for {type_name} blocks; {', '.join(PACKED_BLOCKS)} have one (or use runner='torch')"
            )
        matrix = native().pack(self._arena, self.pool, raw.reshape(-1), PACKED_BLOCKS[type_name], *shape, rows)
        self._matrices.append(matrix)
        return matrix

    def pack_codes(self, weight: PackableWeight) -> Any:
        """A matrix from codes with their scales: a class of `quantization/packable.py`."""
        matrix = weight.pack(self._arena, self.pool)
        self._matrices.append(matrix)
        return matrix

    def place(self, matrix: BlockMatrix) -> Any:
        """A block matrix of a file: where it lies packed, or packed now."""
        if matrix.type_id not in PACKED_BLOCKS.values():
            raise InputError(
                f"tensor {matrix.name!r} is of GGUF type {matrix.type_id}, which has no native kernel; "
                "use runner='torch'"
            )
        if self._packed is not None:
            matrix_packed = native().packed_view(self._packed.bytes(matrix.name), matrix.type_id, *matrix.shape)
            self._matrices.append(matrix_packed)
            return matrix_packed
        type_name = BLOCKS[matrix.type_id].id
        matrix_packed = self.pack(matrix.raw(), type_name, matrix.shape, matrix.rows)
        matrix.release()
        return matrix_packed

    def view(self, array: NDArray[Any], bfloat16: bool = False) -> Any:
        """A float matrix in place; bfloat16 comes as its 16-bit pattern."""
        matrix = native().view(array, bfloat16)
        self._matrices.append(matrix)
        return matrix

    def _parameter(self, tensor: Any, name: str) -> Any:
        import torch

        if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(
                f"{name} is {tensor.dtype} on {tensor.device}; the native engine takes float32, float16 and bfloat16 "
                "on the CPU: convert the model with .to(), or use runner='torch'"
            )
        tensor = tensor.detach()
        if tensor.stride(-1) != 1:
            raise InputError(f"{name} has rows of stride {tensor.stride(-1)}; make it contiguous")
        if tensor.dtype == torch.bfloat16:
            return self.view(tensor.view(torch.uint16).numpy(), bfloat16=True)
        return self.view(tensor.numpy())

    def _blocks(self, layer: Any, name: str) -> Any:
        """The matrix of a layer of GGUF's blocks; None for any other layer."""
        blocks = _blocks_of(layer)
        if blocks is None:
            return None
        if (floats := blocks.floats) is not None:
            return self._parameter(floats, name)
        if blocks.kind not in PACKED_BLOCKS:
            return self._widen(layer, blocks.kind, name)
        if blocks.file is None:
            return self.pack(blocks.rows.contiguous().numpy(), blocks.kind, blocks.shape, blocks.order)
        if self._beside is not blocks.file.source:
            self._beside = blocks.file.source
            self._packed = find(self._beside)
        return self.place(blocks.file)

    def _widen(self, layer: Any, kind: str, name: str) -> Any:
        """A packed layer that no layout holds, in bfloat16."""
        import torch

        self._widened.add(kind)
        return self._parameter(layer.dequantize(torch.bfloat16), name)

    def _linear(self, layer: Any, name: str) -> Any:
        try:
            linear = _base_of(layer)
            matrix = self._blocks(linear, name)
            packed = _packable(linear) if matrix is None else None
            if matrix is None and packed is None and hasattr(linear, "dequantize"):
                matrix = self._widen(linear, linear.format_name, name)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if linear is not layer:
            self._adapted[name] = layer
        if matrix is None:
            matrix = self._parameter(linear.weight, name) if packed is None else self.pack_codes(packed)
        if linear.bias is not None:
            matrix.set_bias(self._copied(linear.bias))
        return matrix

    def _begin(self, embed: Any, head: Any, norm: NDArray[np.float32]) -> None:
        c = self.config
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        sizes = (c.hidden_size, heads, kv_heads, c.head_dim, c.intermediate_size, c.vocab_size)
        self.model_embed, self.model_head, self._norm = embed, head, norm
        try:
            self.model = native().make_model(*sizes, c.rms_norm_eps, embed, head, norm)
        except ValueError as error:
            raise MismatchError(f"the weights do not fit the configuration: {error}") from error

    def _layer(self, norm1: NDArray[np.float32], norm2: NDArray[np.float32], p: dict[str, Any]) -> None:
        try:
            layer = (norm1, p["q"], p["k"], p["v"], p["o"], norm2, p["gate"], p["up"], p["down"])
            self.model.add_layer(*layer)
            self._layers_made.append(layer)
        except ValueError as error:
            raise MismatchError(f"layer {self.model.layers} does not fit the configuration: {error}") from error
