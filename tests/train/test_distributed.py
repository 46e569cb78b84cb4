"""Several ranks do what one does, read each other's checkpoints, and end with the bits of a straight run."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from bytewise import write_tokenizer
from safetensors.torch import load_file
from tiny import tiny_model

from llama2 import AutoModelForCausalLM, InputError
from llama2.train import checkpoints
from llama2.train.distributed import Ranks, join
from llama2.train.trainer import TrainingArguments

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    "OMP_NUM_THREADS": "1",
}


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


Watch = Callable[[list["subprocess.Popen[str]"]], None]


def launch(world: int, command: list[str], fails: bool = False, watch: Watch | None = None) -> str:
    """A command on this many ranks, without torchrun's own process; returns what they said.

    `watch` is called with the processes, whose standard output it may read.
    """
    common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    own = [{**common, "RANK": str(rank)} if world > 1 else {} for rank in range(world)]
    output = subprocess.PIPE if watch else None
    processes = [
        subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True, env={**ENVIRONMENT, **more})
        for more in own
    ]
    if watch:
        watch(processes)
    said = [process.communicate(timeout=280)[1] for process in processes]
    assert any(process.returncode for process in processes) == fails, "\n".join(said)
    return "\n".join(said)


def start(world: int, *jobs: dict[str, Any], fails: bool = False, watch: Watch | None = None) -> str:
    """Jobs of ranks.py on this many ranks."""
    return launch(world, [sys.executable, str(HERE.parent / "ranks.py"), json.dumps(jobs)], fails, watch)


def job(folder: Path, kind: str = "plain", **arguments: Any) -> dict[str, Any]:
    return {"folder": str(folder), "kind": kind, "arguments": arguments}


def result(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(folder / "result.safetensors"), json.loads((folder / "result.json").read_text())


def alone(folder: Path, kind: str = "plain", **changes: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """The same on one rank, here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = ranks.made(folder, kind, **changes)
    run.train()
    history = [entry for entry in run.state.history if "train_loss" not in entry]
    torch.set_num_threads(threads)
    return {name: t.detach() for name, t in run.model.state_dict().items()}, history


SHARD = {"fsdp": "full_shard"}
HALVES = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {  # kind, and arguments of two ranks
    "whole": ("plain", {}),
    "accumulated": ("plain", HALVES),
    "sharded": ("plain", SHARD),
    "sharded, accumulated": ("plain", {**HALVES, **SHARD}),
    "tied": ("tied", SHARD),
    "checkpointing": ("plain", {"gradient_checkpointing": True, **SHARD}),
    "adapter": ("lora", {}),
    "adapter, sharded": ("lora", SHARD),
    "preferences": ("dpo", SHARD),
    "classifier": ("classifier", SHARD),
    "bytes": ("plain", {"optim": "adamw_8bit"}),
    "hooked": ("hooked", {}),
    "hooked, accumulated": ("hooked", HALVES),
    "seeds": ("seeds", {}),  # an adapter that each rank makes otherwise
}


@pytest.mark.slow
def test_two_ranks_do_what_one_does(tmp_path: Path) -> None:
    start(2, *(job(tmp_path / name, kind, save_strategy="no", **two) for name, (kind, two) in CASES.items()))
    for name, (kind, two) in CASES.items():
        one = {"per_device_train_batch_size": 4, "optim": two.get("optim", "adamw_torch"), "save_strategy": "no"}
        weights, history = alone(tmp_path / f"{name} alone", kind, **one)
        found, content = result(tmp_path / name)
        assert content["world"] == 2
        for key in ("loss", "grad_norm", "eval_loss"):
            ours, wanted = ([e[key] for e in h if key in e] for h in (content["history"], history))
            assert ours == pytest.approx(wanted, rel=1e-5), f"{name}: {key}"
        worst = max(float((found[n] - weights[n]).abs().max()) for n in weights)
        assert found.keys() == weights.keys() and worst < 2e-4, f"{name}: {worst}"


