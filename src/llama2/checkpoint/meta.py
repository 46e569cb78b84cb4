"""Meta's original files: consolidated.NN.pth, one per model-parallel rank, beside params.json.

Shards divide each matrix along one axis (`names.META`); q and k rows come in rotary pairs. The files are mapped and
tensors assembled when they are read, so that opening costs nothing however large the model is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llama2.architecture import EMBEDDING, HEAD, parameter_shapes
from llama2.checkpoint import Checkpoint, RawTensor, Stored, read_generation, read_json
from llama2.checkpoint.directory import found
from llama2.checkpoint.hf import load_bin
from llama2.checkpoint.names import meta_axis, meta_to_hf, rotated_heads, to_half_split
from llama2.checkpoint.tensor_library import TensorLibrary
from llama2.checkpoint.unwrap import without_wrappers
from llama2.config import LlamaConfig
from llama2.coverage import cover, is_table
from llama2.errors import CheckpointError, MismatchError
from llama2.lazy import door
from llama2.schema import FLAG, Schema, check, maybe, real, whole
from llama2.stored_arrays import DTYPES, NAMES
from llama2.tokenizer.reading import beside

_torch = door("checkpoint.torch_tensors", "library", "The operations on torch's tensors.")
_raw = door("checkpoint.torch_tensors", "raw", "A tensor of torch as engines take it.")
# What Meta's params.json cannot say (context, special ids, tied head) is kept beside it by our writer.
SIDECAR = "huggingface_config.json"
_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
_LLAMA3_VOCABULARY = 128256


class MetaCheckpoint(Checkpoint):
    """A folder with params.json and consolidated.*.pth. Shapes and shards are checked against params.json at once."""

    format = "meta"

    def __init__(self, path: Path, library: TensorLibrary | None = None) -> None:
        """library: whose tensors these are; None for torch's."""
        self.path, self.library = path, library or _torch()
        self.params = read_params(path / "params.json")
        self.files = find_shards(path)
        _check_order(self.files)
        self._shards = [_translated(file, load_bin(file, library=self.library), self.library) for file in self.files]
        _same_names(self.files, self._shards)
        self.config  # noqa: B018 - heads and widths are checked before any tensor is placed
        self._places = self._place_all()

    @cached_property
    def config(self) -> LlamaConfig:
        first = "model.layers.0.mlp.gate_proj.weight"
        for name in ("model.embed_tokens.weight", "model.norm.weight", first):
            if name not in self._shards[0]:
                raise CheckpointError(f"{self.files[0]} has no tensor for {name}; fetch the checkpoint again")
        embedding = [shard["model.embed_tokens.weight"].shape for shard in self._shards]
        dim = _whole(self.params, "dim", self.path)
        by_rows = len(embedding) > 1 and embedding[0][-1] == dim
        config = config_from(
            self.params,
            self.path,
            vocab_size=sum(shape[0] for shape in embedding) if by_rows else embedding[0][0],
            intermediate_size=sum(shard[first].shape[0] for shard in self._shards),
            tied="lm_head.weight" not in self._shards[0],
        )
        sidecar = self.path / SIDECAR
        return _with_sidecar(config, sidecar) if sidecar.exists() else config

    def _place_all(self) -> dict[str, "_Place"]:
        expected, tied = parameter_shapes(self.config), self.config.tie_word_embeddings
        stored = {name: Stored(expected.get(name, tuple(t.shape)), "") for name, t in self._shards[0].items()}
        cover(expected, stored, same={HEAD: EMBEDDING} if tied else {}).refuse(str(self.path))
        return {
            name: self._place(name, expected[name])
            for name in expected
            if name in self._shards[0] and not (name == HEAD and tied)
        }

    def _place(self, name: str, shape: tuple[int, ...]) -> "_Place":
        parts = tuple(shard[name] for shard in self._shards)
        if len({part.dtype for part in parts}) > 1:
            raise MismatchError(f"{self.path}: the shards of {name} differ in dtype; fetch them again")
        shapes = [tuple(part.shape) for part in parts]
        axis = meta_axis(name)
        if axis is None or len(parts) == 1:
            if all(one == shape for one in shapes):
                return _Place(self.library, parts[:1], None, shape)
            raise self._misfit(name, shapes, shape)
        # Llama 3 divides the embedding along the vocabulary, Llama 2 along the width.
        axes = (1, 0) if name == "model.embed_tokens.weight" else (axis,)
        for axis in axes:
            if all(len(one) == 2 and one[1 - axis] == shape[1 - axis] for one in shapes):
                if sum(one[axis] for one in shapes) == shape[axis]:
                    return _Place(self.library, parts, axis, shape)
                if name.endswith(("k_proj.weight", "v_proj.weight")):
                    return self._replicated(name, parts, shape)
        raise self._misfit(name, shapes, shape)

    def _replicated(self, name: str, parts: tuple[Any, ...], shape: tuple[int, ...]) -> "_Place":
        """Key and value heads that several ranks hold in common, because there are more ranks than heads."""
        kv_heads, width = self.config.num_key_value_heads, self.config.head_dim
        copies = len(parts) // kv_heads
        if copies * kv_heads != len(parts) or any(part.shape[0] != width for part in parts):
            raise self._misfit(name, [tuple(part.shape) for part in parts], shape)
        for i, part in enumerate(parts):
            if not self.library.equal(part, parts[i - i % copies]):
                raise MismatchError(f"{self.path}: shards {i - i % copies} and {i} differ in {name}; fetch them again")
        return _Place(self.library, parts[::copies], 0, shape)

    def _misfit(self, name: str, found: list[tuple[int, ...]], shape: tuple[int, ...]) -> MismatchError:
        shown = ", ".join(map(str, dict.fromkeys(found)))
        return MismatchError(
            f"{self.path}: {name} is {shown} in {len(found)} shard(s), but params.json makes it {shape}; "
            "a shard is missing, or params.json belongs to another model"
        )

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        return {name: Stored(placed.shape, self.library.code(placed.parts[0])) for name, placed in self._places.items()}

    @property
    def generation_settings(self) -> dict[str, Any] | None:
        return read_generation(self.path)

    @property
    def tokenizer_source(self) -> Path:
        """The folder with tokenizer.model: this one, or the one above it, where Meta's download script puts it."""
        return beside(self.path)

    @cached_property
    def auto_dtype(self) -> str:
        code = self.library.code(self._places["model.embed_tokens.weight"].parts[0])
        return NAMES.get(code, code)

    def read(self, name: str, dtype: Any = None) -> Any:
        tensor = self.read_rows(name, 0, self._places[name].shape[0])
        return tensor if dtype is None else self.library.converted(tensor, dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Any:
        placed, config = self._places[name], self.config
        stop = min(stop, placed.shape[0])
        if rotated_heads(name, config.num_attention_heads, config.num_key_value_heads) is None:
            return placed.rows(start, stop)
        width = config.head_dim
        low, high = start // width * width, -(-stop // width) * width  # RoPE reorders whole heads
        return to_half_split(placed.rows(low, high), (high - low) // width)[start - low : stop - low]

    def mapped(self, name: str) -> list[Any]:
        return list(self._places[name].parts)

    def raw(self, name: str) -> RawTensor:
        raw_tensor: RawTensor = _raw(self.read(name))
        return raw_tensor


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: its parts in rank order and the axis that joins them."""

    library: TensorLibrary
    parts: tuple[Any, ...]
    axis: int | None
    shape: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Any:
        if len(self.parts) == 1:
            return self.parts[0][start:stop]
        if self.axis == 1:
            return self.library.joined([shard[start:stop] for shard in self.parts], 1)
        pieces, first = [], 0
        for shard in self.parts:
            low, high = max(start - first, 0), min(stop - first, len(shard))
            if low < high:
                pieces.append(shard[low:high])
            first += len(shard)
        return pieces[0] if len(pieces) == 1 else self.library.joined(pieces, 0)


# -- files -------------------------------------------------------------------------------------------------------


def find_shards(folder: Path) -> list[Path]:
    """consolidated.00.pth and on, in rank order. Raises CheckpointError where there is none, or a number is skipped."""
    numbered = {int(match[1]): file for file in folder.iterdir() if (match := _SHARD.fullmatch(file.name))}
    if not numbered:
        raise CheckpointError(f"{folder} holds no consolidated.*.pth; give the folder that Meta's download made")
    if gaps := sorted(set(range(max(numbered) + 1)) - set(numbered)):
        raise CheckpointError(
            f"{folder} holds consolidated.*.pth up to number {max(numbered)}, but number {gaps[0]} is missing; "
            "fetch it again"
        )
    return [numbered[i] for i in sorted(numbered)]


def _check_order(files: list[Path]) -> None:
    """torch.save names the folder inside a .pth after the file: shards that were renamed or copied are told by it."""
    for file in files if len(files) > 1 else []:
        with found(file) as opened:
            head = opened.read(64)
        match = re.match(rb"(consolidated\.\d+)/", head[30:]) if head[:2] == b"PK" else None
        if match is not None and match[1].decode() != file.stem:
            raise MismatchError(
                f"{file} was saved as {match[1].decode()}.pth; its place among the shards is lost. Give each file its "
                "name back, or fetch them again"
            )


def _translated(file: Path, shard: Mapping[str, Any], library: TensorLibrary) -> dict[str, Any]:
    names = {}
    for name, tensor in without_wrappers(shard, file).items():
        if is_table(name):
            continue
        ours = meta_to_hf(name)
        if ours is None:
            raise CheckpointError(
                f"{file}: the tensor {name!r} {tuple(tensor.shape)} belongs to no Llama model of Meta's; "
                "give the original checkpoint"
            )
        if not library.is_float(tensor) or library.code(tensor) not in DTYPES:
            raise CheckpointError(f"{file}: {name!r} is {tensor.dtype}; weights are floating-point numbers")
        names[ours] = tensor
    if not names:
        raise CheckpointError(f"{file} holds no tensor; fetch it again")
    return names


def _same_names(files: list[Path], shards: list[dict[str, Any]]) -> None:
    for file, shard in zip(files, shards, strict=True):
        if differing := sorted(set(shard) ^ set(shards[0])):
            raise CheckpointError(
                f"{file.name} and {files[0].name} hold different tensors ({differing[0]}, {len(differing)} in all); "
                "the shards do not belong together"
            )


# What params.json says of Meta's own quantised files, whose weights mean something else than floats.
_QUANTISED = {
    "quantization_args": "Meta's quantised ones (SpinQuant, whose w2 needs a Hadamard transform, QLoRA or FP8)",
    "lora_args": "those of QLoRA with an adapter on top",
}

# -- params.json -------------------------------------------------------------------------------------------------


def read_params(path: Path) -> dict[str, Any]:
    """The content of params.json; some releases nest it under "model"."""
    params = read_json(path)
    inner = params.get("model")
    params = inner if isinstance(inner, dict) else params
    check(params, _SCHEMA, path)
    for key, what in _QUANTISED.items():
        if params.get(key):
            raise CheckpointError(
                f"{path}: {key} is set, so the weights are {what}, which are not read; fetch the model in bfloat16, or "
                "as GGUF"
            )
    return params


_SIZE = maybe(whole(1, 2**24))
_SCHEMA: Schema = {
    **dict.fromkeys(("dim", "n_heads", "n_kv_heads", "n_layers", "multiple_of"), _SIZE),
    "vocab_size": maybe(whole(-1, 2**24)),
    "max_seq_len": maybe(whole(1, 2**31 - 1)),
    **dict.fromkeys(
        ("ffn_dim_multiplier", "rope_theta", "rope_scaling_factor", "high_freq_factor"), maybe(real(0, 1e12))
    ),
    "norm_eps": real(0, 1),
    "use_scaled_rope": maybe(FLAG),
}


def _whole(params: Mapping[str, Any], key: str, where: Path, default: int | None = None) -> int:
    value = params.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{where}/params.json: {key} is {value!r}; a whole number of at least 1 is needed")
    return value


def intermediate_size(dim: int, multiple_of: int, ffn_dim_multiplier: float | None) -> int:
    """Meta's rule: two thirds of 4 * dim, times the multiplier, rounded up to a multiple."""
    hidden = int(8 * dim / 3)
    if ffn_dim_multiplier is not None:
        hidden = int(ffn_dim_multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of


def config_from(
    params: Mapping[str, Any], where: Path, *, vocab_size: int, intermediate_size: int, tied: bool
) -> LlamaConfig:
    """The configuration behind params.json and the sizes found in the tensors, which win where params.json is silent.

    Raises CheckpointError for missing keys and MismatchError where both speak and disagree.
    """
    dim, heads = _whole(params, "dim", where), _whole(params, "n_heads", where)
    stated = params.get("vocab_size", -1)
    if stated != -1 and stated != vocab_size:
        raise MismatchError(
            f"{where}: the embedding has {vocab_size} rows and params.json says {stated}; a shard is missing, or the "
            "files do not belong together"
        )
    _check_feed_forward(params, where, dim, intermediate_size)
    theta, scaling = float(params.get("rope_theta") or 10000.0), _scaling(params)
    llama3 = vocab_size >= _LLAMA3_VOCABULARY
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        intermediate_size=intermediate_size,
        num_hidden_layers=_whole(params, "n_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=_whole(params, "n_kv_heads", where, heads),
        rms_norm_eps=float(params.get("norm_eps", 1e-5)),
        max_position_embeddings=_context(params, theta, scaling, llama3),
        rope_theta=theta,
        rope_scaling=scaling,
        bos_token_id=128000 if llama3 else 1,
        eos_token_id=128001 if llama3 else 2,
        tie_word_embeddings=tied,
        architectures=["LlamaForCausalLM"],
    )


def config_of_params(folder: Path) -> LlamaConfig:
    """The configuration that params.json means where no tensors are there to say what it leaves out: the vocabulary is
    then Llama 2's."""
    params = read_params(folder / "params.json")
    stated = params.get("vocab_size", -1)
    size = 32000 if stated == -1 else _whole(params, "vocab_size", folder)
    multiple_of = _whole(params, "multiple_of", folder, 256)
    inner = intermediate_size(_whole(params, "dim", folder), multiple_of, params.get("ffn_dim_multiplier"))
    return config_from(params, folder, vocab_size=size, intermediate_size=inner, tied=False)


def _check_feed_forward(params: Mapping[str, Any], where: Path, dim: int, found: int) -> None:
    if params.get("multiple_of") is None:
        return
    expected = intermediate_size(dim, _whole(params, "multiple_of", where), params.get("ffn_dim_multiplier"))
    if expected != found:
        raise MismatchError(
            f"{where}: the shards hold {found} feed-forward rows together, but params.json makes them {expected}; "
            "a shard is missing, or params.json belongs to another model"
        )


def _scaling(params: Mapping[str, Any]) -> dict[str, Any] | None:
    if not params.get("use_scaled_rope"):
        return None
    return {
        "rope_type": "llama3",
        "factor": float(params.get("rope_scaling_factor") or 8.0),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(params.get("high_freq_factor") or 4.0),
        "original_max_position_embeddings": 8192,
    }


def _context(params: Mapping[str, Any], theta: float, scaling: dict[str, Any] | None, llama3: bool) -> int:
    """The trained context, which params.json seldom states. Llama 1 is told from Llama 2 by its eps of 1e-6."""
    if isinstance(stated := params.get("max_seq_len"), int):
        return stated
    if scaling is not None:
        return 131072
    if llama3:
        return 8192
    if theta > 10000:
        return 16384  # Code Llama
    return 2048 if params.get("norm_eps") == 1e-6 else 4096


def _with_sidecar(config: LlamaConfig, sidecar: Path) -> LlamaConfig:
    """The configuration that our writer kept, where it describes the same sizes."""
    full = LlamaConfig.from_dict(read_json(sidecar))
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
    ):
        here, stored = getattr(config, key), getattr(full, key)
        if here != stored:
            raise MismatchError(f"{sidecar} says {key} {stored}, but params.json and the tensors say {here}; delete it")
    return full
