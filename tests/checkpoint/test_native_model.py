"""Folders on the native engine without torch: the same weights, so the same logits bit for bit, as by torch."""

import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint.meta_model import random_weights, shard
from checkpoint.packers import FORMATS, write
from tiny import VARIANTS, tiny_model

from llama2 import BitsAndBytesConfig, GPTQConfig, LlamaForCausalLM, cpu
from llama2.checkpoint import array_pickle
from llama2.checkpoint.native_files import NativeFiles, open_native
from llama2.checkpoint.pickle_check import MAX_ENTRIES
from llama2.errors import CheckpointError, InputError, Llama2Error, MismatchError, MissingDependencyError
from llama2.stored_arrays import BFLOAT16, converted, to_float32

IDS = list(range(1, 13))


def logits(weights: cpu.CpuWeights, precision: str = "exact") -> np.ndarray:
    """Of every token."""
    cache = cpu.PagedCache(weights, 64, "float32")
    view = cache.view([(cache.sequence(), len(IDS))])
    places = np.arange(len(IDS))
    return cpu.CpuRunner(weights, precision).step(IDS, places, view, np.arange(len(IDS)))


def same(folder: Path, **given: Any) -> cpu.CpuModel:
    """The model without torch; its logits are those of the engine over torch's module."""
    found = open_native(folder)
    model = LlamaForCausalLM.from_pretrained(folder, **given)
    for precision in ("exact", "fast"):
        wanted = logits(cpu.CpuWeights.from_module(model), precision)
        np.testing.assert_array_equal(logits(found.weights, precision), wanted)
    assert found.generation_config.to_dict() == model.generation_config.to_dict()
    told = ("dtype", "torch_dtype", "_name_or_path")
    ours, theirs = ({k: v for k, v in m.config.to_dict().items() if k not in told} for m in (found, model))
    assert ours == theirs
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_safetensors(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_model(dtype, **VARIANTS[variant]).save_pretrained(tmp_path)
    found = same(tmp_path)
    assert found.cache_dtype == ("float32" if dtype == torch.float32 else "bfloat16")


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("named", ["float32", "float16", "bfloat16"])
def test_what_config_json_names_is_what_runs(stored: torch.dtype, named: str, tmp_path: Path) -> None:
    tiny_model(stored).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "dtype": named, "torch_dtype": named}))
    same(tmp_path)


