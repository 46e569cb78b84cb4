"""What a run will take, from two of its steps: `--dry-run`. Nothing is written into its folder."""

import copy
import resource
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llama2 import memory
from llama2.checkpoint.arguments import resolve_device
from llama2.pretrained import PreTrainedModel
from llama2.train.finetune import Finetune

_BRIEFLY = {"max_steps": 2, "save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no",
            "report_to": "none", "eval_on_start": False, "train_sampling_strategy": "sequential",
            "resume_from_checkpoint": None}  # fmt: skip
_FULL_MOMENTS, _BYTE_MOMENTS = 8, 2  # bytes of AdamW's moments per trained weight


@dataclass
class Rehearsal:
    """steps: of the whole run; tokens_per_second: of the second step; hours: of all steps at that speed; peak and free:
    bytes of memory that the two steps took and that there were; files: what OUT will hold, in bytes; disk: bytes that
    are free there."""

    steps: int
    tokens_per_second: float
    hours: float
    peak: int
    free: int
    files: Mapping[str, int]
    disk: int

    def lines(self) -> list[str]:
        """For people."""
        took = f"{self.hours:.1f} hours" if self.hours >= 1 else f"{60 * self.hours:.1f} minutes"
        files = ", ".join(f"{name} {_size(size)}" for name, size in self.files.items())
        lines = [
            f"{self.steps:,} steps, {took} at {self.tokens_per_second:,.0f} tokens per second (of the second of two "
            "steps, without measuring, sampling and saving)",
            f"memory: {_size(self.peak)} at the longest rows, of {_size(self.free)}",
            f"files: {files}; {_size(self.disk)} free",
        ]
        if self.peak > 0.95 * self.free:
            lines.append(
                "that memory is too little or nearly so: a smaller --batch-size (with --gradient-accumulation-steps), "
                "--gradient-checkpointing, an adapter (--lora-r 16) or --load-in-4bit need less"
            )
        if sum(self.files.values()) > self.disk:
            lines.append("the disk is too small: --keep 1 holds one checkpoint at a time")
        return lines


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def rehearse(job: Finetune) -> Rehearsal:
    """Loads the model of a job and takes two steps: one of the longest rows, for the memory, and one of the first rows
    of the run, for the speed. The job itself stays as it is; it must not be run afterwards."""
    rows, size = list(job.data.items), _step_rows(job)
    free = _free(job.device)
    with tempfile.TemporaryDirectory() as folder:
        args = copy.copy(job.args)
        vars(args).update(_BRIEFLY, output_dir=folder)
        whole, given, place = job.args, job.data, job.folder
        job.args, job.folder = args, Path(folder)
        try:
            model = job.loaded()
            objective = job.task.objective(rows)
            longest = sorted(rows, key=objective.tokens, reverse=True)[:size]
            chosen = [*longest, *rows[:size]]
            job.data = replace(given, items=_filled(chosen, 2 * size), eval_items=[])
            found, peak = _measured(job, model)
            files = _files(job, model, whole)
        finally:
            job.args, job.data, job.folder = whole, given, place
    steps = _steps(whole, len(rows), size)
    tokens = sum(map(objective.tokens, rows)) / len(rows) * size * steps
    disk = shutil.disk_usage(next(path for path in (place, *place.absolute().parents) if path.exists())).free
    return Rehearsal(steps, found, tokens / found / 3600, peak, free, files, disk)


def _step_rows(job: Finetune) -> int:
    args = job.args
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * job.ranks.world)


def _filled(rows: Sequence[Any], count: int) -> list[Any]:
    """As many rows, the first ones again where there are too few."""
    return [rows[i % len(rows)] for i in range(count)]


def _steps(args: Any, rows: int, size: int) -> int:
    if args.max_steps > 0:
        return int(args.max_steps)
    return int(-(-(max(-(-rows // size), 1) * args.num_train_epochs) // 1))


def _measured(job: Finetune, model: PreTrainedModel) -> tuple[float, int]:
    """Tokens per second of the second step, and the peak of memory."""
    speeds: list[float] = []
    trainer = job.trainer(model, lambda entry: speeds.append(entry["tokens_per_second"]))
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    trainer.train()
    assert len(speeds) == 2
    if device.type == "cuda":
        return speeds[1], int(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return speeds[1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _free(device: str | torch.device) -> int:
    """Bytes that a run may take on the device."""
    kind = resolve_device(device)
    if kind.type == "cuda":
        return int(torch.cuda.mem_get_info(kind)[0])
    return memory.available_bytes()


def _files(job: Finetune, model: PreTrainedModel, args: Any) -> dict[str, int]:
    """What OUT will hold: the result, and checkpoints with their moments."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = job.origin.lora is None or job.recipe.merge
    result = sum(p.nbytes for p in model.parameters()) if whole else 4 * trained
    moments = _BYTE_MOMENTS if args.optim == "adamw_8bit" else _FULL_MOMENTS
    kept = args.save_total_limit or 2
    name = "the model" if whole else "the adapter"
    return {name: result, f"{kept} checkpoints": kept * trained * (4 + moments)}
