"""Folders and files as transformers writes them: reading, refusing, saving, loading."""

import json
import struct
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llama2.checkpoint as checkpoint
from llama2.checkpoint.hf import find_files, map_safetensors
from llama2.checkpoint.parallel_read import in_single_threads
from llama2.checkpoint.save import parse_size, plan_shards, save_pretrained, shard_names
from llama2.classifiers import LlamaForSequenceClassification
from llama2.config import LlamaConfig
from llama2.errors import CheckpointError, InputError, MismatchError
from llama2.model import LlamaForCausalLM, LlamaModel

TINY = {
    "vocab_size": 41,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def make(cls: Callable[..., Any] = LlamaForCausalLM, **fields: Any) -> Any:
    torch.manual_seed(1)
    return cls(LlamaConfig(**TINY, **fields)).eval()


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


def edit(folder: Path, **fields: Any) -> None:
    """Changes config.json; None removes the key."""
    content = json.loads((folder / "config.json").read_text())
    for key, value in fields.items():
        content.pop(key, None)
        if value is not None:
            content[key] = value
    (folder / "config.json").write_text(json.dumps(content))


def safetensors(header: Any, data: bytes = b"", pad: bool = True) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8 if pad else 0)
    return struct.pack("<Q", len(text)) + text + data


# -- safetensors -------------------------------------------------------------------------------------------------


def test_hand_written_safetensors(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]},
        "empty": {"dtype": "F16", "shape": [0, 3], "data_offsets": [12, 12]},
        "scalar": {"dtype": "I64", "shape": [], "data_offsets": [12, 20]},
    }
    data = struct.pack("<2f", 1.5, -2) + b"\x80\x3f\x00\xc0" + struct.pack("<q", -7)
    for pad in (True, False):  # unpadded: tensors lie on odd addresses
        (tmp_path / "x").write_bytes(safetensors(header, data, pad))
        tensors = map_safetensors(tmp_path / "x")
        assert tensors["a"].tolist() == [[1.5], [-2.0]]
        assert tensors["b"].tolist() == [1.0, -2.0]
        assert tensors["empty"].shape == (0, 3)
        assert tensors["scalar"].item() == -7
        assert all(t.data_ptr() % t.element_size() == 0 for t in tensors.values())
    assert len(json.dumps(header)) % 4 != 0  # else the unpadded file would prove nothing


def test_training_in_place_leaves_the_file_alone(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x08", "header of 8 bytes does not fit its 1 bytes"),
        (struct.pack("<Q", 2**62) + b"{}", "does not fit its 10 bytes"),
        (safetensors(b"{nonsense"), "malformed safetensors header"),
        (safetensors(b"[" * 100_000), "malformed safetensors header"),
        (safetensors([1]), "a JSON list"),
        (safetensors({"a": 5}), "entry of tensor 'a' is malformed"),
        (safetensors({"a": {**ENTRY, "dtype": "Q9"}}, bytes(8)), "dtype 'Q9'"),
        (safetensors({"a": {**ENTRY, "shape": [-2]}}, bytes(8)), "each a whole number from 0"),
        (safetensors({"a": {**ENTRY, "shape": [2.0]}}, bytes(8)), "each a whole number from 0"),
        (safetensors({"a": {**ENTRY, "shape": [3]}}, bytes(8)), "needs 12 bytes, its offsets span 8"),
        (safetensors({"a": {**ENTRY, "shape": [2**62]}}, bytes(8)), "offsets span 8"),
        (safetensors({"a": ENTRY}, bytes(7)), "is truncated: its tensors take 8 bytes, the file holds 7"),
        (safetensors({"a": ENTRY}, bytes(9)), "is malformed: its tensors take 8"),
        (safetensors({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, bytes(12)), "'b' starts at byte 4"),
        (safetensors({"a": {**ENTRY, "data_offsets": [8, 16]}}, bytes(16)), "'a' starts at byte 8"),
    ],
)
def test_malformed_safetensors(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        map_safetensors(tmp_path / "x")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("saved")
    make().save_pretrained(folder)
    return folder


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_truncation_anywhere_is_our_error(tmp_path_factory: Any, saved: Path, data: st.DataObject) -> None:
    whole = (saved / "model.safetensors").read_bytes()
    cut = data.draw(st.one_of(st.integers(0, 4000), st.integers(0, len(whole) - 1)))
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    path.write_bytes(whole[:cut])
    with pytest.raises(CheckpointError):
        map_safetensors(path)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_truncated_bin_is_our_error(tmp_path_factory: Any, cut: int) -> None:
    folder = tmp_path_factory.mktemp("bin")
    torch.save({"a": torch.zeros(600)}, folder / "whole")
    whole = (folder / "whole").read_bytes()
    (folder / "x").write_bytes(whole[: min(cut, len(whole) - 1)])
    with pytest.raises(CheckpointError):
        checkpoint.open(folder / "x").tensors  # noqa: B018


# -- saving and loading back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["5GB", 9000])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path: Path, safe: bool, size: Any, tied: bool, dtype: torch.dtype) -> None:
    model = make(tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path, safe_serialization=safe, max_shard_size=size)
    files = sorted(p.name for p in tmp_path.iterdir())
    stem, suffix = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    if size == "5GB":
        assert files == sorted(["config.json", "generation_config.json", f"{stem}.{suffix}"])
    else:
        index = json.loads((tmp_path / f"{stem}.{suffix}.index.json").read_text())
        assert index["metadata"]["total_size"] == model.num_parameters() * dtype.itemsize
        assert ("lm_head.weight" in index["weight_map"]) is not tied
        assert len(set(index["weight_map"].values())) == len(files) - 3 > 2
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    same(model, loaded)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    assert loaded.config.architectures == ["LlamaForCausalLM"] and loaded.config.name_or_path == str(tmp_path)
    ids = torch.arange(10)[None]
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())


