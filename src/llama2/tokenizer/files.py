"""Tokenizer folders: what is read, in which order of precedence, and what is written."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from llama2.errors import CheckpointError, MissingDependencyError, TokenizerError
from llama2.tokenizer.added import AddedToken, as_added_token
from llama2.tokenizer.batching import check_side
from llama2.tokenizer.prefix import Prefix, recognise
from llama2.tokenizer.special import NAMES, SpecialTokens
from llama2.tokenizer.spm import SentencePieceModel
from llama2.tokenizer.stream import PieceTable
from llama2.tokenizer.template import Template

_HUB = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_HUB_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
_UNLIMITED = 1000000000000000019884624838656  # int(1e30), the way files write it
# keys of foreign tokenizer_config.json files that only say how another library was to load them
_FOREIGN = ("tokenizer_class", "tokenizer_file", "name_or_path", "auto_map", "backend", "is_local", "vocab_file")


class Files(SpecialTokens):
    """Mixin of both classes: the common constructor, from_pretrained, save_pretrained."""

    name_or_path: str = ""
    vocab_file: str | None
    chat_template: str | dict[str, str] | None
    init_kwargs: dict[str, Any]
    _prefix: Prefix | None
    _spm: SentencePieceModel | None
    is_fast: bool = False
    _table: PieceTable | None
    padding_side: str
    truncation_side: str

    def _setup(
        self,
        *,
        tokens: dict[str, Any],
        ends: tuple[bool, bool],
        clean_up_tokenization_spaces: bool = False,
        use_default_system_prompt: bool = False,
        spaces_between_special_tokens: bool = False,
        template: Template | None = None,
        padding_side: str | None = None,
        truncation_side: str | None = None,
        model_max_length: float | None = None,
        max_len: float | None = None,
        chat_template: str | dict[str, str] | None = None,
        split_special_tokens: bool = False,
        model_input_names: list[str] | None = None,
        added_tokens_decoder: Mapping[int | str, Any] | None = None,
        additional_special_tokens: list[Any] | None = None,
        extra_special_tokens: Any = None,
        sep_token: Any = None,
        cls_token: Any = None,
        mask_token: Any = None,
        extra: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        """The part of construction that both classes share. Unknown arguments are refused."""
        if unknown:
            raise TokenizerError(f"unknown arguments {', '.join(sorted(unknown))} for {type(self).__name__}")
        self._table = None
        self._warned: set[str] = set()
        self._special, self._additional = dict.fromkeys(NAMES), []
        self.padding_side = check_side("padding_side", padding_side or type(self).padding_side)
        self.truncation_side = check_side("truncation_side", truncation_side or type(self).truncation_side)
        limit = model_max_length if model_max_length is not None else max_len
        self.model_max_length = _UNLIMITED if limit is None else int(limit)
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.spaces_between_special_tokens = spaces_between_special_tokens
        self.use_default_system_prompt = use_default_system_prompt
        self.split_special_tokens = split_special_tokens
        self.model_input_names = list(model_input_names or ("input_ids", "attention_mask"))
        self.chat_template = chat_template
        self.init_kwargs = dict(extra or {})
        self._add_decoder(added_tokens_decoder or {})
        others = list(additional_special_tokens or []) + list(extra_special_tokens or [])
        roles = {**tokens, "sep_token": sep_token, "cls_token": cls_token, "mask_token": mask_token}
        self.add_special_tokens({name: token for name, token in roles.items() if token is not None})
        if others:
            self.add_special_tokens({"additional_special_tokens": others})
        self._add_bos, self._add_eos = ends
        if template is None:
            self.update_post_processor()
        else:
            self._template = template

    def _add_decoder(self, decoder: Mapping[int | str, Any]) -> None:
        """Tokens with the ids that a file gives them; ids that cannot be honoured are an error."""
        entries = [(key, as_added_token(decoder[key])) for key in sorted(decoder, key=int)]
        self._register([token for _, token in entries])
        for key, token in entries:
            found = self._token_id(token.content)
            if found != int(key):
                raise CheckpointError(
                    f"added token {token.content!r} is declared as id {key}, and the vocabulary makes it {found}; "
                    "the files of this tokenizer do not belong together"
                )

    # -- reading -------------------------------------------------------------------------------------------------
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *init_inputs: Any, **kwargs: Any) -> Self:
        """From a folder, a tokenizer.model, a tokenizer.json, or a hub id. Arguments given here win over the files.

        hub arguments: revision, cache_dir, token, local_files_only, force_download, subfolder.
        """
        if init_inputs:
            raise TokenizerError("from_pretrained takes one path or id; pass everything else by keyword")
        files = find_files(pretrained_model_name_or_path, kwargs)
        settings = read_settings(files)
        arguments = inspect.signature(cls.__init__).parameters
        kwargs = {k: v for k, v in kwargs.items() if k not in ("use_fast", "trust_remote_code")}
        style = cls._style(files, kwargs)
        if "add_prefix_space" in arguments and style.get("prefix") is not None:
            settings.pop("legacy", None)
            settings.pop("add_prefix_space", None)
        if not ("vocab_file" in files or "tokenizer_file" in files):
            raise CheckpointError(f"no tokenizer.model or tokenizer.json in {pretrained_model_name_or_path}")
        given = {k: str(v) for k, v in files.items() if k in ("vocab_file", "tokenizer_file") and k in arguments}
        if cls.is_fast and "tokenizer_file" in given:
            if kwargs.get("legacy") is None and kwargs.get("add_prefix_space") is None:
                settings.pop("legacy", None)
                settings.pop("add_prefix_space", None)
            style = {}
        tokenizer = cls(**{**given, **settings, **style, **kwargs})
        tokenizer.name_or_path = str(pretrained_model_name_or_path)
        return tokenizer

    @classmethod
    def _style(cls, files: dict[str, Path], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The treatment of spaces that a tokenizer.json beside tokenizer.model describes: both classes keep to it."""
        if "tokenizer_file" not in files or kwargs.get("legacy") is not None:
            return {}
        if kwargs.get("add_prefix_space") is not None or "vocab_file" not in files:
            return {}
        document = read_json(files["tokenizer_file"])
        prefix = recognise(document.get("normalizer"), document.get("pre_tokenizer"))
        return {} if prefix is None else {"prefix": prefix}

    # -- writing -------------------------------------------------------------------------------------------------
    def save_vocabulary(self, save_directory: str | Path, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write [prefix-]tokenizer.model into an existing folder; its path in a tuple.

        ValueError for a tokenizer that was made without a SentencePiece model.
        """
        folder = Path(save_directory)
        if not folder.is_dir():
            raise TokenizerError(f"vocabulary path {folder} is not a folder; make it first")
        if self._spm is None and self.vocab_file is None:
            raise TokenizerError(
                "this tokenizer was made without a SentencePiece model, so there is no tokenizer.model to write; "
                "save_pretrained writes its tokenizer.json"
            )
        data = self._spm.to_bytes() if self._spm else Path(self.vocab_file or "").read_bytes()
        path = folder / f"{filename_prefix + '-' if filename_prefix else ''}tokenizer.model"
        path.write_bytes(data)
        return (str(path),)

    def save_pretrained(
        self, save_directory: str | Path, legacy_format: bool | None = None, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Write every file that any loader may want: tokenizer.model (where there is one), tokenizer.json, settings.

        legacy_format True leaves tokenizer.json out, False writes it alone with the settings. Returns the paths.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise TokenizerError(f"{folder} is a file; save_pretrained needs a folder")
        folder.mkdir(parents=True, exist_ok=True)
        start = f"{filename_prefix}-" if filename_prefix else ""
        written = [
            _write(folder / f"{start}tokenizer_config.json", self._config()),
            _write(folder / f"{start}special_tokens_map.json", self._tokens_map()),
        ]
        late = {t.content: i for i, t in self.added_tokens_decoder.items() if i >= self.vocab_size}  # type: ignore[attr-defined]
        if late:
            written.append(_write(folder / f"{start}added_tokens.json", late))
        else:
            (folder / f"{start}added_tokens.json").unlink(missing_ok=True)
        if legacy_format is not False and (self._spm is not None or self.vocab_file is not None):
            written += self.save_vocabulary(folder, filename_prefix)
        if not legacy_format:
            written.append(_write(folder / f"{start}tokenizer.json", self._tokenizer_json()))
        for name in _TEMPLATES:  # the template is in tokenizer_config.json: an older file would win over it
            (folder / name).unlink(missing_ok=True)
        return tuple(written)

    def _document(self) -> dict[str, Any]:
        """tokenizer.json without the present post-processor."""
        raise NotImplementedError

    def _tokenizer_json(self) -> dict[str, Any]:
        document = self._document()
        document["post_processor"] = _post_processor(document.get("post_processor"), self._template)
        return document

    def _entry(self, token: str | None) -> Any:
        known = self._added.get(token or "")
        return token if known is None else {"__type": "AddedToken", **known[1].to_dict()}

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            **self.init_kwargs,
            "add_bos_token": self._add_bos,
            "add_eos_token": self._add_eos,
            "added_tokens_decoder": {str(i): token.to_dict() for i, token in self.added_tokens_decoder.items()},
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "model_max_length": self.model_max_length,
            "model_input_names": self.model_input_names,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "tokenizer_class": "LlamaTokenizer" if self._prefix is not None else "PreTrainedTokenizerFast",
        }
        for name in NAMES:
            if self._special.get(name) is not None or name == "pad_token":
                config[name] = self._special.get(name)
        if self._additional:
            config["additional_special_tokens"] = self.additional_special_tokens
        if self.split_special_tokens:
            config["split_special_tokens"] = True
        if self._prefix is not None:
            config["legacy"] = self._prefix == "every"
            config["spaces_between_special_tokens"] = self.spaces_between_special_tokens
            config["use_default_system_prompt"] = self.use_default_system_prompt
            config["sp_model_kwargs"] = getattr(self, "sp_model_kwargs", {})
            if self._prefix == "never":
                config["add_prefix_space"] = False
        if self.chat_template is not None:
            config["chat_template"] = (
                self.chat_template
                if isinstance(self.chat_template, str)
                else [{"name": name, "template": text} for name, text in self.chat_template.items()]
            )
        return dict(sorted(config.items()))

    def _tokens_map(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in self.special_tokens_map.items():
            tokens = [value] if isinstance(value, str) else value
            entries = [{k: v for k, v in self._added[t][1].to_dict().items() if k != "special"} for t in tokens]
            found[name] = entries[0] if isinstance(value, str) else entries
        return found


def find_files(path_or_id: str | Path, kwargs: dict[str, Any]) -> dict[str, Path]:
    """The tokenizer files at a place, by role. Takes the hub arguments out of `kwargs`."""
    hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
    subfolder = kwargs.pop("subfolder", "") or ""
    path = Path(path_or_id).expanduser()
    if path.is_file():
        if path.suffix == ".gguf":
            raise TokenizerError(f"{path} is a GGUF file: use AutoTokenizer, or tokenizer.from_gguf on its metadata")
        return {"tokenizer_file" if path.suffix == ".json" else "vocab_file": path}
    folder = beside(path / subfolder) if path.is_dir() else _snapshot(str(path_or_id), subfolder, hub)
    roles = {
        "vocab_file": "tokenizer.model",
        "tokenizer_file": "tokenizer.json",
        "config": "tokenizer_config.json",
        "tokens_map": "special_tokens_map.json",
        "added": "added_tokens.json",
        "template": "chat_template.jinja",
        "template_json": "chat_template.json",
    }
    return {role: folder / name for role, name in roles.items() if (folder / name).is_file()}


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
    names = [f"{subfolder}/{name}" if subfolder else name for name in _HUB + _TEMPLATES]
    try:
        return Path(snapshot_download(repo_id, allow_patterns=names, **hub)) / subfolder
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{missing} ({cause}). Check the spelling and the network, or pass a folder") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file; CheckpointError otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; expected a JSON object")
    return value


def read_settings(files: dict[str, Path]) -> dict[str, Any]:
    """Constructor arguments from the JSON files; what only another library reads is kept under "extra"."""
    config = read_json(files["config"]) if "config" in files else {}
    if "tokens_map" in files:
        config = {**{k: v for k, v in read_json(files["tokens_map"]).items() if v is not None}, **config}
    template = _template(files, config.pop("chat_template", None))
    tokens = {name: _token(config.pop(name)) for name in NAMES if name in config}
    known = {name for kind in (Files._setup,) for name in inspect.signature(kind).parameters}
    known |= {"add_bos_token", "add_eos_token", "legacy", "add_prefix_space"}
    known -= {"self", "tokens", "ends", "template", "extra", "unknown", "max_len"}
    settings = {k: v for k, v in config.items() if k in known and v is not None}
    extra = {k: v for k, v in config.items() if k not in known and k not in _FOREIGN and k != "sp_model_kwargs"}
    extra_tokens = settings.get("extra_special_tokens")
    if isinstance(extra_tokens, dict):
        settings["extra_special_tokens"] = list(extra_tokens.values())
    if "added" in files and "added_tokens_decoder" not in settings:
        entries = read_json(files["added"])
        settings["added_tokens_decoder"] = {i: AddedToken(t, normalized=False) for t, i in entries.items()}
    return {**settings, **tokens, "chat_template": template, "extra": extra}


def _token(entry: Any) -> Any:
    return as_added_token(entry, special=True) if isinstance(entry, dict) else entry


def _template(files: dict[str, Path], in_config: Any) -> str | dict[str, str] | None:
    if "template" in files:
        return files["template"].read_text(encoding="utf-8")
    if "template_json" in files and in_config is None:
        in_config = read_json(files["template_json"]).get("chat_template")
    if isinstance(in_config, list):
        return {entry["name"]: entry["template"] for entry in in_config}
    return in_config if in_config is None or isinstance(in_config, (str, dict)) else str(in_config)


def _post_processor(old: dict[str, Any] | None, template: Template) -> dict[str, Any] | None:
    """The template as a post-processor, beside the ByteLevel one that the file may have."""
    bare = not template.added(False) and not template.added(True)
    levels = [p for p in (old or {}).get("processors", [old] if old else []) if p["type"] == "ByteLevel"]
    parts = levels + ([] if bare else [template.to_json()])
    if len(parts) < 2:
        return parts[0] if parts else (template.to_json() if old and not levels else None)
    return {"type": "Sequence", "processors": parts}


def _write(path: Path, value: dict[str, Any]) -> str:
    # no indentation in tokenizer.json: it has no reader but parsers, and json is ten times as slow with it
    indent = None if path.name.endswith("tokenizer.json") else 2
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    return str(path)