# -- checkpoints -------------------------------------------------------------------------------------------------


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], near: float = 0.0) -> bool:
    return found.keys() == wanted.keys() and all(
        torch.allclose(found[name], wanted[name], rtol=0, atol=near) for name in wanted
    )


def losses(history: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in history if "loss" in entry]


def later(folder: Path) -> None:
    """Hides the last checkpoints, so that the one of step 4 is the newest."""
    for step in (6, 7):
        (folder / f"checkpoint-{step}").rename(folder / f"later-{step}")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, SHARD], ids=["whole", "sharded"])
def test_a_killed_run_of_two_ranks_ends_with_the_same_bits(tmp_path: Path, changes: dict[str, Any]) -> None:
    straight, tied = job(tmp_path / "straight", **changes), job(tmp_path / "tied", "tied", **changes)
    start(2, straight, tied, {**job(tmp_path / "cut", **changes), "dies": [1, 5]}, fails=True)
    assert not (tmp_path / "cut" / "result.json").exists()
    assert [checkpoints.step_of(p) for p in checkpoints.found(tmp_path / "cut")][:2] == [2, 4]
    (tmp_path / "cut" / ".checkpoint-begun").mkdir()
    start(2, job(tmp_path / "cut", resume_from_checkpoint=True, **changes))
    (weights, content), (wanted, whole) = result(tmp_path / "cut"), result(tmp_path / "straight")
    assert same(weights, wanted) and not (tmp_path / "cut" / ".checkpoint-begun").exists()
    for key in ("loss", "grad_norm", "eval_loss"):
        assert [e.get(key) for e in content["history"]] == [e.get(key) for e in whole["history"]]
    # The same on one rank, from the checkpoint of two in the middle of the run; two batches per step make the same
    # rows.
    for name, kind in (("straight", "plain"), ("tied", "tied")):
        later(tmp_path / name)
        found, history = alone(tmp_path / name, kind, resume_from_checkpoint=True)
        weights, content = result(tmp_path / name)
        assert losses(history) == pytest.approx(losses(content["history"]), rel=1e-5)
        assert same(found, weights, near=2e-4)


# A failure repeats, as far as time can, with the seed of its name: LLAMA2_KILL_SEED=..., LLAMA2_KILL_RUNS=1.
SEED = int(os.environ.get("LLAMA2_KILL_SEED") or random.SystemRandom().randrange(1_000_000))
RUNS = range(SEED, SEED + int(os.environ.get("LLAMA2_KILL_RUNS") or 1))
STEPS = 24


