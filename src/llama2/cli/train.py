"""`llama2 train`: fine-tuning as a SageMaker training job, from the files that SageMaker puts under /opt/ml.

input/config/hyperparameters.json   the flags of `llama2 finetune` as texts, with task, model and data_file
input/data/CHANNEL/                 rows in train (or training) and validation (or eval, test); perhaps a model
checkpoints/                        mirrored by SageMaker; a job that finds one here goes on from it
model/                              the result
output/failure                      why the job failed

With several GPUs or machines the command becomes torchrun, which starts itself once for each GPU.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama2.cli import explain, finetune
from llama2.cli.args import option, parse
from llama2.cli.recipes import words_of
from llama2.errors import InputError, Llama2Error
from llama2.files import write_text

_TRAIN, _EVAL = ("train", "training"), ("validation", "eval", "test")
_MODEL = ("model", "model_id", "model_name_or_path")
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
_PORT = 7777  # on the first machine, where the others meet it
_LONGEST = 1024  # characters of a failure that SageMaker shows


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Fine-tune as a SageMaker training job: the flags of `llama2 finetune` come from hyperparameters.json, the rows
    from the channels train and validation, the model from the hyperparameter or the channel model. A job that was
    stopped goes on from its checkpoint; one that fails says why in output/failure."""

    root: str = option("/opt/ml", "the folder that SageMaker fills", metavar="FOLDER")


def run(options: TrainOptions) -> int:
    """Runs the command."""
    root = Path(options.root)
    try:
        if "RANK" not in os.environ and (command := _launcher(root)):
            os.execv(command[0], command)  # in this process's place, so that it hears SageMaker's SIGTERM
        code = _train(root)
    except KeyboardInterrupt:
        raise
    except Exception as error:
        known = isinstance(error, Llama2Error | OSError)
        said = explain(error) if known else f"{type(error).__name__}: {error}"
        _fail(root, said)
        raise
    return code


def _launcher(root: Path) -> list[str]:
    """The command that starts a process for every GPU of this machine, as one of the job's; [] where one is enough."""
    import torch

    resources = _json(root / "input" / "config" / "resourceconfig.json")
    hosts = resources.get("hosts") or ["localhost"]
    processes = max(1, torch.cuda.device_count())
    if len(hosts) * processes == 1:
        return []
    if resources.get("current_host", hosts[0]) not in hosts:
        raise InputError(f"the machine {resources['current_host']!r} is not among the job's hosts {', '.join(hosts)}")
    if network := resources.get("network_interface_name"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", network)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", network)
    words = [f"--nnodes={len(hosts)}", f"--nproc-per-node={processes}"]
    if len(hosts) > 1:
        place = hosts.index(resources.get("current_host", hosts[0]))
        words += [f"--node-rank={place}", f"--master-addr={hosts[0]}", f"--master-port={_PORT}"]
    else:
        words += ["--standalone", "--max-restarts=3"]
    return [sys.executable, "-m", "torch.distributed.run", *words, "-m", "llama2", "train", "--root", str(root)]


def _fail(root: Path, said: str) -> None:
    try:
        (root / "output").mkdir(parents=True, exist_ok=True)
        write_text(root / "output" / "failure", said[:_LONGEST])
    except OSError as error:  # the error itself must not be lost behind this one
        print(f"llama2: output/failure could not be written: {explain(error)}", file=sys.stderr)


def _train(root: Path) -> int:
    finetune.before_torch()
    from llama2.train.distributed import shutdown
    from llama2.train.finetune import Finetune

    options = _options(root)
    if options.dry_run:
        raise InputError("dry_run is for `llama2 finetune`: a training job has to leave a model; leave it out")
    recipe = finetune.recipe_of(options)
    args = finetune.arguments(options, str(root / "checkpoints"))
    args.resume_from_checkpoint = True
    job = Finetune(recipe, args, lambda said: print(said, file=sys.stderr))
    first = job.ranks.first
    with finetune.progress(options, first) as report:
        result = job.run(report)
    if first and not result.finished:
        print(f"llama2: stopped at step {result.step} of {result.steps}; the next job goes on from it", file=sys.stderr)
    elif first:
        _check(result.folder)
        finetune.show(job, result, options)
    shutdown()
    return 0 if result.finished else 130


def _check(folder: Path) -> None:
    """A job whose model was lost must not be called successful."""
    weights = [path for path in folder.glob("*.safetensors") if path.stat().st_size > 0]
    if not weights or not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        raise InputError(f"{folder} does not hold the model after the training; is the disk full?")


# -- hyperparameters ---------------------------------------------------------------------------------------------


def _options(root: Path) -> finetune.TaskOptions:
    given = _hyperparameters(root / "input" / "config")
    channels = root / "input" / "data"
    task = given.pop("task", "sft")
    if task not in finetune.TASKS:
        raise InputError(f"task is {task!r}; it must be one of {', '.join(finetune.TASKS)}")
    named = [given.pop(name) for name in _MODEL if name in given]
    wanted = given.pop("data_file", None)
    there = next((channels / name for name in _TRAIN if (channels / name).is_dir()), None)
    if there is None:
        raise InputError(f"{channels} has no channel train (or training); pass the rows as one")
    measured = next((channels / name for name in _EVAL if (channels / name).is_dir()), None)
    if measured is not None:
        given.setdefault("eval_data", str(_rows(measured, None)))
    if not named and not (channels / "model").is_dir():
        raise InputError("no model is given; set the hyperparameter model (a hub id), or pass a channel called model")
    model = named[0] if named else str(channels / "model")
    cls = finetune.TASKS[task]
    words = words_of(cls, given, "the hyperparameter ")
    options = parse(cls, f"llama2 train (task {task})", words)
    return replace(options, paths=(model, str(_rows(there, wanted)), str(root / "model")))


def _hyperparameters(folder: Path) -> dict[str, str]:
    """Values by name with underscores. SageMaker's are texts, its Python package quotes them as JSON once more."""
    if not (folder / "hyperparameters.json").exists():
        raise InputError(f"{folder / 'hyperparameters.json'} does not exist; is this a SageMaker container (--root)?")
    found = {}
    for name, value in _json(folder / "hyperparameters.json").items():
        if not name.startswith("sagemaker_"):
            found[name.lstrip("-").replace("-", "_")] = _plain(value)
    hosts = _json(folder / "resourceconfig.json").get("hosts", [])
    if len(hosts) > 1 and found.get("fsdp"):
        raise InputError(
            f"fsdp is {found['fsdp']!r} on {len(hosts)} machines, whose checkpoints need a folder that all share, and "
            "SageMaker's is one on each; set instance_count=1, or leave fsdp out"
        )
    return found


def _json(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is a JSON {type(content).__name__}, not an object")
    return content


def _plain(value: Any) -> str:
    if not isinstance(value, str):
        return str(value)
    try:
        inner = json.loads(value)
    except ValueError:
        return value
    return inner if isinstance(inner, str) else value


def _rows(channel: Path, wanted: str | None) -> Path:
    """The one file of rows in a channel."""
    if wanted is not None:
        return channel / wanted
    found = sorted(path for path in channel.iterdir() if path.suffix.lower() in _SUFFIXES)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(
            f"the channel {channel.name} must hold one file of rows ({', '.join(_SUFFIXES)}), and there "
            f"are {len(found)}: {names}; name one with the hyperparameter data_file, or join them"
        )
    return found[0]