def test_saving_over_the_mapped_file(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(tmp_path)
    same(model, LlamaForCausalLM.from_pretrained(tmp_path))
    assert not list(tmp_path.glob(".*"))


def test_stale_shards_are_removed_and_other_files_kept(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"mine")
    (tmp_path / "model.fp16.safetensors").write_bytes(b"another variant")
    make().save_pretrained(tmp_path, max_shard_size=9000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    make().save_pretrained(tmp_path)
    kept = ["config.json", "generation_config.json", "model.fp16.safetensors", "model.safetensors", "training_args.bin"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
    make().save_pretrained(tmp_path, max_shard_size=9000)
    assert not (tmp_path / "model.safetensors").exists()
    same(make(), LlamaForCausalLM.from_pretrained(tmp_path))


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(file: Any, tensors: Any) -> None:
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr("llama2.checkpoint.save.write_safetensors", full)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(make(initializer_range=0.5), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_variant(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path, variant="fp16", max_shard_size=9000)
    assert (tmp_path / "model.safetensors.index.fp16.json").exists()
    assert list(tmp_path.glob("model.fp16-00001-of-*.safetensors"))
    same(model, LlamaForCausalLM.from_pretrained(tmp_path, variant="fp16"))
    with pytest.raises(CheckpointError, match=r"holds none of model.safetensors, .*it holds model.fp16-00001"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="variant is '../x'"):
        model.save_pretrained(tmp_path, variant="../x")


def test_other_processes_and_bad_targets(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        make().save_pretrained(tmp_path / "file")
    with pytest.raises(InputError, match="meta device"), torch.device("meta"):
        make().save_pretrained(tmp_path / "meta")


def test_an_inconsistent_generation_config_is_saved_with_a_warning(tmp_path: Path) -> None:
    model = make()
    model.generation_config.temperature, model.generation_config.do_sample = 0.9, False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.9


def test_a_given_state_dict_is_saved(tmp_path: Path) -> None:
    model = make()
    zeros = {name: torch.zeros_like(t) for name, t in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=zeros)
    assert all(not p.any() for p in LlamaForCausalLM.from_pretrained(tmp_path).parameters())


@pytest.mark.parametrize(
    ("size", "count"),
    [(7, 7), ("7", 7), ("7B", 7), ("2KB", 2000), ("2KiB", 2048), ("1.5MB", 1_500_000), ("5gb", 5 * 10**9)],
)
def test_sizes(size: Any, count: int) -> None:
    assert parse_size(size) == count


@pytest.mark.parametrize("size", [0, -1, "many", "5 XB", "0GB", None, True, 1.5])
def test_bad_sizes(size: Any) -> None:
    with pytest.raises(InputError, match="max_shard_size is"):
        parse_size(size)


def test_shard_plan() -> None:
    tensors = {name: torch.empty(n, dtype=torch.uint8) for name, n in {"a": 4, "b": 6, "c": 1, "d": 30, "e": 2}.items()}
    assert plan_shards(tensors, 10) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert shard_names("model", "safetensors", None, 2)[1] == "model-00002-of-00002.safetensors"


# -- finding and refusing ------------------------------------------------------------------------------------------


def test_search_order(tmp_path: Path) -> None:
    names = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    for name in reversed(names):
        (tmp_path / name).touch()
        assert find_files(tmp_path) == [tmp_path / name]
    assert find_files(tmp_path, use_safetensors=False) == [tmp_path / "pytorch_model.bin"]


def test_use_safetensors(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path, safe_serialization=False)
    same(make(), LlamaForCausalLM.from_pretrained(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"holds none of model.safetensors, model.safetensors.index.json; it holds"
    ):
        LlamaForCausalLM.from_pretrained(tmp_path, use_safetensors=True)


def test_single_files_are_recognised_by_content(saved: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name.replace("model.safetensors", "weights.dat")).write_bytes((saved / name).read_bytes())
    same(LlamaForCausalLM.from_pretrained(tmp_path / "weights.dat"), make())
    (tmp_path / "page.safetensors").write_text("<!doctype html><html></html>")
    with pytest.raises(CheckpointError, match="neither GGUF, safetensors nor a PyTorch file"):
        LlamaForCausalLM.from_pretrained(tmp_path / "page.safetensors")


def test_stale_rotary_tables_are_dropped(saved: Path, tmp_path: Path) -> None:
    state = {**make().state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4).half()}
    make().save_pretrained(tmp_path, state_dict=state)
    model, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
    same(model, make())


def test_missing_paths(tmp_path: Path) -> None:
    for path in (tmp_path / "none", str(tmp_path / "none"), "./none", "none.gguf", "a/b/c"):
        with pytest.raises(CheckpointError, match="does not exist"):
            LlamaForCausalLM.from_pretrained(path)
    with pytest.raises(CheckpointError, match="holds no weights at all"):
        (tmp_path / "config.json").write_text("{}")
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mistral"}, "describes a 'mistral' model"),
        ({"model_type": None, "architectures": ["MistralForCausalLM"]}, "describes a 'MistralForCausalLM' model"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "the quantisation method is 'aqlm'"),
    ],
)
def test_foreign_models(saved: Path, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=message):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_meta_names_outside_their_folder(tmp_path: Path) -> None:
    torch.save({"tok_embeddings.weight": torch.zeros(2)}, tmp_path / "consolidated.00.pth")
    with pytest.raises(CheckpointError, match="Meta's original tensor names"):
        checkpoint.open(tmp_path / "consolidated.00.pth").tensors  # noqa: B018


def test_broken_index(saved: Path, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path, max_shard_size=9000)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = min(content["weight_map"].values())
    shard = (tmp_path / first).read_bytes()
    (tmp_path / first).unlink()
    with pytest.raises(CheckpointError, match=f"names the shard '{first}', which is missing"):
        checkpoint.open(tmp_path)
    (tmp_path / first).write_bytes(shard)
    index.write_text(json.dumps({"weight_map": {**content["weight_map"], "ghost": first}}))
    with pytest.raises(CheckpointError, match="places 'ghost'"):
        checkpoint.open(tmp_path).tensors  # noqa: B018
    index.write_text(json.dumps({"weight_map": {"a": "../secret"}}))
    with pytest.raises(CheckpointError, match="must be the name of a file beside it"):
        checkpoint.open(tmp_path)
    index.write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        checkpoint.open(tmp_path)


def test_pickles_that_run_code_are_refused(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a plain state dict"):
        LlamaForCausalLM.from_pretrained(tmp_path)


class Evil:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("code of the checkpoint ran",))


def test_raw_bytes(saved: Path) -> None:
    raw = checkpoint.open(saved).raw("model.layers.0.self_attn.k_proj.weight")
    weight = make().model.layers[0].self_attn.k_proj.weight
    assert (raw.type, raw.shape) == ("F32", (16, 32))
    assert torch.equal(raw.rows.view(torch.float32), weight)


# -- heads, prefixes, coverage ---------------------------------------------------------------------------------------


def test_base_and_head_models_load_each_other(saved: Path, tmp_path: Path) -> None:
    base, info = LlamaModel.from_pretrained(saved, output_loading_info=True)
    same(base, make().model)
    assert info["unexpected_keys"] == ["lm_head.weight"]
    base.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in map_safetensors(tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="score.weight"):
        classifier, info = LlamaForSequenceClassification.from_pretrained(
            tmp_path, num_labels=3, output_loading_info=True
        )
    assert info["missing_keys"] == ["score.weight"] and classifier.score.weight.shape == (3, 32)
    same(classifier.model, base)
    with pytest.warns(UserWarning, match="lm_head.weight"):
        same(LlamaForCausalLM.from_pretrained(tmp_path).model, base)
    classifier.save_pretrained(tmp_path / "c")
    again = LlamaForSequenceClassification.from_pretrained(tmp_path / "c")
    same(again, classifier)
    assert again.config.num_labels == 3


def test_a_causal_model_without_its_head_is_refused(tmp_path: Path) -> None:
    state = make().state_dict()
    del state["lm_head.weight"]
    make().save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(MismatchError, match=r"missing: lm_head.weight \(41, 32\).*tie_word_embeddings=True"):
        LlamaForCausalLM.from_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_model_with_a_head_in_the_file(tmp_path: Path) -> None:
    state = make().state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    make().save_pretrained(tmp_path, state_dict=state)
    model = LlamaForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    del state["model.embed_tokens.weight"]
    make().save_pretrained(tmp_path, state_dict=state)
    same(LlamaForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=True), model)
    make().save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="tie_word_embeddings=False"):
        LlamaForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=True)


