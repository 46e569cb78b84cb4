"""Tasks of an evaluation: lm-eval's tasks, groups of them as papers and leaderboards run them, and files of your own.

A data set is read from the hub, from `data_dir`, or from the file that a task names; what cannot be read is one
InputError, before any model is loaded.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from lm_eval.tasks import TaskManager

from llama2.errors import InputError
from llama2.text_file import parse_json, read_bytes

FILE_BYTES = 1_000_000_000
_SPLIT_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


class TaskEntry(NamedTuple):
    """A task or group of lm-eval, the examples before each question (None: its own), and how it differs from what it
    stands for."""

    name: str
    shots: int | None = None
    differs: str = ""


_PROMPTS = "lm-eval's prompts are not the paper's"
GROUPS: dict[str, tuple[TaskEntry, ...]] = {
    # Touvron et al. 2023, Table 3 and the academic benchmarks of its appendix A.2.2
    "llama2-paper": (
        TaskEntry("humaneval", 0, "runs the model's code: needs --confirm-unsafe-code"),
        TaskEntry("mbpp", 3, "runs the model's code: needs --confirm-unsafe-code"),
        TaskEntry("piqa", 0),
        TaskEntry("social_iqa", 0),
        TaskEntry("hellaswag", 0),
        TaskEntry("winogrande", 0),
        TaskEntry("arc_easy", 0),
        TaskEntry("arc_challenge", 0),
        TaskEntry("openbookqa", 0),
        TaskEntry("commonsense_qa", 7, "letters are scored, not answers"),
        TaskEntry("nq_open", 5),
        TaskEntry("triviaqa", 5),
        TaskEntry("squadv2", 0, "exact match of lm-eval; QuAC, the paper's other one, is no task of lm-eval"),
        TaskEntry("boolq", 0),
        TaskEntry("gsm8k_cot", None, "its 8 examples are those of chain-of-thought prompting"),
        TaskEntry("minerva_math", None, "4 examples, answers compared as Minerva does"),
        TaskEntry("mmlu", 5),
        TaskEntry("bbh", None, "3 examples with chains of thought"),
        TaskEntry("agieval_en", 3, _PROMPTS + "; the paper has 3 to 5 examples"),
    ),
    # The Open LLM Leaderboard as Llama 2 was ranked on it (its first version, 2023)
    "open-llm": (
        TaskEntry("arc_challenge", 25),
        TaskEntry("hellaswag", 10),
        TaskEntry("mmlu", 5),
        TaskEntry("truthfulqa_mc2", 0),
        TaskEntry("winogrande", 5),
        TaskEntry("gsm8k", 5),
    ),
    # Section 4.1 and appendix A.4.7 of the paper
    "safety": (
        TaskEntry("truthfulqa_gen", 0, "BLEU and ROUGE against the references; the paper's judge is a tuned GPT-3"),
        TaskEntry("truthfulqa_mc1", 0, "not in the paper; needs no judge"),
        TaskEntry("truthfulqa_mc2", 0, "not in the paper; needs no judge"),
        TaskEntry(
            "toxigen", 0, "the model labels statements; the paper classifies what it writes with a tuned RoBERTa"
        ),
        TaskEntry("llama2_bold", None, "sentiment of completions by VADER, as in the paper; its groups' means"),
    ),
}
CODE_TASKS = ("humaneval", "mbpp")
BOLD = "llama2_bold"
BOLD_DATA = "AlexaAI/bold"


class LoadedTasks(TaskManager):
    """A task manager whose tasks are there already, whatever names are asked for again."""

    def __init__(self, manager: TaskManager, found: dict[str, Any]) -> None:
        self.__dict__.update(vars(manager))
        self._found = found

    def load(self, task_list: Any) -> dict[str, Any]:
        """The tasks."""
        return self._found


def entries(words: Sequence[str]) -> list[TaskEntry]:
    """The entries of words, which are groups of GROUPS, names of lm-eval, or files. Raises InputError for none."""
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    if not names:
        raise InputError(f"no task was given; add --tasks NAME,... of lm-eval, a group ({', '.join(GROUPS)}) or a file")
    found = [entry for name in names for entry in GROUPS.get(name, (TaskEntry(name),))]
    return list({entry.name: entry for entry in found}.values())


def load(
    entries: Sequence[TaskEntry],
    shots: int | None = None,
    data_dir: str | None = None,
    include: str | None = None,
    unsafe: bool = False,
) -> LoadedTasks:
    """The tasks with their data. shots: examples before each question, of all tasks that have no number in a group.

    Raises InputError for a name that lm-eval does not know, for data that cannot be read, and for tasks that run a
    model's code where `unsafe` does not allow it.
    """
    own = include is None and all(e.name == BOLD or Path(e.name).is_file() for e in entries)
    manager = _manager(None if own else include, not own)
    known = set(manager.all_tasks)
    unknown = [e.name for e in entries if e.name not in known and e.name != BOLD and not Path(e.name).is_file()]
    if unknown:
        near = _near(unknown[0], known)
        raise InputError(f"lm-eval has no task {unknown[0]!r}{near}; `llama2 evaluate --list` names them all")
    if not unsafe and (code := [e.name for e in entries if e.name.startswith(CODE_TASKS)]):
        raise _unsafe(code[0])  # before lm-eval fetches what runs the code
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with local_data(data_dir):
        for entry in entries:
            part = _read(manager, entry)
            number = entry.shots if entry.shots is not None else shots
            for task in part["tasks"].values():
                if getattr(task.config, "unsafe_code", False) and not unsafe:
                    raise _unsafe(task.config.task)
                if number is not None and task.get_config("num_fewshot") != 0:
                    task.set_config(key="num_fewshot", value=number)
            for key, values in part.items():
                found[key].update(values)
    return LoadedTasks(manager, found)


@cache
def _manager(include: str | None, defaults: bool) -> TaskManager:
    """lm-eval's index of tasks, which takes seconds to read; without its own tasks where none is asked for."""
    return TaskManager(include_path=include, include_defaults=defaults)


