"""Meta's files: reading every variation, refusing what is damaged, params.json."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.meta_model import forward, random_weights, shard

import llama2.checkpoint as checkpoint
from llama2 import LlamaConfig, LlamaForCausalLM
from llama2.checkpoint.convert import ConversionSettings, convert
from llama2.checkpoint.meta_write import feed_forward_rule, params_of
from llama2.errors import CheckpointError, InputError, MismatchError
from llama2.model import LlamaModel

pytestmark = pytest.mark.filterwarnings("ignore:there is no tokenizer")

PARAMS: dict[str, Any] = {
    "dim": 64,
    "multiple_of": 16,
    "n_heads": 8,
    "n_layers": 2,
    "norm_eps": 1e-5,
    "vocab_size": 96,
}
INNER = 176  # 16 * ceil(int(8 * 64 / 3) / 16)


def make(folder: Path, shards: int = 1, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, torch.Tensor]:
    """Writes a Meta folder; returns the whole tensors."""
    axis = changes.pop("embedding_axis", 1)
    stated = {**PARAMS, **changes}
    weights = random_weights({**stated, "vocab_size": 96}, INNER, dtype)
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(stated))
    for i, rank in enumerate(shard(weights, shards, axis)):
        torch.save(rank, folder / f"consolidated.{i:02d}.pth")
    return weights


@pytest.mark.parametrize(
    ("shards", "changes"),
    [
        (1, {}),
        (2, {"n_kv_heads": 2, "rope_theta": 500000.0}),
        (8, {"n_kv_heads": 1, "vocab_size": -1}),
        (4, {"n_kv_heads": 2, "embedding_axis": 0}),
    ],
    ids=["mha", "gqa-2", "mqa-8", "gqa-4-more-shards-than-kv-heads"],
)
def test_an_independent_complex_forward_agrees(tmp_path: Path, shards: int, changes: dict[str, Any]) -> None:
    """The converted model against Meta's own way to rotate, from Meta's tensors."""
    weights = make(tmp_path / "meta", shards, **changes)
    convert(tmp_path / "meta", tmp_path / "hf", ConversionSettings())
    ids = torch.tensor([1, 5, 90, 7, 33, 2, 64, 15])
    params = {**PARAMS, **{k: v for k, v in changes.items() if k.startswith(("n_", "rope"))}}
    expected = forward(weights, params, ids)
    for path in ("hf", "meta"):
        model = LlamaForCausalLM.from_pretrained(tmp_path / path)
        with torch.no_grad():
            found = model.double()(ids[None]).logits[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-6)


def test_rows_come_as_the_whole_tensor_has_them(tmp_path: Path) -> None:
    make(tmp_path / "meta", 4, n_kv_heads=2)
    source = checkpoint.open(tmp_path / "meta")
    assert source.format == "meta"
    for name, stored in source.tensors.items():
        whole = source.read(name)
        assert tuple(whole.shape) == stored.shape
        for start, stop in ((0, 3), (5, 21), (stored.shape[0] - 9, stored.shape[0])):
            assert torch.equal(source.read_rows(name, start, stop), whole[start:stop]), name


def test_replicated_key_heads(tmp_path: Path) -> None:
    """Eight ranks for two key-value heads, each with a whole head: copies are dropped, and must be equal."""
    weights = make(tmp_path / "meta", 8, n_kv_heads=2)
    for i in range(8):
        file = tmp_path / "meta" / f"consolidated.{i:02d}.pth"
        rank = torch.load(file)
        for layer in range(2):
            for key in ("wk", "wv"):
                name = f"layers.{layer}.attention.{key}.weight"
                rank[name] = weights[name].chunk(2)[i // 4].clone()
        torch.save(rank, file)
    found = checkpoint.open(tmp_path / "meta").read("model.layers.1.self_attn.v_proj.weight")
    assert torch.equal(found, weights["layers.1.attention.wv.weight"])
    rank["layers.0.attention.wk.weight"][0, 0] += 1
    torch.save(rank, file)
    with pytest.raises(MismatchError, match="shards 4 and 7 differ"):
        checkpoint.open(tmp_path / "meta")


def test_params_variations(tmp_path: Path) -> None:
    make(tmp_path / "nested")
    (tmp_path / "nested/params.json").write_text(json.dumps({"model": {**PARAMS, "vocab_size": -1}, "other": 1}))
    config = checkpoint.open(tmp_path / "nested").config
    assert (config.vocab_size, config.intermediate_size, config.num_key_value_heads) == (96, INNER, 8)
    assert (config.max_position_embeddings, config.rope_theta, config.rms_norm_eps) == (4096, 10000.0, 1e-5)
    for changes, context in (({"norm_eps": 1e-6}, 2048), ({"rope_theta": 1e6}, 16384), ({"max_seq_len": 77}, 77)):
        (tmp_path / "nested/params.json").write_text(json.dumps({**PARAMS, **changes}))
        assert checkpoint.open(tmp_path / "nested").config.max_position_embeddings == context
    (tmp_path / "nested/params.json").write_text(json.dumps({**PARAMS, "use_scaled_rope": True}))
    rope = checkpoint.open(tmp_path / "nested").config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("llama3", 8.0, 8192)


def test_a_base_model_loads_from_meta_files(tmp_path: Path) -> None:
    weights = make(tmp_path / "meta", dtype=torch.float16)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "meta")
    assert model.dtype == torch.float16 and torch.equal(model.lm_head.weight, weights["output.weight"])
    assert LlamaConfig.from_pretrained(tmp_path / "meta").intermediate_size == INNER
    assert isinstance(LlamaModel.from_pretrained(tmp_path / "meta"), LlamaModel)


# -- what is refused ---------------------------------------------------------------------------------------------


class Bomb:
    """A pickle that makes a file when it is trusted."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_damaged_folders(tmp_path: Path) -> None:
    folder = tmp_path / "meta"
    make(folder, 4)

    def refused(error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            checkpoint.open(folder)

    last, first = folder / "consolidated.03.pth", folder / "consolidated.00.pth"
    kept, head = last.read_bytes(), first.read_bytes()
    last.unlink()
    refused(MismatchError, "132 feed-forward rows together.*176.*shard is missing")
    last.write_bytes(kept[: len(kept) // 2])
    refused(CheckpointError, "03.pth is truncated: its .* bytes have no end")
    last.write_bytes(kept[:-1])
    refused(CheckpointError, "truncated")
    last.write_bytes(b"not a checkpoint at all")
    refused(CheckpointError, "starts with b'not a checkpoint', which no PyTorch file does")
    torch.save({"tok_embeddings.weight": Bomb(tmp_path / "ran")}, last)
    refused(CheckpointError, "not a plain state dict: opening it would run code")
    with last.open("wb") as file:
        pickle.dump({"tok_embeddings.weight": Bomb(tmp_path / "ran")}, file)
    refused(CheckpointError, "not a plain state dict: opening it would run code")
    assert not (tmp_path / "ran").exists()
    pickle.loads(last.read_bytes())
    assert (tmp_path / "ran").exists()  # it would have run
    torch.save([torch.ones(2)], last)
    refused(CheckpointError, "holds a list")
    rank = torch.load(first)
    torch.save({**rank, "model.layers.0.mlp.up_proj.weight": torch.ones(2)}, last)
    refused(CheckpointError, "belongs to no Llama model of Meta's")
    torch.save({**rank, "norm.weight": torch.ones(64, dtype=torch.int64)}, last)
    refused(CheckpointError, "torch.int64")
    torch.save({name: t for name, t in rank.items() if "wo" not in name}, last)
    refused(CheckpointError, "hold different tensors")
    last.write_bytes(kept)
    (folder / "consolidated.01.pth").unlink()
    refused(CheckpointError, "number 1 is missing")
    first.write_bytes(head)
    (folder / "params.json").unlink()
    refused(CheckpointError, "params.json does not exist")


@pytest.mark.parametrize("mistake", ["swapped", "copied"])
def test_renamed_shards(tmp_path: Path, mistake: str) -> None:
    """Shapes agree whatever the order; the name inside the archive tells. One file alone may have any name."""
    make(tmp_path / "meta", 2)
    a, b = (tmp_path / "meta" / f"consolidated.0{i}.pth" for i in (0, 1))
    kept = a.read_bytes(), b.read_bytes()
    b.write_bytes(kept[0])
    if mistake == "swapped":
        a.write_bytes(kept[1])
    with pytest.raises(MismatchError, match=r"consolidated.0\d.pth was saved as consolidated.0\d.pth"):
        checkpoint.open(tmp_path / "meta")
    make(tmp_path / "one", 1)
    state = torch.load(tmp_path / "one" / "consolidated.00.pth")
    torch.save(state, tmp_path / "consolidated.07.pth")
    (tmp_path / "consolidated.07.pth").replace(tmp_path / "one" / "consolidated.00.pth")
    assert checkpoint.open(tmp_path / "one").format == "meta"


def test_shuffled_names(tmp_path: Path) -> None:
    make(tmp_path / "meta", 1, n_kv_heads=2)
    file = tmp_path / "meta" / "consolidated.00.pth"
    rank = torch.load(file)
    rank["layers.0.attention.wq.weight"], rank["layers.0.attention.wk.weight"] = (
        rank["layers.0.attention.wk.weight"],
        rank["layers.0.attention.wq.weight"],
    )
    torch.save(rank, file)
    with pytest.raises(MismatchError, match=r"q_proj.weight is \(16, 64\) in 1 shard.*\(64, 64\)"):
        checkpoint.open(tmp_path / "meta")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dim": None}, "dim is None"),
        ({"n_heads": "8"}, "n_heads is '8'"),
        ({"vocab_size": 95}, "embedding has 96 rows and params.json says 95"),
        ({"n_layers": 3}, "missing: model.layers.2.self_attn.q_proj"),
        ({"n_layers": 1}, "not used: model.layers.1.self_attn.q_proj"),
        ({"multiple_of": 256}, "makes them 256"),
        ({"n_kv_heads": 4}, "k_proj.weight is"),
    ],
)
def test_params_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    make(tmp_path / "meta")
    (tmp_path / "meta/params.json").write_text(json.dumps({**PARAMS, **changes}))
    with pytest.raises(CheckpointError, match=match):
        checkpoint.open(tmp_path / "meta")


# -- params.json -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "inner", "rule"),
    [
        (4096, 11008, (256, None)),
        (5120, 13824, (256, None)),
        (8192, 28672, (4096, 1.3)),
        (4096, 14336, (1024, 1.3)),
    ],
)
def test_published_feed_forward_rules(dim: int, inner: int, rule: tuple[int, float | None]) -> None:
    assert feed_forward_rule(dim, inner) == rule


def test_any_feed_forward_width_has_a_rule() -> None:
    for inner in (1, 7, 97, 112, 1000, 1001, 12345):
        multiple_of, multiplier = feed_forward_rule(64, inner)
        hidden = int(8 * 64 / 3)
        hidden = hidden if multiplier is None else int(multiplier * hidden)
        assert multiple_of * ((hidden + multiple_of - 1) // multiple_of) == inner


def test_params_refuse_other_scaling() -> None:
    config = LlamaConfig(rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(InputError, match="no RoPE scaling"):
        params_of(config)
