"""A pickle that would run, in every file of every kind of folder: none does, and none ends in a foreign error."""

import io
import os
import pickle
import shutil
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile.folders import KINDS, SIZES, make, visit
from tiny import tiny_model

from llama2.errors import CheckpointError
from llama2.train import checkpoint_state, old_shards, shards, trees
from llama2.train.distributed import Ranks
from llama2.train.optim import AdamW


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def archive(content: bytes, compressed: bool = False) -> bytes:
    """As torch.save writes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
    return out.getvalue()


def bombs(mark: Path) -> list[bytes]:
    whole = {"model.norm.weight": Bomb(mark), "optimizer": {}, "scheduler": None}
    plain = [pickle.dumps(value, protocol) for value in (Bomb(mark), whole) for protocol in (2, 4)]
    return [*plain, *map(archive, plain[::2])]


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_a_file_holds_is_run(tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "ran"
    whole = make(kind, tmp_path / "whole" / kind)
    folder = tmp_path / kind
    for i, name in enumerate(sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())):
        made = bombs(mark)
        for bomb in (made[i % 4], made[4 + i % 2]):
            shutil.rmtree(folder, ignore_errors=True)  # to read one with a journal changes it
            shutil.copytree(whole, folder)
            (folder / name).write_bytes(bomb)
            tries = visit(kind, folder)
            assert not mark.exists() and not tries.faults, (name, tries.faults)
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    for extra in ("pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "training_args.bin", "shards/.metadata"):
        for place in (folder, folder / "checkpoint-1"):
            if place.is_dir() and not (place / extra).exists():
                (place / extra).parent.mkdir(exist_ok=True)
                (place / extra).write_bytes(bombs(mark)[0])
                visit(kind, folder)
                assert not mark.exists(), (place, extra)
                shutil.rmtree(place / "shards") if "/" in extra else (place / extra).unlink()


def test_the_bombs_would_run(tmp_path: Path) -> None:
    for i, bomb in enumerate(bombs(tmp_path / "ran")):
        torch.load(io.BytesIO(bomb), weights_only=False) if i > 3 else pickle.loads(bomb)
        assert (tmp_path / "ran").is_dir()
        (tmp_path / "ran").rmdir()


# -- sharded state -----------------------------------------------------------------------------------------------


def old_folder(folder: Path, content: dict[str, torch.Tensor]) -> None:
    """What earlier versions wrote, by torch's own writer."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(content, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)


def content() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"weights.a": torch.rand(5, 4), "optimizer.exp_avg.a": torch.rand(5, 4).bfloat16(),
            "optimizer.step.a": torch.tensor(3.0)}  # fmt: skip


@pytest.mark.parametrize("written", ["old", "new"])
def test_state_of_one_rank_comes_back(tmp_path: Path, written: str) -> None:
    if written == "old":
        old_folder(tmp_path / "shards", content())
        found = old_shards.read(tmp_path / "shards")
    else:
        shards.write(tmp_path / "shards", content(), Ranks())
        found = shards.read(tmp_path / "shards")
    assert found.keys() == content().keys()
    for name, tensor in content().items():
        assert torch.equal(found[name].whole(), tensor) and found[name].dtype == tensor.dtype
    assert torch.equal(found["weights.a"].rows(1, 4), content()["weights.a"][1:4])
    assert not list((tmp_path / "shards").glob("*.metadata")) or written == "old"
    if written == "old":
        next((tmp_path / "shards").glob("*.distcp")).unlink()
        with pytest.raises(CheckpointError, match=r"\.distcp does not exist"):
            found["weights.a"].whole()


def two_ranks(folder: Path) -> dict[str, Any]:
    """Five rows over three ranks of two: 2, 2 and 1, as FSDP divides them."""
    folder.mkdir()
    a, step = content()["weights.a"], content()["optimizer.step.a"]
    for rank in range(3):
        held = {"weights.a": a[2 * rank : 2 * rank + 2].clone()} | ({"optimizer.step.a": step} if rank == 0 else {})
        with (folder / f"rank-{rank:05d}.safetensors").open("wb") as file:
            shards.write_safetensors(file, held)
    entry = {"dtype": "F32", "shape": [5, 4], "starts": [0, 2, 4]}
    return {
        "ranks": 3,
        "tensors": {"weights.a": entry, "optimizer.step.a": {"dtype": "F32", "shape": [], "starts": []}},
    }