def test_shards_and_bin_files(tmp_path: Path) -> None:
    model = tiny_model(torch.bfloat16)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    same(tmp_path / "shards")
    model.save_pretrained(tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    state = model.state_dict()
    torch.save({"model": state, "step": 3}, tmp_path / "bin" / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="holds the weights in model"):
        wanted = logits(same(tmp_path / "bin").weights)
    turned = OrderedDict((name, t.T.contiguous().T if t.dim() == 2 else t) for name, t in state.items())  # strides
    torch.save(turned, tmp_path / "bin" / "pytorch_model.bin")
    np.testing.assert_array_equal(logits(open_native(tmp_path / "bin").weights), wanted)


@pytest.mark.parametrize("config", [
    GPTQConfig(group_size=32), GPTQConfig(bits=3, group_size=32), GPTQConfig(bits=8, group_size=-1),
    GPTQConfig(group_size=64, format="gptq_v2", sym=False), BitsAndBytesConfig(load_in_8bit=True),
    BitsAndBytesConfig(load_in_4bit=True), BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                              bnb_4bit_use_double_quant=True),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_packed_by_this_library(config: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 16}
    tiny_model(dtype, **sizes).save_pretrained(tmp_path / "plain")
    packed = LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    packed.save_pretrained(tmp_path / "packed")
    same(tmp_path / "packed")


@pytest.mark.parametrize("kind", FORMATS)
def test_packed_by_others(kind: str, tmp_path: Path) -> None:
    write(kind, tmp_path)
    if NativeFiles(tmp_path).reason:
        with pytest.raises(InputError, match="is packed as"):
            open_native(tmp_path)
    else:
        same(tmp_path)


def test_which_formats_run_without_torch(tmp_path: Path) -> None:
    reasons = {}
    for kind in FORMATS:
        write(kind, tmp_path / kind)
        reasons[kind] = NativeFiles(tmp_path / kind).reason
    assert not any(reasons[kind] for kind in FORMATS if "awq" in kind)
    assert all("is packed as" in reason for kind, reason in reasons.items() if "awq" not in kind), reasons


@pytest.mark.parametrize(("shards", "axis"), [(1, 1), (2, 1), (2, 0)])
def test_metas_files(shards: int, axis: int, tmp_path: Path) -> None:
    params = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32, "norm_eps": 1e-5,
              "vocab_size": -1}  # fmt: skip
    weights = random_weights({**params, "vocab_size": 96}, 192, torch.bfloat16)
    for i, part in enumerate(shard(weights, shards, axis)):
        torch.save(part, tmp_path / f"consolidated.{i:02d}.pth")
    (tmp_path / "params.json").write_text(json.dumps(params))
    same(tmp_path)


def test_no_torch_is_imported(tmp_path: Path) -> None:
    tiny_model(torch.bfloat16).save_pretrained(tmp_path)
    code = f"""
import sys
sys.modules["torch"] = None
from llama2.checkpoint.native_files import open_native
print(open_native({str(tmp_path)!r}).weights.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and int(done.stdout) > 0, done.stderr[-2000:]


# -- refused ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_as_by_torch(tmp_path: Path) -> None:
    tiny_model(torch.float32).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for change, error, text in (
        ({"num_hidden_layers": 3}, MismatchError, "missing: model.layers.2"),
        ({"hidden_act": "gelu"}, InputError, "hidden_act is 'gelu'"),
        ({"pretraining_tp": 2}, InputError, "pretraining_tp"),
        ({"dtype": "float64", "torch_dtype": "float64"}, InputError, "float64"),
        ({"tie_word_embeddings": True}, MismatchError, "ties"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}, CheckpointError, "no linear"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(fields | change))
        with pytest.raises(error, match=text):
            open_native(tmp_path)


def test_a_damaged_packed_layer_is_named(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 16}
    tiny_model(torch.float16, **sizes).save_pretrained(tmp_path / "plain")
    packed = LlamaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=GPTQConfig(group_size=32))
    packed.save_pretrained(tmp_path / "packed")
    fields = json.loads((tmp_path / "packed" / "config.json").read_text())
    fields["quantization_config"]["group_size"] = 64
    (tmp_path / "packed" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj: qzeros is torch.int32"):
        open_native(tmp_path / "packed")


# -- pickles ---------------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def archive(content: bytes, path: Path, data: bytes = b"\0" * 64, compress: bool = False) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data/0", data)
        file.writestr("archive/version", "3\n")
    return path


def tensor(shape: tuple[int, ...], strides: tuple[int, ...], first: int = 0, elements: int = 16) -> bytes:
    """The pickle of {"w": a tensor that says so of storage 0}, written opcode by opcode."""

    def number(n: int) -> bytes:
        return b"J" + n.to_bytes(4, "little", signed=True)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0" + b"0X\x03\0\0\0cpu" + number(elements) + b"tQ"
    said = b"(" + storage + number(first) + numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)Rt"
    return b"\x80\x02}X\x01\0\0\0wctorch._utils\n_rebuild_tensor_v2\n" + said + b"Rs."


def test_a_tensor_written_by_hand_is_read(tmp_path: Path) -> None:
    values = np.arange(16, dtype=np.float32)
    path = archive(tensor((2, 3), (1, 4), 2), tmp_path / "x.bin", values.tobytes())
    np.testing.assert_array_equal(array_pickle.load(path)["w"], [[2, 6, 10], [3, 7, 11]])
    np.testing.assert_array_equal(torch.load(path)["w"].numpy(), array_pickle.load(path)["w"])


@pytest.mark.parametrize("content", [
    tensor((17,), (1,)), tensor((4,), (6,)), tensor((16,), (1,), 1), tensor((-1,), (1,)), tensor((2,), (-1,), 4),
    tensor((2**20,), (0,)), tensor((4, 4), (4,)), tensor((1,) * 17, (1,) * 17), tensor((4,), (1,), -1),
])  # fmt: skip
def test_tensors_beyond_their_bytes_are_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        array_pickle.load(archive(content, tmp_path / "x.bin"))


def test_programs_are_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    contents = [pickle.dumps({"w": Evil()}, protocol=2), b"cos\nsystem\n(S'true'\ntR.", b"\x80\x02cbuiltins\neval\n.",
                b"\x80\x04\x8c\x02os\x8c\x06system\x93.", b"\x80\x02ctorch\nload\n."]  # fmt: skip
    for content in contents:
        with pytest.raises(CheckpointError, match="run code"):
            array_pickle.load(archive(content, tmp_path / "x.bin"))
    assert capsys.readouterr().out == ""


def test_tricks_with_known_names_are_refused(tmp_path: Path) -> None:
    """A state put into a tensor; a memo of billions of entries; a storage called as a function; bytes that are none."""
    state = tensor((4,), (1,)).removesuffix(b"s.") + b"}X\x04\0\0\0saidK\x01sbs."
    memo = b"\x80\x02}r\xff\xff\xff\xff" + b"s."
    called = b"\x80\x02ctorch\nFloatStorage\n(K\x05tR."
    encoded = b"\x80\x02c_codecs\nencode\n(X\x01\0\0\0aX\x04\0\0\0zliptR."
    nested = b"\x80\x02" + b"]" * 3000 + b"a" * 2999 + b"."
    for content in (state, memo, called, encoded, nested):
        with pytest.raises(Llama2Error):
            found = array_pickle.load(archive(content, tmp_path / "x.bin"))
            raise AssertionError(found)


def test_foreign_archives(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="compressed"):
        array_pickle.load(archive(tensor((4,), (1,)), tmp_path / "a.bin", compress=True))
    torch.save({"w": torch.zeros(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(MissingDependencyError, match=r"before 1\.6.*llama2\[torch\]"):
        array_pickle.load(tmp_path / "old.bin")
    (tmp_path / "page.bin").write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="HTML"):
        array_pickle.load(tmp_path / "page.bin")
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(3, dtype=torch.complex64)}, buffer)
    (tmp_path / "complex.bin").write_bytes(buffer.getvalue())
    with pytest.raises(CheckpointError):
        array_pickle.load(tmp_path / "complex.bin")
    assert MAX_ENTRIES > 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool,
                                   torch.float8_e4m3fn, torch.uint16])  # fmt: skip
def test_every_type_comes_through(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(24).to(dtype).view(4, 6)
    torch.save({"a": values, "b": torch.nn.Parameter(values[1:3, 2:], False), "c": {"d": [values.T]}, "e": 5},
               tmp_path / "x.bin")  # fmt: skip
    found = array_pickle.load(tmp_path / "x.bin")
    for array, wanted in ((found["a"], values), (found["b"], values[1:3, 2:]), (found["c"]["d"][0], values.T)):
        bits = wanted.contiguous().view(torch.uint8).numpy()
        np.testing.assert_array_equal(np.ascontiguousarray(array).view(np.uint8).reshape(bits.shape), bits)
    assert found["e"] == 5


def test_rounding_is_torchs() -> None:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2**32, 200_000, dtype=np.uint32)
    values = np.concatenate((bits.view(np.float32), np.float32([0, -0.0, np.inf, -np.inf, 3.4e38, 1e-45])))
    wanted = torch.from_numpy(values).to(torch.bfloat16)
    found = converted(values, "BF16")
    finite = ~np.isnan(values)
    np.testing.assert_array_equal(found.view(np.uint16)[finite], wanted.view(torch.uint16).numpy()[finite])
    assert np.isnan(to_float32(found)[~finite]).all()
    np.testing.assert_array_equal(converted(values, "F16")[finite], torch.from_numpy(values).half().numpy()[finite])
    assert found.dtype == BFLOAT16 and converted(found, "F32").dtype == np.float32
    with pytest.raises(InputError):
        converted(np.arange(3), "BF16")