def killing(rank: int, step: int, share: float) -> Watch:
    """SIGKILL to a rank from outside, this share of two steps' time after it told that it has done `step`.

    In these the step is logged and perhaps saved, and the next one or two begin.
    """

    def watch(processes: list["subprocess.Popen[str]"]) -> None:
        told: list[float] = []
        for line in processes[rank].stdout or ():
            told.append(time.monotonic())
            if int(line) >= step:
                break
        gaps = sorted(b - a for a, b in pairwise(told)) or [0.02]
        time.sleep(2 * share * gaps[len(gaps) // 2])
        processes[rank].kill()
        assert processes[rank].wait(60) == -signal.SIGKILL, "it had ended before"

    return watch


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What a run that nobody kills ends with."""

    @cache
    def made(world: int, *sharded: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        folder = tmp_path_factory.mktemp("straight")
        start(world, job(folder, max_steps=STEPS, **({"fsdp": "full_shard"} if sharded else {})))
        return result(folder)

    return made


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", RUNS)
@pytest.mark.parametrize(("world", "sharded"), [(1, ()), (2, ()), (2, ("sharded",))], ids=["one", "whole", "sharded"])
def test_kills_at_random_moments_leave_the_bits_as_they_are(
    tmp_path: Path, straight: Callable[..., Any], seed: int, world: int, sharded: tuple[str, ...]
) -> None:
    rng, cut, saved = random.Random(f"{seed}/{world}/{sharded}"), tmp_path / "cut", tmp_path / "saved"
    changes = {"max_steps": STEPS, "resume_from_checkpoint": True, **(SHARD if sharded else {})}
    plan = [(rng.randrange(world), step, rng.random()) for step in sorted(rng.sample(range(1, 21), rng.randint(1, 3)))]
    print(f"LLAMA2_KILL_SEED={seed}: (rank, step, share of two steps) {plan}")
    for rank, step, share in plan:
        start(world, {**job(cut, **changes), "tells": rank}, fails=True, watch=killing(rank, step, share))
        print(sorted(path.name for path in cut.iterdir()) if cut.exists() else "killed before anything was saved")
    assert not (cut / "result.json").exists()
    if world > 1 and cut.exists():
        shutil.copytree(cut, saved)
    start(world, job(cut, **changes))
    (weights, content), (wanted, whole) = result(cut), straight(world, *sharded)
    assert same(weights, wanted) and not list(cut.glob(".checkpoint-*"))
    for key in ("loss", "grad_norm", "eval_loss"):
        assert [e.get(key) for e in content["history"]] == [e.get(key) for e in whole["history"]]
    if saved.exists() and checkpoints.found(saved):  # what two ranks left, on one
        found, history = alone(saved, max_steps=STEPS, resume_from_checkpoint=True)
        assert losses(history) == pytest.approx(losses(whole["history"]), rel=1e-5)
        assert same(found, wanted, near=2e-4)


@pytest.mark.slow
def test_a_run_of_one_rank_goes_on_with_two(tmp_path: Path) -> None:
    sizes, wanted = {"per_device_train_batch_size": 4}, {}
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "plain": ("plain", {}),
        "sharded": ("plain", SHARD),
        "adapter": ("lora", SHARD),
        "bf16": ("plain", {"bf16": True, **SHARD}),
    }
    for name, (kind, changes) in cases.items():
        wanted[name] = alone(tmp_path / name, kind, bf16="bf16" in changes, **sizes)
        later(tmp_path / name)
    again = [job(tmp_path / n, kind, resume_from_checkpoint=True, **changes) for n, (kind, changes) in cases.items()]
    start(2, *again)
    for name in cases:
        (weights, content), (before, history) = result(tmp_path / name), wanted[name]
        loose, near = (1e-2, 2e-2) if name == "bf16" else (1e-5, 2e-4)
        ours, theirs = losses(content["history"]), losses(history)
        assert ours == pytest.approx(theirs, rel=loose) and ours[:4] == theirs[:4], name
        assert same({n: t.float() for n, t in weights.items()}, {n: t.float() for n, t in before.items()}, near), name
    # And back, from what two sharded ranks in bfloat16 have written.
    (tmp_path / "bf16" / "checkpoint-7").rename(tmp_path / "bf16" / "later-sharded")
    found, history = alone(tmp_path / "bf16", bf16=True, resume_from_checkpoint=True, **sizes)
    assert losses(history)[-1] == pytest.approx(losses(result(tmp_path / "bf16")[1]["history"])[-1], rel=1e-2)
    assert found["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.slow
def test_all_ranks_stop_where_one_is_asked_to(tmp_path: Path) -> None:
    start(2, {**job(tmp_path / "cut"), "stops": [1, 3]})
    assert result(tmp_path / "cut")[1]["step"] == 4  # the step in which the others hear of it
    assert [checkpoints.step_of(p) for p in checkpoints.found(tmp_path / "cut")] == [2, 4]


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again(tmp_path: Path) -> None:
    """Unasked the run goes on from its newest checkpoint, and ends with the bits of one that was not killed."""
    jobs = json.dumps([job(tmp_path / "straight", **SHARD), {**job(tmp_path / "cut", **SHARD), "dies": [1, 5]}])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1",
               f"--master-port={free_port()}", str(HERE.parent / "ranks.py"), jobs]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0 and "exitcode: -9" in done.stderr, done.stderr[-3000:]
    (weights, content), (wanted, straight) = result(tmp_path / "cut"), result(tmp_path / "straight")
    assert same(weights, wanted) and losses(content["history"]) == losses(straight["history"])


# -- the command -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_on_two_ranks(tmp_path: Path) -> None:
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    tiny_model(torch.float32, vocab_size=300).save_pretrained(model)
    write_tokenizer(model)
    rows.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": "yes"}) + "\n" for i in range(7)))
    flags = ["finetune", "sft", str(model), str(rows)]
    flags = [*flags, "--max-steps=3", "--batch-size=1", "--device=cpu", "--eval-split=0.3", "--fsdp=full_shard"]
    said = launch(2, [sys.executable, "-m", "llama2", *flags, "--output-dir", str(tmp_path / "whole")])
    assert said.count("training: ") == 1 and said.count("step 3 of 3") == 1  # rank 0 alone speaks
    launch(2, [sys.executable, "-m", "llama2", *flags, "--output-dir", str(tmp_path / "out"), "--lora-r=2"])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    before = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(found[n].shape == before[n].shape for n in before) and not same(found, before)
    assert json.loads((tmp_path / "whole" / "finetune.json").read_text())["result"]["finished"]
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(adapter) == 28 and all(t.numel() and t.isfinite().all() for t in adapter.values())
    assert (tmp_path / "out" / "checkpoint-3" / "adapter_model.safetensors").exists()


# -- refusals ----------------------------------------------------------------------------------------------------


def test_half_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert join().world == 1 and not join().launched
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InputError, match="WORLD_SIZE=2, MASTER_ADDR=.* but RANK, MASTER_PORT is not set; start them"):
        join()
    monkeypatch.setenv("WORLD_SIZE", "1")  # some clusters set it for everything
    assert not join().launched


def test_what_cannot_be_sharded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fsdp is 'full_shard', and this is one process; start several with `torchrun"):
        ranks.made(tmp_path, **SHARD)
    with pytest.raises(InputError, match="fsdp is 'half'; it must be 'full_shard'"):
        ranks.made(tmp_path, fsdp="half")
    with pytest.raises(InputError, match="adamw_8bit has moments in blocks"):
        ranks.made(tmp_path, optim="adamw_8bit", **SHARD)
    assert TrainingArguments(output_dir="x", fsdp=["full_shard", "auto_wrap"]).fsdp == "full_shard"
    assert TrainingArguments(output_dir="x", fsdp=True).fsdp == "full_shard"


def test_devices_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Ranks(rank, 4, rank).device("auto") for rank in range(2)] == ["cuda:0", "cuda:1"]
    assert Ranks(2, 4, 2).device("cpu") == "cpu" and Ranks().device("auto") == "auto"
    with pytest.raises(InputError, match="process 2 of this machine has no GPU, there are 2; start 2"):
        Ranks(2, 4, 2).device("cuda")
    with pytest.raises(InputError, match="the device is 'cuda:1', and 4 processes would share it"):
        Ranks(0, 4, 0).device("cuda:1")


def test_rows_of_a_step_that_ranks_do_not_divide(tmp_path: Path) -> None:
    run = ranks.made(tmp_path, per_device_train_batch_size=3)
    run.train()
    again = ranks.made(tmp_path, per_device_train_batch_size=2, resume_from_checkpoint=True)
    with pytest.raises(InputError, match=r"of another run: it differs in batch \(3, not 2\)"):
        again.train()
    state = tmp_path / "checkpoint-7" / "trainer_state.json"
    content = {**json.loads(state.read_text()), "ranks": 3}
    with pytest.raises(InputError, match="the run took 3 rows per step on 3 ranks, which 1 ranks of 2 rows do not"):
        again._keep_batch(content)