def test_rows_of_several_ranks(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    index = two_ranks(tmp_path / "s" / "shards")
    (tmp_path / "s" / "shards" / "index.json").write_text(shards.json.dumps(index))
    found = shards.read(tmp_path / "s" / "shards")
    a = content()["weights.a"]
    assert torch.equal(found["weights.a"].whole(), a) and torch.equal(found["weights.a"].rows(1, 5), a[1:5])
    assert found["weights.a"].rows(5, 5).shape == (0, 4) and found["optimizer.step.a"].whole().item() == 3.0
    assert checkpoint_state.resumable(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda i: i.update(ranks=2**40), r"ranks is 1099511627776; it must be a whole number from 1 to 65536"),
        (lambda i: i.update(ranks=4), "rank-00003.safetensors does not exist"),
        (lambda i: i.update(tensors=[]), "names no tensors"),
        (lambda i: i["tensors"].update(b={"dtype": "F32"}), "entry of 'b' is no dtype, shape and starts"),
        (lambda i: i["tensors"]["weights.a"].update(dtype=["F32"]), r"dtype is \['F32'\]; it must be one of F64"),
        (lambda i: i["tensors"]["weights.a"].update(shape=[2**70, 4]), r"shape is \[1180591620717411303424, 4\]"),
        (
            lambda i: i["tensors"]["weights.a"].update(shape=[5, 8]),
            r"is torch.float32 \(2, 4\), not torch.float32 \(2, 8\)",
        ),
        (lambda i: i["tensors"]["weights.a"].update(starts=[0, 2, 3]), r"is torch.float32 \(2, 4\), not .*\(1, 4\)"),
        (lambda i: i["tensors"]["weights.a"].update(starts=[0, 4, 2]), "lacks the rows 4 to 2"),
        (lambda i: i["tensors"]["weights.a"].update(starts=[1, 2, 4]), "lacks the rows 0 to 1"),
        (lambda i: i["tensors"]["optimizer.step.a"].update(starts=[0, 0]), "has no 'optimizer.step.a'"),
    ],
)
def test_indexes_that_are_wrong(tmp_path: Path, change: Callable[[Any], Any], said: str) -> None:
    index = two_ranks(tmp_path / "shards")
    change(index)
    (tmp_path / "shards" / "index.json").write_text(shards.json.dumps(index))
    with pytest.raises(CheckpointError, match=said):
        for stored in shards.read(tmp_path / "shards").values():
            stored.whole()


def test_an_old_directory_runs_nothing(tmp_path: Path) -> None:
    old_folder(tmp_path / "shards", content())
    where, mark = tmp_path / "shards" / ".metadata", tmp_path / "ran"
    metadata = pickle.loads(where.read_bytes())
    metadata.planner_data = Bomb(mark)
    where.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"it names posix\.mkdir, which was not run"):
        old_shards.read(tmp_path / "shards")
    metadata.planner_data = None
    for info in metadata.storage_data.values():
        info.relative_path = "../../etc/passwd"
    where.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="it must be the name of a file beside it"):
        old_shards.read(tmp_path / "shards")["weights.a"].whole()
    assert not mark.exists()


def test_a_planted_directory_beside_plain_state_runs_nothing(tmp_path: Path) -> None:
    """Where `shards` exists it counts: what was never sharded is refused then, and runs nothing."""
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    optimizer = AdamW(dict(tiny_model(torch.float32, **SIZES).named_parameters()))
    for read in (lambda: checkpoint_state.read(tmp_path, optimizer), lambda: checkpoint_state.resumable(tmp_path)):
        with pytest.raises(CheckpointError, match="no directory of a sharded checkpoint"):
            read()
    assert not (tmp_path / "ran").exists()


def test_a_name_without_a_moment(tmp_path: Path) -> None:
    """It belongs to no parameter: the run does not train it."""
    weights = dict(tiny_model(torch.float32, **SIZES).named_parameters())
    optimizer = AdamW(weights)
    for name, held in ((checkpoint_state.WEIGHTS, weights), (checkpoint_state.OPTIMIZER, {"odd": torch.zeros(1)})):
        with (tmp_path / name).open("wb") as file:
            shards.write_safetensors(file, held)
    assert checkpoint_state.read(tmp_path, optimizer)[1].keys() == {"odd"}
    with pytest.raises(trees.InputError, match="has 'odd', which this run does not train"):
        optimizer.load(checkpoint_state.read(tmp_path, optimizer)[1])


# -- state of another optimiser ----------------------------------------------------------------------------------


def test_nested_state_comes_back(tmp_path: Path) -> None:
    groups = [{"betas": (0.9, 0.99), "lr": None}]
    tree = {"state": {0: {"step": torch.tensor(2.0), "m": torch.rand(3)}}, "groups": groups,
            "milestones": Counter({3: 2}), "name": "x", "flag": True}  # fmt: skip
    trees.write(tmp_path, "t", tree)
    found = trees.read(tmp_path, "t")
    assert torch.equal(found["state"][0].pop("m"), tree["state"][0].pop("m"))  # type: ignore[index]
    assert found == tree and isinstance(found["milestones"], Counter) and isinstance(found["groups"][0]["betas"], tuple)
    with pytest.raises(trees.InputError, match=r"t\.a of the optimiser's state is a Bomb, which is not saved"):
        trees.write(tmp_path, "t", {"a": Bomb(tmp_path)})


WRONG = ("[1]", '{"tensor": "9"}', '{"tensor": ["0"]}', '{"dict": [[[1], 2]]}', '{"class": []}', '{"list": [[1]]}',
         '{"dict": 3}', '{"dict": [[1, 2, 3]]}', '{"counter": [["a"]]}')  # fmt: skip


@pytest.mark.parametrize("tree", WRONG)
def test_nested_state_that_is_wrong(tmp_path: Path, tree: str) -> None:
    trees.write(tmp_path, "t", {})
    (tmp_path / "t.json").write_text(f'{{"tree": {tree}}}')
    with pytest.raises(CheckpointError, match="it is damaged"):
        trees.read(tmp_path, "t")
