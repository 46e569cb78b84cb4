"""Tokenizer folders read: which files there are, and the constructor arguments that they hold."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llama2.errors import CheckpointError, MissingDependencyError, TokenizerError
from llama2.files import settle
from llama2.schema import ANY, FLAG, Kind, Schema, check, either, maybe, real, several, table, text, whole
from llama2.text_file import TEMPLATE_BYTES, linked_inside, read_object, read_utf8
from llama2.tokenizer.added import AddedToken, as_added_token, content_of
from llama2.tokenizer.special import NAMES

HUB_ARGUMENTS = (
    "revision",
    "cache_dir",
    "token",
    "local_files_only",
    "force_download",
    "proxies",
    "resume_download",
    "use_auth_token",
)
TEMPLATE, TEMPLATE_JSON, TEMPLATES = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
_HUB = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# keys of foreign tokenizer_config.json files that only say how another library was to load them
_FOREIGN = ("tokenizer_class", "tokenizer_file", "name_or_path", "auto_map", "backend", "is_local", "vocab_file",
            "tokenizer_object", "verbose")  # fmt: skip
_SPECIAL = (*NAMES, "additional_special_tokens")

_TOKEN_ID = whole(0, 2**31 - 1)


def _is_token(value: Any) -> bool:
    """A token as files write it: its text, or an object with it and flags."""
    if isinstance(value, dict):
        flags = ("single_word", "lstrip", "rstrip", "special")
        known = all(isinstance(value.get(flag, False), bool) for flag in flags)
        return (
            known
            and isinstance(value.get("normalized"), bool | None)
            and isinstance(value.get("content"), str)
            and len(value["content"]) <= MAX_TOKEN
        )
    return isinstance(value, str) and len(value) <= MAX_TOKEN


MAX_TOKEN = 1000  # characters; the longest token in use has a hundred
_TOKEN = Kind(f"a token: a text of at most {MAX_TOKEN} characters, or an object with it as content", _is_token)
_TOKENS = several(_TOKEN, 100_000)
_SCHEMA: Schema = {
    **dict.fromkeys(NAMES, maybe(_TOKEN)),
    "additional_special_tokens": maybe(_TOKENS),
    "extra_special_tokens": maybe(either(_TOKENS, table(_TOKEN, 100_000))),
    "added_tokens_decoder": Kind(
        "at most 1000000 tokens by id",
        lambda value: isinstance(value, dict)
        and len(value) <= 1_000_000
        and all(key.isdecimal() and len(key) < 10 and _is_token(token) for key, token in value.items()),
    ),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "legacy",
                     "spaces_between_special_tokens", "split_special_tokens", "use_default_system_prompt", "use_fast"),
                    maybe(FLAG)),
    **dict.fromkeys(("model_max_length", "max_len"), maybe(real(0))),
    **dict.fromkeys(("padding_side", "truncation_side", "tokenizer_class"), maybe(text(200))),
    "model_input_names": maybe(several(text(200), 100)),
    "sp_model_kwargs": maybe(table(ANY, 100)),
    "chat_template": maybe(either(
        text(TEMPLATE_BYTES),
        table(text(TEMPLATE_BYTES), 100),
        several(Kind("a name and a template", lambda entry: isinstance(entry, dict)
                     and all(isinstance(entry.get(key), str) for key in ("name", "template"))), 100),
    )),
}  # fmt: skip


def find_files(path_or_id: str | Path, kwargs: dict[str, Any]) -> dict[str, Path]:
    """The tokenizer files at a place, by role. Takes the hub arguments out of `kwargs`."""
    hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    subfolder = kwargs.pop("subfolder", "") or ""
    path = Path(path_or_id).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            raise TokenizerError(f"{path} is a GGUF file: use AutoTokenizer, or tokenizer.from_gguf on its metadata")
        return {"tokenizer_file" if path.suffix == ".json" else "vocab_file": path}
    settle(path / subfolder)
    folder = beside(path / subfolder) if path.is_dir() else _snapshot(str(path_or_id), subfolder, hub)
    roles = {
        "vocab_file": "tokenizer.model",
        "tokenizer_file": "tokenizer.json",
        "config": "tokenizer_config.json",
        "tokens_map": "special_tokens_map.json",
        "added": "added_tokens.json",
        "template": TEMPLATE,
        "template_json": TEMPLATE_JSON,
    }
    found = {
        role: linked_inside(folder / name, folder) for role, name in roles.items() if os.path.lexists(folder / name)
    }
    return found | ({"templates": folder / TEMPLATES} if (folder / TEMPLATES).is_dir() else {})


def beside(folder: Path) -> Path:
    """The folder; for one of Meta's (params.json) the one above it, if its download left tokenizer.model there."""
    above = folder.absolute().parent
    own = any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json"))
    return above if not own and (folder / "params.json").exists() and (above / "tokenizer.model").exists() else folder