def test_coverage_lists_both_sides(saved: Path) -> None:
    with pytest.raises(MismatchError) as caught:
        LlamaForCausalLM.from_pretrained(saved, num_hidden_layers=3)
    assert "missing: model.layers.2.self_attn.q_proj.weight (32, 32)" in str(caught.value)
    with pytest.raises(MismatchError) as caught:
        LlamaForCausalLM.from_pretrained(saved, num_hidden_layers=1)
    assert "not used: model.layers.1.self_attn.q_proj.weight (32, 32)" in str(caught.value)


def test_shape_mismatch(saved: Path) -> None:
    with pytest.raises(MismatchError, match=r"model.embed_tokens.weight is \(41, 32\) in the file, \(50, 32\) here"):
        LlamaForCausalLM.from_pretrained(saved, vocab_size=50)
    with pytest.raises(RuntimeError):  # what callers of transformers catch
        LlamaForCausalLM.from_pretrained(saved, vocab_size=50)
    with pytest.warns(UserWarning, match="model.embed_tokens.weight, lm_head.weight .*newly"):
        model, info = LlamaForCausalLM.from_pretrained(
            saved, vocab_size=50, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert info["mismatched_keys"][0] == ("model.embed_tokens.weight", (41, 32), (50, 32))
    assert model(torch.tensor([[49]])).logits.shape == (1, 1, 50)
    assert 0 < model.lm_head.weight.std() < 0.1
    with pytest.warns(UserWarning, match="newly"):
        wider = LlamaForCausalLM.from_pretrained(saved, hidden_size=64, ignore_mismatched_sizes=True)
    assert bool((wider.model.norm.weight == 1).all())


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    state = {**make().state_dict(), "lm_head.weight": torch.zeros(41, 32, dtype=torch.int8)}
    make().save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(MismatchError, match="lm_head.weight is stored as I8"):
        LlamaForCausalLM.from_pretrained(tmp_path)


# -- arguments -------------------------------------------------------------------------------------------------------


def test_dtype_rules(tmp_path: Path) -> None:
    make().half().save_pretrained(tmp_path)
    stored, load = json.loads((tmp_path / "config.json").read_text()), LlamaForCausalLM.from_pretrained
    assert stored["dtype"] == stored["torch_dtype"] == "float16"
    for kwargs, expected in [
        ({}, torch.float16),
        ({"dtype": "auto"}, torch.float16),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "torch.float64"}, torch.float64),
        ({"dtype": "half", "torch_dtype": None}, torch.float16),
    ]:
        model = load(tmp_path, **kwargs)
        assert model.dtype == expected == model.config.dtype
    edit(tmp_path, dtype="float32", torch_dtype="float32")
    assert load(tmp_path).dtype == torch.float32
    edit(tmp_path, dtype=None, torch_dtype=None)
    assert load(tmp_path).dtype == torch.float16