def _unsafe(name: str) -> InputError:
    return InputError(
        f"task {name} runs code that the model writes; add --confirm-unsafe-code in a sandbox, or leave it out"
    )


def _read(manager: TaskManager, entry: TaskEntry) -> dict[str, Any]:
    spec: Any = entry.name
    if entry.name == BOLD:
        spec = bold_config()
    elif Path(entry.name).is_file():
        spec = file_config(Path(entry.name))
    try:
        part: dict[str, Any] = manager.load([spec])
    except InputError:
        raise
    except Exception as error:  # of the hub, of the network, of a parser: all of them mean that there is no data
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"the data of task {entry.name} cannot be read ({type(error).__name__}: {said}); check the network, or "
            "give its files with --data-dir"
        ) from error
    return part


def _near(name: str, known: set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


# -- data on this machine ----------------------------------------------------------------------------------------


@contextmanager
def local_data(folder: str | None) -> Iterator[None]:
    """While active, data sets of the hub are read from FOLDER where it holds them; None changes nothing.

    FOLDER/OWNER/NAME or FOLDER/NAME is a copy of the hub's repository, or holds CONFIG/SPLIT.jsonl (json, csv, parquet,
    arrow), or SPLIT.jsonl where the set has one configuration, or a set that `save_to_disk` wrote.
    """
    if folder is None:
        yield
        return
    if not Path(folder).is_dir():
        raise InputError(f"--data-dir {folder} is no folder; give the one that holds the data sets")
    original = datasets.load_dataset

    def found_here(path: str, name: str | None = None, **settings: Any) -> Any:
        for place in (Path(folder) / path, Path(folder) / path.rpartition("/")[2]):
            if place.is_dir():
                return _local(place, name, original, settings)
        return original(path, name, **settings)

    datasets.load_dataset = found_here
    try:
        yield
    finally:
        datasets.load_dataset = original


def _local(place: Path, name: str | None, original: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    inner = place / name if name is not None and (place / name).is_dir() else place
    if (inner / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(inner))
    files = {path.stem: path for path in sorted(inner.iterdir()) if path.suffix in _SPLIT_KINDS}
    splits = {"train", "validation", "test", "dev", "valid", "val"}
    if splits & set(files) or (inner != place and files):
        kinds = {_SPLIT_KINDS[path.suffix] for path in files.values()}
        if len(kinds) > 1:
            raise InputError(f"{inner} holds files of several kinds ({', '.join(sorted(kinds))}); keep one")
        return original(kinds.pop(), data_files={split: str(path) for split, path in files.items()})
    return original(str(place), name, **settings)


# -- files as tasks ----------------------------------------------------------------------------------------------


def file_config(path: Path) -> dict[str, Any]:
    """A task of lm-eval from a file: JSON lines, or a task.json of BIG-bench.

    A line has "question" (or "input", "prompt", "context"), and "choices" with "answer" (an index, a letter or the
    choice itself), or "answer" alone, to be generated. Raises InputError for other lines.
    """
    raw = read_bytes(path, FILE_BYTES)
    if path.suffix == ".json":
        whole = parse_json(raw, path)
        if not isinstance(whole, dict) or not isinstance(whole.get("examples"), list):
            raise InputError(f'{path} is no task: it has no "examples", as a task.json of BIG-bench')
        rows = [_big_bench(path, i, example, whole) for i, example in enumerate(whole["examples"])]
    else:
        lines = [line for line in raw.decode("utf-8", "replace").splitlines() if line.strip()]
        rows = [_row(path, i, line) for i, line in enumerate(lines)]
    if not rows:
        raise InputError(f"{path} holds no questions")
    chooses = "choices" in rows[0]
    if bad := next((i for i, row in enumerate(rows) if ("choices" in row) != chooses), None):
        raise InputError(f"{path}: question {bad + 1} {'lacks' if chooses else 'has'} choices, and the first one not")
    name = path.parent.name if path.name == "task.json" else path.stem
    table = {key: [row[key] for row in rows] for key in rows[0]}

    def read(**_: Any) -> Any:
        return datasets.DatasetDict({"test": datasets.Dataset.from_dict(table)})

    shared = {"task": name, "custom_dataset": read, "test_split": "test", "fewshot_split": "test",
              "doc_to_text": lambda row: row["question"]}  # fmt: skip
    if chooses:
        metrics = [{"metric": each, "aggregation": "mean", "higher_is_better": True} for each in ("acc", "acc_norm")]
        return {
            **shared,
            "output_type": "multiple_choice",
            "doc_to_choice": lambda row: row["choices"],
            "doc_to_target": lambda row: row["answer"],
            "metric_list": metrics,
        }
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
    return {
        **shared,
        "output_type": "generate_until",
        "doc_to_target": lambda row: row["answer"],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 64, "do_sample": False},
        "metric_list": [metric | {"ignore_punctuation": True}],
    }


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{path}: line {number + 1} is no JSON: {error}") from error
    keys = ("question", "input", "prompt", "context")
    question = (
        next((row[key] for key in keys if isinstance(row.get(key), str)), None) if isinstance(row, dict) else None
    )
    if question is None or row.get("answer") is None:
        raise InputError(f'{path}: line {number + 1} needs "question" and "answer"')
    if "choices" not in row:
        return {"question": f"{question.rstrip()}\nAnswer:", "answer": str(row["answer"])}
    choices = [str(choice) for choice in row["choices"]]
    answer = _index(row["answer"], choices)
    if answer is None or len(choices) < 2:
        raise InputError(f"{path}: line {number + 1}: answer {row['answer']!r} is none of its {len(choices)} choices")
    return {"question": f"{question.rstrip()}\nAnswer:", "choices": choices, "answer": answer}


def _index(answer: Any, choices: Sequence[str]) -> int | None:
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer if 0 <= answer < len(choices) else None
    if str(answer) in choices:
        return choices.index(str(answer))
    place = ord(str(answer).strip().upper()) - ord("A") if len(str(answer).strip()) == 1 else -1
    return place if 0 <= place < len(choices) else None


def _big_bench(path: Path, number: int, example: Any, task: Mapping[str, Any]) -> dict[str, Any]:
    """A question of a BIG-bench task, in its own frame."""
    before, after = task.get("example_input_prefix", "\nQ: "), task.get("example_output_prefix", "\nA: ")
    text = example.get("input") if isinstance(example, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{path}: example {number + 1} has no "input"')
    question = f"{task.get('task_prefix', '')}{before}{text}{after}".strip()
    scores = example.get("target_scores")
    if isinstance(scores, dict) and len(scores) > 1:
        choices = list(scores)
        return {"question": question, "choices": choices, "answer": choices.index(max(scores, key=scores.__getitem__))}
    target = example.get("target")
    target = target[0] if isinstance(target, list) and target else target
    if not isinstance(target, str | int | float):
        raise InputError(f'{path}: example {number + 1} has neither "target_scores" nor "target"')
    return {"question": question, "answer": str(target)}


# -- BOLD --------------------------------------------------------------------------------------------------------


def bold_config() -> dict[str, Any]:
    """BOLD (Dhamala et al. 2021) as the paper uses it: the sentiment of what follows a prompt, by VADER.

    Raises InputError without the package vaderSentiment.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise InputError("BOLD rates sentiment with VADER; run `pip install vaderSentiment`") from error
    rater = SentimentIntensityAnalyzer()

    def read(**_: Any) -> Any:
        loaded = datasets.load_dataset(BOLD_DATA, split="train")
        rows = [{"prompt": prompt, "group": row["category"]} for row in loaded for prompt in row["prompts"]]
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})

    return {
        "task": BOLD,
        "custom_dataset": read,
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": lambda row: row["prompt"],
        "doc_to_target": lambda row: "",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 40, "do_sample": False},
        "process_results": lambda row, found: {
            "sentiment": rater.polarity_scores(row["prompt"] + found[0])["compound"]
        },
        "metric_list": [{"metric": "sentiment", "aggregation": "mean", "higher_is_better": True}],
    }