def _snapshot(repo_id: str, subfolder: str, hub: dict[str, Any]) -> Path:
    """The tokenizer files of a hub repository, downloaded or from the cache."""
    missing = f"{repo_id!r} is neither a folder or file here nor a model id that could be fetched"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependencyError(f"{missing}: pip install huggingface_hub") from error
    old_name = hub.pop("use_auth_token", None)
    hub = {k: v for k, v in hub.items() if k not in ("proxies", "resume_download")}  # huggingface_hub's own affair
    if old_name is not None:
        hub.setdefault("token", old_name)
    names = [
        f"{subfolder}/{name}" if subfolder else name
        for name in (*_HUB, TEMPLATE, TEMPLATE_JSON, f"{TEMPLATES}/*.jinja")
    ]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=names, **hub)) / subfolder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{missing} ({cause}). Check the spelling and the network, or pass a folder") from error


def read_config(files: dict[str, Path]) -> dict[str, Any]:
    """The content of tokenizer_config.json, its values of the types that they have; {} where there is none."""
    if "config" not in files:
        return {}
    content = read_object(files["config"], "tokenizer_config.json")
    check(content, _SCHEMA, files["config"])
    return content


def read_settings(files: dict[str, Path], known: Collection[str]) -> dict[str, Any]:
    """Constructor arguments from the JSON files; `known` names them, the rest is kept under "extra".

    A null, or an empty token, never beats a value. Of two values that of special_tokens_map.json counts, except where
    tokenizer_config.json lists its added tokens: then the map is only there for older readers.
    """
    config = read_config(files)
    tokens_map = read_object(files["tokens_map"], "special_tokens_map.json") if "tokens_map" in files else {}
    check(tokens_map, _SCHEMA, files.get("tokens_map", ""))
    config = _merged(config, {k: v for k, v in tokens_map.items() if k in _SPECIAL or k == "extra_special_tokens"})
    template = _template(files, config.pop("chat_template", None))
    tokens = {name: _token(config.pop(name)) for name in NAMES if name in config}
    settings = {k: v for k, v in config.items() if k in known and v is not None and k not in _FOREIGN}
    named = settings.get("extra_special_tokens")
    if isinstance(named, dict):  # roles of a model's own: image_token
        settings["extra_special_tokens"] = list(named.values())
        config.update({k: v if isinstance(v, str) else v["content"] for k, v in named.items()})
    extra = {k: v for k, v in config.items() if k not in known and k not in _FOREIGN and k != "sp_model_kwargs"}
    if "added" in files and "added_tokens_decoder" not in settings:
        entries = read_object(files["added"], "added_tokens.json")
        check({"added_tokens": entries}, {"added_tokens": table(_TOKEN_ID, 1_000_000)}, files["added"])
        special = {content_of(token) for name in NAMES if (token := tokens.get(name))}
        special |= {content_of(token) for token in settings.get("additional_special_tokens") or ()}
        settings["added_tokens_decoder"] = {
            i: AddedToken(t, special=t in special, normalized=False) for t, i in entries.items() if t
        }
    return {**settings, **tokens, "chat_template": template, "extra": extra}


def _merged(config: dict[str, Any], tokens_map: dict[str, Any]) -> dict[str, Any]:
    """The roles of both files as one; `additional_special_tokens` of both."""
    first, second = (config, tokens_map) if "added_tokens_decoder" in config else (tokens_map, config)
    out = {k: v for k, v in config.items() if k not in _SPECIAL}
    for name in dict.fromkeys([*config, *tokens_map]):
        if name == "additional_special_tokens":
            both = [*(config.get(name) or ()), *(tokens_map.get(name) or ())]
            out[name] = list({content_of(token): token for token in reversed(both)}.values())[::-1]
        elif name in NAMES or name not in config:
            given = [source[name] for source in (first, second) if name in source and content_of(source[name])]
            if given or name == "pad_token":
                out[name] = given[0] if given else None
            elif all(source.get(name, "") is None for source in (config, tokens_map) if name in source):
                out[name] = None  # a role taken away on purpose, unlike one whose token is ""
    return out


def _token(entry: Any) -> Any:
    return as_added_token(entry, special=True) if isinstance(entry, dict) else entry


def _template(files: dict[str, Path], in_config: Any) -> str | dict[str, str] | None:
    """Files of templates count before the one in the configuration, as in transformers 5."""
    found = {path.stem: read_utf8(path, most=TEMPLATE_BYTES) for path in sorted(_others(files))}
    if "template" in files:
        found = {"default": read_utf8(files["template"], most=TEMPLATE_BYTES), **found}
    if "template_json" in files and in_config is None:
        content = read_object(files["template_json"], TEMPLATE_JSON)
        check(content, {"chat_template": _SCHEMA["chat_template"]}, files["template_json"])
        in_config = content.get("chat_template")
    if isinstance(in_config, list):
        in_config = {entry["name"]: entry["template"] for entry in in_config}
    if found:
        if "default" not in found and in_config is not None:
            found = {**(in_config if isinstance(in_config, dict) else {"default": str(in_config)}), **found}
        return found["default"] if list(found) == ["default"] else found
    return in_config if in_config is None or isinstance(in_config, (str, dict)) else str(in_config)


def _others(files: dict[str, Path]) -> list[Path]:
    folder = files.get("templates")
    return [] if folder is None else [linked_inside(path, folder.parent) for path in folder.glob("*.jinja")]
