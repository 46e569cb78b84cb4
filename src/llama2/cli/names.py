"""Short names of models: what `-m smollm2` means.

A path that exists is itself. Then come the user's own names (models.toml in the folder of settings, lines such as
`mine = "owner/name:Q4_K_M"`), the names by which Ollama and LM Studio know their files, and the names below.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from llama2.cli.settings import config_folder
from llama2.errors import InputError

_CHAT = "TheBloke/Llama-2-{}-Chat-GGUF:Q4_K_M"
_BASE = "TheBloke/Llama-2-{}-GGUF:Q4_K_M"
BUILT_IN: dict[str, str] = {
    "smollm2": "bartowski/SmolLM2-135M-Instruct-GGUF:Q4_K_M",
    "smollm2:360m": "bartowski/SmolLM2-360M-Instruct-GGUF:Q4_K_M",
    "smollm2:1.7b": "bartowski/SmolLM2-1.7B-Instruct-GGUF:Q4_K_M",
    "tinyllama": "TheBloke/TinyLlama-1.1B-Chat-v1.0-GGUF:Q4_K_M",
    "llama2": _CHAT.format("7B"),
    **{f"llama2:{size.lower()}-chat": _CHAT.format(size) for size in ("7B", "13B", "70B")},
    **{f"llama2:{size.lower()}": _BASE.format(size) for size in ("7B", "13B", "70B")},
    "codellama": "TheBloke/CodeLlama-7B-Instruct-GGUF:Q4_K_M",
}
# What a name may look like; anything else is a path or a hub id, and no store is searched for it.
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+){0,3}(?::[\w.-]+)?")


def names_path(environment: Mapping[str, str]) -> Path:
    """The file of the user's own names."""
    return config_folder(environment) / "models.toml"


def own_names(environment: Mapping[str, str]) -> dict[str, str]:
    """The user's own names. Raises InputError for a file that is not lines of `name = "model"`."""
    path = names_path(environment)
    if not path.is_file():
        return {}
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is no TOML file: {error}; mend it, or move it away") from error
    for name, model in content.items():
        if not isinstance(model, str):
            raise InputError(f'{path}: {name} is {model!r}; it must be a text, such as "owner/name:Q4_K_M"')
    return content


def add_name(name: str, model: str, environment: Mapping[str, str]) -> Path:
    """Adds a name to the user's own; the file. Raises InputError for one that is there or cannot be a name."""
    import json

    from llama2.files import write_text

    path, names = names_path(environment), own_names(environment)
    if not _NAME.fullmatch(name):
        raise InputError(f"{name!r} cannot be the name of a model; use letters, digits and . _ - : /")
    if names.get(name, model) != model:
        raise InputError(f"{name!r} means {names[name]} already; change that line of {path}, or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    if name not in names:
        line = f"{json.dumps(name)} = {json.dumps(model)}\n"
        write_text(path, before + ("" if before.endswith("\n") or not before else "\n") + line)
    return path


def resolve_name(model: str, environment: Mapping[str, str] | None = None) -> str:
    """The path or hub id that a name means; anything else as it is."""
    if not _NAME.fullmatch(model) or os.path.lexists(model):
        return model
    own = own_names(os.environ if environment is None else environment)
    if model in own:
        return own[model]
    from llama2.cli.store import find_elsewhere

    if (path := find_elsewhere(model)) is not None:
        return str(path)
    return BUILT_IN.get(model, model)
