"""The table of tasks: settings are flags and fields of recipes alike, with the rates that the docs name."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from llama2 import InputError, TrainingArguments
from llama2.cli.args import parse
from llama2.cli.finetune import SUMMARY, arguments, recipe_of
from llama2.cli.finetune import TASKS as OPTIONS
from llama2.train.mixing import mixed
from llama2.train.recipe import Recipe
from llama2.train.tasks import TASKS, Task

DOCS = Path(__file__).parents[2] / "docs"
COMMON: dict[str, Any] = {"model": "m", "data": "d", "output_dir": "o"}
# Peak rates of all weights and of an adapter.
RATES = {"sft": (2e-5, 2e-4), "dpo": (1e-6, 5e-6), "classify": (2e-5, 2e-4), "pretrain": (5e-5, 2e-4)}


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder: what is none is a hub id, and is asked for whether it is an adapter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()


@pytest.mark.parametrize("task", TASKS)
def test_a_row_is_whole(task: str) -> None:
    kind = TASKS[task]
    assert kind.name == task and kind.summary == SUMMARY[task] and kind.__doc__ == OPTIONS[task].__doc__
    assert all(0 < rate <= 1e-3 for rate in kind.rates)
    page, _, anchor = kind.page.partition("#")
    headings = re.findall(r"^#+ (.*)", (DOCS / page).read_text(), re.M)
    anchors = ["".join(c for c in h.lower() if c.isalnum() or c in " -").replace(" ", "-") for h in headings]
    assert not anchor or anchor in anchors
    unknown = set(kind.arguments) - {f.name for f in fields(TrainingArguments)}
    assert not unknown and not set(kind.defaults) - {f.name for f in fields(OPTIONS[task])}


@pytest.mark.parametrize("task", TASKS)
def test_settings_are_flags_and_fields_of_the_recipe(task: str) -> None:
    own = {f.name: f.default for f in fields(TASKS[task])}  # type: ignore[arg-type]
    recipe = Recipe(task=task, **COMMON)
    assert isinstance(recipe, Recipe) and isinstance(recipe, TASKS[task]) and isinstance(recipe, Task)
    assert {name: getattr(recipe, name) for name in own} == own
    options = parse(OPTIONS[task], "", ["m", "d", "o"])
    assert recipe_of(options) == recipe
    assert {name: getattr(options, name) for name in own} == own


@pytest.mark.parametrize(("task", "rates"), RATES.items())
def test_the_first_tasks_train_as_they_did(task: str, rates: tuple[float, float]) -> None:
    whole = arguments(parse(OPTIONS[task], "", ["m", "d", "o"]))
    adapter = arguments(parse(OPTIONS[task], "", ["m", "d", "o", "--lora-r", "4"]))
    assert (whole.learning_rate, adapter.learning_rate) == rates
    for args in (whole, adapter):
        assert (args.num_train_epochs, args.per_device_train_batch_size, args.warmup_ratio) == (3, 4, 0.03)
        assert (args.lr_scheduler_type, args.weight_decay, args.max_grad_norm, args.seed) == ("cosine", 0, 1, 42)
        assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-8)


@pytest.mark.parametrize(
    ("task", "settings", "said"),
    [
        ("chat", {}, "task is 'chat'; it must be one of sft"),
        ("sft", {"problem_type": "regression"}, "the task sft has no setting 'problem_type'; classify has it"),
        ("sft", {"betta": 1}, "the task sft has no setting 'betta'$"),
        ("dpo", {"fresh": True}, "no setting 'fresh'; pretrain has it"),
        ("dpo", {"beta": 0}, "beta is 0; it must be above 0"),
        ("classify", {"threshold": 1.0}, "threshold is 1.0; it must lie between 0 and 1"),
    ],
)
def test_a_setting_of_another_task_is_refused(task: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Recipe(task=task, **COMMON, **settings)


def test_data_sets_are_mixed_by_their_shares(tmp_path: Path) -> None:
    rows = [{"text": f"a{i}"} for i in range(60)]
    others = [("b", 0.3, [{"text": f"b{i}"} for i in range(100)]), ("c", 0.1, [{"text": f"c{i}"} for i in range(4)])]
    found, lines = mixed(rows, others, 1)
    texts = [row["text"] for row in found]
    assert texts[:60] == [row["text"] for row in rows] and len(set(texts)) == len(texts)
    assert [sum(text[0] == name for text in texts) for name in "abc"] == [60, 30, 4]
    assert lines == ["b: 30 of 100 rows, 31.9% of all", "c: 4 of 4 rows, 4.3% of all instead of 10.0%: it has no more"]
    assert mixed(rows, others, 1)[0] == found != mixed(rows, others, 2)[0]
    assert mixed(rows, [], 1) == (rows, [])


@pytest.mark.parametrize(
    ("mix", "said"),
    [(("b.jsonl",), "mix is 'b.jsonl'; give DATA=SHARE"), (("b=1.5",), "mix is 'b=1.5'"), (("b=x",), "mix is 'b=x'"),
     (("b=0.5", "c=0.5"), "the shares of mix are 1 in all")],
)  # fmt: skip
def test_shares_that_make_no_sense(mix: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Recipe(task="sft", **COMMON, mix=mix)


def test_the_flag_of_a_mixture() -> None:
    assert recipe_of(parse(OPTIONS["reward"], "", ["m", "d", "o", "--mix", "b.jsonl=0.3,c=0.1"])).mix == (
        "b.jsonl=0.3",
        "c=0.1",
    )
