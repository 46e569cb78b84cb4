"""Estimate of a run's cost, from two of its steps: `--dry-run`. Nothing is written into its folder."""

import copy
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llama2 import memory
from llama2.checkpoint.arguments import resolve_device
from llama2.pretrained import PreTrainedModel
from llama2.train.arguments import TrainingArguments
from llama2.train.finetune import Finetune
from llama2.train.trainer import Trainer

_BRIEFLY = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no",
            "report_to": "none", "eval_on_start": False, "train_sampling_strategy": "sequential",
            "resume_from_checkpoint": None}  # fmt: skip
_FULL_MOMENTS, _BYTE_MOMENTS = 8, 2  # bytes of AdamW's moments per trained weight


@dataclass
class Rehearsal:
    """steps: of the whole run; tokens_per_second: of the second of two parts of it; hours: of all at that speed; peak
    and free: bytes of memory that the two took and that there were; files: what OUT will hold, in bytes; disk: bytes
    that are free there; part: what was run twice, a step or an iteration."""

    steps: int
    tokens_per_second: float
    hours: float
    peak: int
    free: int
    files: Mapping[str, int]
    disk: int
    part: str = "step"

    def lines(self) -> list[str]:
        """For people."""
        files = ", ".join(f"{name} {size_text(size)}" for name, size in self.files.items())
        lines = [
            f"{self.steps:,} steps, {time_text(self.hours)} at {self.tokens_per_second:,.0f} tokens per second (of the "
            f"second of two {self.part}s, without measuring, samples and saving)",
            f"memory: {size_text(self.peak)} at the longest rows, of {size_text(self.free)}",
            f"files: {files}; {size_text(self.disk)} free",
        ]
        if self.peak > 0.95 * self.free:
            lines.append(
                "that memory is too little or nearly so: a smaller --batch-size (with --gradient-accumulation-steps), "
                "--gradient-checkpointing, an adapter (--lora-r 16) or --load-in-4bit need less"
            )
        if sum(self.files.values()) > self.disk:
            lines.append("the disk is too small: --keep 1 holds one checkpoint at a time")
        return lines


def time_text(hours: float) -> str:
    """A duration, for people."""
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def size_text(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def rehearse(job: Finetune) -> Rehearsal:
    """Loads the model of a job and takes two steps: one of the longest rows, for the memory, and one of the first rows
    of the run, for the speed. The job itself stays as it is; it must not be run afterwards."""
    rows, size, whole, objective = list(job.data.items), _step_rows(job), job.args, job.task.objective(job.data.items)
    free = free_bytes(job.device)
    speeds: list[float] = []
    with briefly(job, twice(rows, size, objective.tokens), 2):
        model = job.loaded()
        trainer = job.trainer(model, lambda entry: speeds.append(entry["tokens_per_second"]))
        peak = peak_of(trainer)
        files = files_of(job, model, whole)
    steps = _steps(whole, len(rows), size)
    tokens = sum(map(objective.tokens, rows)) / len(rows) * size * steps
    return Rehearsal(steps, speeds[1], tokens / speeds[1] / 3600, peak, free, files, free_disk(job.folder))


@contextmanager
def briefly(job: Finetune, rows: Sequence[Any], steps: int) -> Iterator[None]:
    """Within it a job takes some steps on some rows, into a folder that vanishes."""
    whole, given, place = job.args, job.data, job.folder
    with tempfile.TemporaryDirectory() as folder:
        args = copy.copy(whole)
        vars(args).update(_BRIEFLY, output_dir=folder, max_steps=steps)
        job.args, job.folder = args, Path(folder)
        job.data = replace(given, items=list(rows), eval_items=[])
        try:
            yield
        finally:
            job.args, job.data, job.folder = whole, given, place


def twice(rows: Sequence[Any], size: int, tokens: Callable[[Any], int]) -> list[Any]:
    """The longest `size` rows, for the memory, and the first ones, for the speed; some again if too few."""
    longest = sorted(rows, key=tokens, reverse=True)[:size]
    chosen = [*longest, *rows[:size]]
    return [chosen[i % len(chosen)] for i in range(2 * size)]


def free_disk(place: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    return shutil.disk_usage(next(path for path in (place, *place.absolute().parents) if path.exists())).free


def _step_rows(job: Finetune) -> int:
    args = job.args
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * job.ranks.world)


def _steps(args: TrainingArguments, rows: int, size: int) -> int:
    if args.max_steps > 0:
        return int(args.max_steps)
    return int(-(-(max(-(-rows // size), 1) * args.num_train_epochs) // 1))


def peak_of(trainer: Trainer) -> int:
    """Trains, and returns the peak of memory in bytes."""
    device = next(trainer.network.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer.train()
    return peak_now(device)


def peak_now(device: str | torch.device) -> int:
    """The most bytes that this process has had so far, of a GPU's memory where the device is one."""
    kind = resolve_device(device)
    if kind.type == "cuda":
        return int(torch.cuda.max_memory_allocated(kind))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_bytes(device: str | torch.device) -> int:
    """Bytes that a run may take on the device."""
    kind = resolve_device(device)
    if kind.type == "cuda":
        return int(torch.cuda.mem_get_info(kind)[0])
    return memory.available_bytes()


def files_of(job: Finetune, model: PreTrainedModel, args: TrainingArguments) -> dict[str, int]:
    """Estimates the files in OUT: the result, and checkpoints with their moments."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = job.origin.lora is None or job.recipe.merge
    result = sum(p.nbytes for p in model.parameters()) if whole else 4 * trained
    moments = _BYTE_MOMENTS if args.optim == "adamw_8bit" else _FULL_MOMENTS
    kept = args.save_total_limit or 2
    name = "the model" if whole else "the adapter"
    return {name: result, f"{kept} checkpoints": kept * trained * (4 + moments)}
