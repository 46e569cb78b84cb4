"""Recipes in files: `llama2 finetune --config FILE`, a .yaml or .json file of flags, or the finetune.json of a run.

Names are those of the flags, or of TrainingArguments and Recipe; what the command line says beside it wins.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from llama2.cli.args import parse
from llama2.errors import InputError
from llama2.hf_argument_parser import read_options

# Field of TrainingArguments, or of TRL's scripts -> flag, where the two are called differently.
NAMES = {
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "lr_scheduler_type": "schedule",
    "save_total_limit": "keep",
    "resume_from_checkpoint": "resume",
    "model_name_or_path": "model",
    "dataset_name": "data",
    "dataset_config": "data_config",
    "dataset_train_split": "split",
}
_LORA = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "target_modules": "target_modules",
         "use_rslora": "use_rslora", "use_dora": "use_dora"}  # fmt: skip
# What the command works out by itself from its flags.
_DERIVED = {"output_dir", "eval_on_start", "per_device_eval_batch_size", "use_cpu", "bf16", "eval_strategy", "fsdp",
            "learning_rate", "resume_from_checkpoint"}  # fmt: skip
_PATHS = ("model", "data", "output_dir")


def expanded(words: Sequence[str], tasks: Mapping[str, type[Any]]) -> list[str]:
    """The words of a command line with the content of --config FILE in front; as they are without it.

    MODEL, DATA and OUT on the command line take the place of the file's in that order. Raises InputError for a file
    that cannot be read or that says what there is no flag for.
    """
    own, file = _without_config(words)
    if file is None:
        return own
    given = read_recipe(Path(file))
    task = own.pop(0) if own and own[0] in tasks else str(given.get("task") or "sft")
    given.pop("task", None)
    if task not in tasks:
        raise InputError(f"{file}: task is {task!r}; it must be one of {', '.join(tasks)}")
    for word in [word for word in own if word.startswith("--no-") and word[5:].replace("-", "_") in given]:
        if isinstance(given[word[5:].replace("-", "_")], bool):  # of a switch that the file turns on
            given.pop(word[5:].replace("-", "_"))
            own.remove(word)
    paths = [given.pop(name, None) for name in _PATHS]
    first = parse(tasks[task], f"llama2 finetune {task}", own)
    if getattr(first, "output_dir", None):
        paths = paths[:2]
    here = [str(path) for path in paths[len(first.paths) :] if path is not None]
    return [task, *words_of(tasks[task], given, f"{file}: "), *own, *here]


def _without_config(words: Sequence[str]) -> tuple[list[str], str | None]:
    own, file = list(words), None
    for i, word in enumerate(own):
        if word == "--":
            break
        if word == "--config" and i + 1 < len(own):
            file, own = own[i + 1], [*own[:i], *own[i + 2 :]]
            break
        if word.startswith("--config="):
            file, own = word.partition("=")[2], [*own[:i], *own[i + 1 :]]
            break
    return own, file


def read_recipe(file: Path) -> dict[str, Any]:
    """Reads a file's settings, by the names of flags. Raises InputError where it is no object."""
    if not file.is_file():
        raise InputError(
            f"{file} does not exist; --config takes a .yaml or .json file, such as the finetune.json of a run"
        )
    content = read_options(file)
    if isinstance(content.get("recipe"), dict):  # a finetune.json
        content = {**_arguments(content.get("arguments") or {}), **_chosen(content["recipe"])}
    found = {str(name).replace("-", "_"): value for name, value in content.items()}
    found = {NAMES.get(name, name): value for name, value in found.items() if value is not None}
    adapter = found.pop("lora", None)
    if isinstance(adapter, dict):
        found |= _adapter(file, adapter)
    return found


def _arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """Of the arguments of a run those that are not the defaults, nor follow from the rest."""
    from llama2.train.trainer import TrainingArguments

    usual = {name: _plain(value) for name, value in vars(TrainingArguments(output_dir="out")).items()}
    kept = {name: value for name, value in content.items() if name not in _DERIVED and value != usual.get(name)}
    return kept | {"learning_rate": content.get("learning_rate"), "bf16": content.get("bf16") or None}


def _chosen(content: Mapping[str, Any]) -> dict[str, Any]:
    """Of a recipe that was written what is not the default."""
    from llama2.train.recipe import TASKS, defaults_of

    task = content.get("task") if content.get("task") in TASKS else "sft"
    own, all_tasks = defaults_of(str(task)), {name for one in TASKS for name in defaults_of(one)}
    # Files of earlier versions hold the settings of all tasks, of which those of others had no effect.
    kept = {name: value for name, value in content.items() if name in own or name not in all_tasks}
    return {name: value for name, value in kept.items() if value not in (own.get(name), _plain(own.get(name)))}


def _plain(value: Any) -> Any:
    """As a finetune.json holds it."""
    return json.loads(json.dumps(value, default=str))


def _adapter(file: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    from llama2.lora_config import LoraConfig

    usual = {f.name: _plain(getattr(LoraConfig(), f.name)) for f in fields(LoraConfig)}
    for name, value in given.items():
        if name not in _LORA and value != usual.get(name):
            raise InputError(f"{file}: the adapter has {name} {value!r}, which no flag says; use Finetune in Python")
    return {_LORA[name]: value for name, value in given.items() if name in _LORA}


def words_of(cls: type[Any], values: Mapping[str, Any], where: str = "") -> list[str]:
    """The words of a command line that say the same as these values by name; true and false of a switch may be texts.

    A field of TrainingArguments without a flag is given by --set.
    """
    defaults = {f.name: f.default for f in fields(cls)}
    known = _training_arguments() if set(values) - set(defaults) else set()
    words = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if name not in defaults and name in known:
            words.append(f"--set={name}={json.dumps(value)}")
        elif name not in defaults:
            words.append(f"{flag}={_text(value)}")  # which is then refused by its name
        elif isinstance(defaults[name], bool) or name == "packing":
            words += _switch(flag, value, defaults[name], where)
        else:
            words.append(f"{flag}={_text(value)}")
    return words


def _switch(flag: str, value: Any, default: Any, where: str) -> list[str]:
    if str(value).lower() not in ("true", "false"):
        raise InputError(f"{where}{flag[2:].replace('-', '_')} is {value!r}; it must be true or false")
    on = str(value).lower() == "true"
    if default is None or default:
        return [flag if on else f"--no-{flag[2:]}"]
    return [flag] if on else []


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{name}={column}" for name, column in value.items())
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _training_arguments() -> set[str]:
    from llama2.train.trainer import TrainingArguments

    return {f.name for f in fields(TrainingArguments)}


def set_values(pairs: Sequence[str], known: Callable[[str], bool]) -> dict[str, Any]:
    """Of --set NAME=VALUE: values are JSON where they can be, else texts. Raises InputError for another name."""
    found = {}
    for pair in pairs:
        name, sign, text = pair.partition("=")
        if not sign or not known(name):
            raise InputError(f"--set is {pair!r}; give a field of TrainingArguments and its value: adam_beta2=0.95")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found
