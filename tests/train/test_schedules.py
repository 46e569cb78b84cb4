"""Learning rates: transformers' values, by name, by function and in a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

from llama2 import InputError
from llama2.train import schedules
from llama2.train.arguments import SCHEDULES, TrainingArguments
from llama2.train.objectives import NextToken
from llama2.train.packing import pack
from llama2.train.trainer import Trainer

# transformers 5.23: steps 0 to 10 of 10, the first 3 of them warm-up, peak 0.5.
RECORDED: list[tuple[str, dict[str, Any], list[float]]] = [
    ("constant", {}, [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
    ("constant_with_warmup", {}, [0.0, 0.166666667, 0.333333333, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
    (
        "linear",
        {},
        [
            0.0,
            0.166666667,
            0.333333333,
            0.5,
            0.428571429,
            0.357142857,
            0.285714286,
            0.214285714,
            0.142857143,
            0.071428571,
            0.0,
        ],
    ),
    (
        "cosine",
        {},
        [
            0.0,
            0.166666667,
            0.333333333,
            0.5,
            0.475242217,
            0.40587245,
            0.305630233,
            0.194369767,
            0.09412755,
            0.024757783,
            0.0,
        ],
    ),
    (
        "cosine",
        {"num_cycles": 1.5},
        [
            0.0,
            0.166666667,
            0.333333333,
            0.5,
            0.305630233,
            0.024757783,
            0.09412755,
            0.40587245,
            0.475242217,
            0.194369767,
            0.0,
        ],
    ),
    (
        "cosine_with_restarts",
        {"num_cycles": 2},
        [
            0.0,
            0.166666667,
            0.333333333,
            0.5,
            0.40587245,
            0.194369767,
            0.024757783,
            0.475242217,
            0.305630233,
            0.09412755,
            0.0,
        ],
    ),
    (
        "polynomial",
        {"lr_end": 0.1, "power": 2.0},
        [
            0.0,
            0.166666667,
            0.333333333,
            0.5,
            0.393877551,
            0.304081633,
            0.230612245,
            0.173469388,
            0.132653061,
            0.108163265,
            0.1,
        ],
    ),
    (
        "inverse_sqrt",
        {},
        [
            0.0,
            0.166666667,
            0.333333333,
            0.5,
            0.433012702,
            0.387298335,
            0.353553391,
            0.327326835,
            0.306186218,
            0.288675135,
            0.273861279,
        ],
    ),
    (
        "inverse_sqrt",
        {"timescale": 9},
        [
            0.0,
            0.166666667,
            0.333333333,
            0.5,
            0.474341649,
            0.452267017,
            0.433012702,
            0.416025147,
            0.400891863,
            0.387298335,
            0.375,
        ],
    ),
    (
        "cosine_with_min_lr",
        {"min_lr": 0.2},
        [
            0.0,
            0.166666667,
            0.333333333,
            0.5,
            0.48514533,
            0.44352347,
            0.38337814,
            0.31662186,
            0.25647653,
            0.21485467,
            0.2,
        ],
    ),
    (
        "cosine_with_min_lr",
        {"min_lr_rate": 0.25},
        [
            0.0,
            0.166666667,
            0.333333333,
            0.5,
            0.481431663,
            0.429404338,
            0.354222675,
            0.270777325,
            0.195595662,
            0.143568337,
            0.125,
        ],
    ),
    (
        "cosine_warmup_with_min_lr",
        {"min_lr_rate": 0.1},
        [
            0.166666667,
            0.333333333,
            0.5,
            0.477717995,
            0.415285205,
            0.32506721,
            0.22493279,
            0.134714795,
            0.072282005,
            0.05,
            0.072282005,
        ],
    ),
    (
        "cosine_warmup_with_min_lr",
        {"min_lr_rate": 0.1, "warmup_lr_rate": 0.3},
        [
            0.15,
            0.325,
            0.5,
            0.477717995,
            0.415285205,
            0.32506721,
            0.22493279,
            0.134714795,
            0.072282005,
            0.05,
            0.072282005,
        ],
    ),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 4},
        [0.0, 0.166666667, 0.333333333, 0.5, 0.5, 0.5, 0.5, 0.426776695, 0.25, 0.073223305, 0.0],
    ),
    (
        "warmup_stable_decay",
        {
            "num_decay_steps": 4,
            "num_stable_steps": 2,
            "warmup_type": "cosine",
            "decay_type": "1-sqrt",
            "min_lr_ratio": 0.1,
        },
        [0.05, 0.1625, 0.3875, 0.5, 0.5, 0.5, 0.275, 0.181801948, 0.110288568, 0.05, 0.05],
    ),
    (
        "warmup_stable_decay",
        {"num_decay_steps": 3, "warmup_type": "1-sqrt", "decay_type": "linear", "min_lr_ratio": 0.2},
        [0.1, 0.173401368, 0.269059892, 0.5, 0.5, 0.5, 0.5, 0.5, 0.366666667, 0.233333333, 0.1],
    ),
]


def optimizer(rate: float = 0.5) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


def rates(scheduler: Any, count: int = 11) -> list[float]:
    found = []
    for _ in range(count):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("name", "settings", "wanted"), RECORDED)
def test_schedules_are_transformers(name: str, settings: dict[str, Any], wanted: list[float]) -> None:
    own = [schedules.learning_rate(step, 10, 0.5, name, 3, settings) for step in range(11)]
    assert own == pytest.approx(wanted, abs=1e-8)
    assert rates(schedules.get_scheduler(name, optimizer(), 3, 10, settings)) == pytest.approx(wanted, abs=1e-8)


def test_every_schedule_is_recorded() -> None:
    assert {name for name, _, _ in RECORDED} | {schedules.PLATEAU} == set(SCHEDULES)
    assert {*schedules.SHAPES, schedules.PLATEAU} == set(SCHEDULES)


def test_the_functions_by_their_names() -> None:
    by_name = {(name, str(settings)): wanted for name, settings, wanted in RECORDED}
    made = [
        (schedules.get_constant_schedule(optimizer()), by_name["constant", "{}"]),
        (schedules.get_constant_schedule_with_warmup(optimizer(), 3), by_name["constant_with_warmup", "{}"]),
        (schedules.get_linear_schedule_with_warmup(optimizer(), 3, 10), by_name["linear", "{}"]),
        (schedules.get_cosine_schedule_with_warmup(optimizer(), 3, 10), by_name["cosine", "{}"]),
        (schedules.get_cosine_with_hard_restarts_schedule_with_warmup(optimizer(), 3, 10, 2), RECORDED[5][2]),
        (schedules.get_polynomial_decay_schedule_with_warmup(optimizer(), 3, 10, 0.1, 2.0), RECORDED[6][2]),
        (schedules.get_inverse_sqrt_schedule(optimizer(), 3), RECORDED[7][2]),
        (schedules.get_cosine_with_min_lr_schedule_with_warmup(optimizer(), 3, 10, min_lr=0.2), RECORDED[9][2]),
        (schedules.get_wsd_schedule(optimizer(), 3, 4, 10), RECORDED[13][2]),
    ]
    for scheduler, wanted in made:
        assert rates(scheduler) == pytest.approx(wanted, abs=1e-8)
    plateau = schedules.get_reduce_on_plateau_schedule(optimizer(), factor=0.1, patience=0)
    for value in (1.0, 2.0):
        plateau.step(value)
    assert plateau.get_last_lr() == pytest.approx([0.05])


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (
            "linear",
            {"num_cycles": 2},
            "lr_scheduler_kwargs has 'num_cycles', which 'linear' does not take; it takes none",
        ),
        ("warmup_stable_decay", {}, "needs num_decay_steps; give it in lr_scheduler_kwargs"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "steep"}, "decay_type is 'steep'; it must be one"),
        ("cosine_with_min_lr", {}, "min_lr is None and min_lr_rate None; give one of them"),
        ("cosine_with_min_lr", {"min_lr": 0.1, "min_lr_rate": 0.1}, "give one of them"),
        ("polynomial", {"lr_end": 1.0}, "lr_end is 1.0; it must lie below the learning rate"),
        ("reduce_lr_on_plateau", {"factr": 0.1}, "which 'reduce_lr_on_plateau' does not take"),
    ],
)
def test_settings_are_checked_before_anything_runs(tmp_path: Path, name: str, settings: Any, said: str) -> None:
    more = {"eval_strategy": "epoch"} if name == schedules.PLATEAU else {}
    args = TrainingArguments(str(tmp_path), lr_scheduler_type=name, lr_scheduler_kwargs=settings, **more)
    with pytest.raises(InputError, match=said):
        Trainer(tiny_model(torch.float32), args, objective=NextToken(), rows=[pack([([1, 2, 3], [1, 2, 3])])])
    with pytest.raises(InputError):
        schedules.get_scheduler(name, optimizer(), 1, 10, settings)


def test_names_and_numbers_that_a_scheduler_needs() -> None:
    with pytest.raises(InputError, match="the schedule is 'greedy'; it must be one of constant"):
        schedules.get_scheduler("greedy", optimizer(), 1, 2)
    with pytest.raises(InputError, match="'linear' needs num_training_steps"):
        schedules.get_scheduler("linear", optimizer(), 1)
    with pytest.raises(InputError, match="'cosine' needs num_warmup_steps"):
        schedules.get_scheduler("cosine", optimizer(), None, 2)
    with pytest.raises(InputError, match="give one of them"):
        schedules.get_wsd_schedule(optimizer(), 1, 2)


def test_a_run_follows_its_schedule(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), learning_rate=0.001, max_steps=10, warmup_steps=0.3, logging_steps=1, save_strategy="no",
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.25},
    )  # fmt: skip
    run = Trainer(tiny_model(torch.float32), args, objective=NextToken(), rows=[pack([([1, 2, 3], [1, 2, 3])])])
    run.train()
    found = [entry["learning_rate"] for entry in run.state.history if "loss" in entry]
    assert found == pytest.approx([rate / 500 for rate in RECORDED[10][2][:10]], abs=1e-9)


def test_a_rate_that_follows_what_is_measured(tmp_path: Path) -> None:
    args = TrainingArguments(
        str(tmp_path), learning_rate=1e-3, max_steps=6, logging_steps=1, save_steps=2, eval_strategy="steps",
        eval_steps=1, lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs={"factor": 0.5, "patience": 0},
    )  # fmt: skip

    def made() -> Trainer:
        rows = [pack([([1, 2, 3], [1, 2, 3])])]
        run = Trainer(tiny_model(torch.float32), args, objective=NextToken(), rows=rows, eval_rows=rows)
        measured = {0: 9.0, 1: 5.0, 2: 4.0, 3: 6.0, 4: 3.0, 5: 3.5, 6: 8.0}
        run.evaluate = lambda: {"eval_loss": measured[run.state.step]}  # type: ignore[method-assign,assignment]
        return run

    straight = made()
    straight.train()
    found = [entry["learning_rate"] for entry in straight.state.history if "loss" in entry]
    assert found == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4])
    again = made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [entry["learning_rate"] for entry in again.state.history if "loss" in entry] == found