@pytest.mark.parametrize("dtype", ["float8", "int8", torch.int64, 16, "bf16"])
def test_unknown_dtype(saved: Path, dtype: Any) -> None:
    with pytest.raises(InputError, match="must be 'auto', 'float16', 'bfloat16', 'float32', 'float64'"):
        LlamaForCausalLM.from_pretrained(saved, dtype=dtype)


def test_conflicting_dtypes(saved: Path) -> None:
    with pytest.raises(InputError, match="one setting"):
        LlamaForCausalLM.from_pretrained(saved, dtype="float32", torch_dtype="float16")


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}])
def test_device_maps(saved: Path, device_map: Any) -> None:
    expected = "cuda" if device_map == "auto" and torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM.from_pretrained(saved, device_map=device_map)
    assert model.device.type == expected
    # As transformers: the map stands on the model where one was asked for.
    place = "cpu" if model.device.index is None else model.device.index
    assert getattr(model, "hf_device_map", None) == (None if device_map is None else {"": place})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "spreads the model over"),
        ({"device_map": "nowhere"}, "device_map is 'nowhere'"),
        ({"max_memory": {0: "1GB"}}, "one device"),
        ({"num_label": 3}, "does not know 'num_label'.*did you mean num_labels"),
        ({"attn_implementation": "fast"}, "attn_implementation"),
    ],
)
def test_refused_arguments(saved: Path, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LlamaForCausalLM.from_pretrained(saved, **kwargs)


def test_accepted_arguments(saved: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(
        saved,
        low_cpu_mem_usage=True,
        trust_remote_code=False,
        local_files_only=True,
        revision="main",
        use_cache=False,
        rope_theta=5e5,
        attn_implementation="eager",
        load_in_8bit=False,
    )
    assert (model.config.use_cache, model.config.rope_theta) == (False, 5e5)
    assert model.attn_implementation == model.config._attn_implementation == "eager"


def test_a_given_config_is_copied_and_overridden(saved: Path) -> None:
    config = LlamaConfig(**TINY, rms_norm_eps=1e-3)
    model = LlamaForCausalLM.from_pretrained(saved, config=config, use_cache=False)
    assert model.config.rms_norm_eps == 1e-3 and not model.config.use_cache
    assert config.use_cache and config.dtype is None


def test_a_state_dict_instead_of_a_file(saved: Path) -> None:
    state = {name: t.double() for name, t in make().state_dict().items()}
    model = LlamaForCausalLM.from_pretrained(None, config=LlamaConfig(**TINY), state_dict=state)
    assert model.dtype == torch.float64 and torch.equal(model.lm_head.weight, state["lm_head.weight"])
    bare = {name.removeprefix("model."): t for name, t in state.items()}
    same(LlamaForCausalLM.from_pretrained(None, config=LlamaConfig(**TINY), state_dict=bare), model)
    with pytest.raises(InputError, match="needs both config= and state_dict="):
        LlamaForCausalLM.from_pretrained(None)


def test_generation_config_is_loaded(saved: Path, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 5]}))
    settings = LlamaForCausalLM.from_pretrained(tmp_path).generation_config
    assert (settings.do_sample, settings.temperature, settings.eos_token_id) == (True, 0.6, [2, 5])
    file.unlink()
    assert LlamaForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == 2


def test_the_default_dtype_and_random_state_are_left_alone(saved: Path) -> None:
    state = torch.get_rng_state()
    LlamaForCausalLM.from_pretrained(saved, dtype="bfloat16")
    assert torch.get_default_dtype() == torch.float32 and torch.equal(torch.get_rng_state(), state)


def test_threads_keep_order_and_the_process_keeps_its_number() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        names = [str(n) for n in range(40)]
        read = list(in_single_threads(lambda n: torch.tensor([int(n), torch.get_num_threads()]), names))
        assert [t[0].item() for t in read] == list(range(40))
        assert {t[1].item() for t in read} == {1}
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:  # a thread that is new takes the process's number
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("content", [b"", b"abc", b"\x80\x02K\x01."])
def test_a_safetensors_file_too_short_to_tell_is_truncated(content: bytes, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or not safetensors"):
        LlamaForCausalLM.from_pretrained(tmp_path)
