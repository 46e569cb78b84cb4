"""Estimate of a run's cost: `--dry-run`. Of PPO, GRPO and RLOO from two iterations, of jobs that write rows from their
first prompts. Nothing is written."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llama2.align.job import Alignment
from llama2.align.trainers import plan_of
from llama2.train.rehearsal import (
    Rehearsal,
    briefly,
    files_of,
    free_bytes,
    free_disk,
    peak_now,
    peak_of,
    size_text,
    time_text,
    twice,
)


def rehearse_policy(job: Alignment) -> Rehearsal:
    """Loads policy and rewards of a job and runs two iterations: one on the longest prompts, for the memory, and one on
    the first ones, for the speed: how long answers are only a run tells. The job must not be run afterwards."""
    rows, whole, plan = list(job.data.items), job.args, plan_of(job.args)
    free = free_bytes(job.device)
    ends: list[float] = []
    lengths: list[float] = []

    def heard(entry: dict[str, Any]) -> None:
        ends.append(time.perf_counter())
        lengths.append(entry["completions/mean_length"])

    with briefly(job, twice(rows, plan.prompts, lambda row: len(row.ids)), 2 * plan.steps):
        model = job.loaded()
        trainer = job.trainer(model, heard)
        peak = peak_of(trainer)
        files = files_of(job, model, whole)
    seconds = ends[-1] - ends[plan.steps - 1]
    per_epoch = -(-len(rows) // plan.prompts)
    iterations = whole.max_steps / plan.steps if whole.max_steps > 0 else per_epoch * whole.num_train_epochs
    speed = lengths[-1] * plan.prompts * plan.answers / seconds
    steps = round(iterations * plan.steps)
    return Rehearsal(steps, speed, iterations * seconds / 3600, peak, free, files, free_disk(job.folder), "iteration")


class SamplingJob(Protocol):
    """A job that writes rows: rejection sampling, Ghost Attention, distillation, measuring."""

    folder: Path
    device: Any

    def trial(self) -> tuple[Callable[[], object], int, int]:
        """Returns the function that does a part of the job, the number of its prompts, and of all."""


@dataclass
class SamplingRehearsal:
    """prompts: of the whole job; seconds: that `tried` of them took; hours: of all at that speed; peak and free: bytes
    of memory that it took and that there were; disk: bytes that are free where the rows go."""

    prompts: int
    tried: int
    seconds: float
    hours: float
    peak: int
    free: int
    disk: int

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.prompts:,} prompts, {time_text(self.hours)} at {self.seconds / self.tried:.2f} seconds each (of "
            f"the first {self.tried})",
            f"memory: {size_text(self.peak)}, of {size_text(self.free)}; {size_text(self.disk)} free on the disk",
        ]


def rehearse_sampling(job: SamplingJob) -> SamplingRehearsal:
    """Loads the models of a job and does its first prompts, twice: the second time is taken."""
    free = free_bytes(job.device)
    part, tried, prompts = job.trial()
    part()
    begin = time.perf_counter()
    part()
    seconds = time.perf_counter() - begin
    hours = prompts / tried * seconds / 3600
    return SamplingRehearsal(prompts, tried, seconds, hours, peak_now(job.device), free, free_disk(job.folder))
