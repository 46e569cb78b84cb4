"""Tokenizer folders: what is read, in which order of precedence, and what is written."""

from __future__ import annotations

import inspect
import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, Unpack

from llama2.call_options import HUB_DEFAULTS, TokenizerOptions, showing
from llama2.errors import CheckpointError, MissingDependencyError, TokenizerError
from llama2.files import saving, write_bytes, write_text
from llama2.text_file import LISTING_BYTES, read_object
from llama2.tokenizer.added import AddedToken, as_added_token, content_of
from llama2.tokenizer.batching import check_side
from llama2.tokenizer.post_processor import Template
from llama2.tokenizer.prefix import Prefix, recognise
from llama2.tokenizer.reading import TEMPLATE, TEMPLATE_JSON, TEMPLATES, find_files, read_config, read_settings
from llama2.tokenizer.sentencepiece_model import SentencePieceModel
from llama2.tokenizer.special import NAMES, SpecialTokens
from llama2.tokenizer.stream import PieceTable

_UNLIMITED = 1000000000000000019884624838656  # int(1e30), the way files write it
_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# arguments of transformers that choose a class or a download, which is settled when they come here
_SETTLED = ("use_fast", "trust_remote_code", "tokenizer_type", "config", "mirror", "_from_auto", "_commit_hash")


_CLASSES: dict[str, type[Any]] = {}  # by the name that tokenizer_config.json gives


class Files(SpecialTokens):
    """Mixin of both classes: the common constructor, from_pretrained, save_pretrained."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("llama2."):
            _CLASSES[cls.__name__] = cls

    name_or_path: str = ""
    vocab_file: str | None
    chat_template: str | dict[str, str] | None
    init_kwargs: dict[str, Any]
    space_prefix: Prefix | None
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
        verbose: bool = True,
        name_or_path: str = "",
        from_slow: bool = False,
        extra: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        """The part of construction that both classes share. Arguments without an effect are named in one warning."""
        self._table, self.verbose, self.name_or_path = None, verbose, str(name_or_path)
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
        self._extra = dict(extra or {})
        self._add_decoder(added_tokens_decoder or {})
        others = list(additional_special_tokens or []) + list(extra_special_tokens or [])
        roles = {**tokens, "sep_token": sep_token, "cls_token": cls_token, "mask_token": mask_token}
        # "" is how some files write "not given" (Alpaca's)
        roles = {name: _DEFAULTS.get(name) if token == "" else token for name, token in roles.items()}
        self.add_special_tokens({name: token for name, token in roles.items() if token is not None})
        named = {k: unknown.pop(k) for k in list(unknown) if k.endswith("_token") and _is_token(unknown[k])}
        if others or named:
            self.add_special_tokens({"additional_special_tokens": [*others, *named.values()]})
        self._extra.update({name: str(token) for name, token in named.items()})
        if unknown:
            warnings.warn(
                f"{', '.join(sorted(unknown))}: no effect on a Llama tokenizer, {type(self).__name__} ignores this",
                stacklevel=4,
            )
        self._add_bos, self._add_eos = ends
        if template is None:
            self.update_post_processor()
        else:
            self.special_tokens_template = template

    def _add_decoder(self, decoder: Mapping[int | str, Any]) -> None:
        """Tokens with the ids that a file gives them; ids that cannot be honoured are an error."""
        entries = [(key, as_added_token(decoder[key])) for key in sorted(decoder, key=int) if content_of(decoder[key])]
        self._register([token for _, token in entries])
        for key, token in entries:
            known_id = self._token_id(token.content)
            if known_id != int(key):
                raise CheckpointError(
                    f"added token {token.content!r} is declared as id {key}, and the vocabulary makes it {known_id}; "
                    "the files of this tokenizer do not belong together"
                )

    # -- reading -------------------------------------------------------------------------------------------------
    @classmethod
    @showing(TokenizerOptions, HUB_DEFAULTS, more=True)
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *init_inputs: Any, **options: Unpack[TokenizerOptions]
    ) -> Self:
        """A tokenizer of this class from files.

        Args:
            pretrained_model_name_or_path: a folder, a tokenizer.model, a tokenizer.json, or a hub id.
            init_inputs: refused; everything else goes by keyword.
            options: arguments of the constructor, which win over the files (not given, they are as stored), and
                settings of the hub: revision, cache_dir, token, local_files_only, force_download, subfolder.

        Raises:
            CheckpointError: there is no tokenizer.model or tokenizer.json, or the files do not belong together.
            TokenizerError: an argument that cannot work.
        """
        kwargs: dict[str, Any] = dict(options)
        if init_inputs:
            raise TokenizerError("from_pretrained takes one path or id; pass everything else by keyword")
        arguments = inspect.signature(cls.__init__).parameters
        makers = [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)]
        known = {name for maker in makers for name in inspect.signature(maker).parameters}
        known = {*known, *inspect.signature(cls._setup).parameters, "legacy", "add_prefix_space"} - _INTERNAL
        files = find_files(pretrained_model_name_or_path, kwargs)
        own_class = cls._class_of(files)
        if own_class is not cls and kwargs.pop("_from_auto", False):
            return own_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        if issubclass(own_class, cls) and hasattr(own_class, "prefix_id") and not hasattr(cls, "prefix_id"):
            warnings.warn(
                f"the folder is {own_class.__name__}'s; {cls.__name__} takes its <FILL_ME> for text. Load it with that "
                "class or with AutoTokenizer",
                stacklevel=2,
            )
        settings = read_settings(files, known)
        kwargs = {k: v for k, v in kwargs.items() if k not in _SETTLED}
        style = cls._style(files, kwargs)
        if style.get("prefix") is not None:
            settings.pop("legacy", None)
            settings.pop("add_prefix_space", None)
        if not ("vocab_file" in files or "tokenizer_file" in files):
            raise CheckpointError(f"no tokenizer.model or tokenizer.json in {pretrained_model_name_or_path}")
        paths = {k: str(v) for k, v in files.items() if k in ("vocab_file", "tokenizer_file") and k in arguments}
        if cls.is_fast and "tokenizer_file" in paths and not kwargs.get("from_slow"):
            if kwargs.get("legacy") is None and kwargs.get("add_prefix_space") is None:
                settings.pop("legacy", None)
                settings.pop("add_prefix_space", None)
            style = {}
        return cls(**{**paths, **settings, **style, "name_or_path": str(pretrained_model_name_or_path), **kwargs})

    @classmethod
    def _class_of(cls, files: dict[str, Path]) -> type[Self]:
        """The class that tokenizer_config.json names, slow or fast as this one is; warns where it is of more than this.

        Names of other families' classes (GPT2Tokenizer, TokenizersBackend) stand for `PreTrainedTokenizerFast`.
        """
        config = read_config(files)
        name = config.get("tokenizer_class")
        if not name:
            return cls
        plain = str(name).removesuffix("Fast")
        tokenizer_class = _CLASSES.get(plain + "Fast" if cls.is_fast else plain)
        if tokenizer_class is None:
            return _CLASSES.get("PreTrainedTokenizerFast", cls) if cls.is_fast else cls
        if issubclass(tokenizer_class, cls):
            return tokenizer_class
        return cls

    @classmethod
    def _fast_sibling(cls) -> type[Any]:
        """The fast class of a slow one."""
        return _CLASSES[f"{cls.__name__}Fast"] if f"{cls.__name__}Fast" in _CLASSES else _CLASSES["LlamaTokenizerFast"]

    @classmethod
    def _style(cls, files: dict[str, Path], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The treatment of spaces that a tokenizer.json beside tokenizer.model describes: both classes keep to it."""
        if "tokenizer_file" not in files or kwargs.get("legacy") is not None or kwargs.get("from_slow"):
            return {}
        if kwargs.get("add_prefix_space") is not None or "vocab_file" not in files:
            return {}
        document = read_object(files["tokenizer_file"], "tokenizer.json", most=LISTING_BYTES)
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
        write_bytes(path, data)
        return (str(path),)

    def save_pretrained(
        self,
        save_directory: str | Path,
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
        push_to_hub: bool = False,
        *,
        save_jinja_files: bool = False,
        **hub: Any,
    ) -> tuple[str, ...]:
        """Write every file that any loader may want: tokenizer.model (where there is one), tokenizer.json, settings.

        legacy_format True leaves tokenizer.json out, False writes it alone with the settings. The chat template goes
        into tokenizer_config.json, which every version of transformers reads; save_jinja_files=True writes
        chat_template.jinja and additional_chat_templates/ instead, as transformers 5 does. push_to_hub=True uploads
        the files, to repo_id= or to the folder's name. Returns the paths. All files get their names together, or none.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise TokenizerError(f"{folder} is a file; save_pretrained needs a folder")
        start = f"{filename_prefix}-" if filename_prefix else ""
        config = self._config()
        templates = _templates(start, config.pop("chat_template", None)) if save_jinja_files else {}
        contents = {f"{start}tokenizer_config.json": config, f"{start}special_tokens_map.json": self._tokens_map()}
        if late := {t.content: i for i, t in self.added_tokens_decoder.items() if i >= self.vocab_size}:  # type: ignore[attr-defined]
            contents[f"{start}added_tokens.json"] = late
        if not legacy_format:
            contents[f"{start}tokenizer.json"] = self._tokenizer_json()
        models: tuple[str, ...] = ()
        with saving(folder) as save:
            if legacy_format is not False and (self._spm is not None or self.vocab_file is not None):
                models = self.save_vocabulary(save.stage, filename_prefix)
            for name, text in templates.items():
                write_text(save.stage / name, text)
            for name, content in contents.items():
                write_text(save.stage / name, _json(name, content))
            save.remove([*_older_templates(save.folder, start), f"{start}added_tokens.json"])
        written = [str(folder / name) for name in (*contents, *templates, *(Path(model).name for model in models))]
        if push_to_hub:
            _upload(folder, hub.pop("repo_id", folder.name), written, **hub)
        elif hub:
            warnings.warn(f"{', '.join(sorted(hub))}: no effect without push_to_hub=True", stacklevel=2)
        return tuple(written)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Saves to a temporary folder and uploads it; returns the address of the commit.

        Keywords: commit_message, private, token, revision, create_pr, and those of save_pretrained.
        """
        hub = {name: kwargs.pop(name) for name in _UPLOAD if name in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            return _upload(Path(folder), repo_id, self.save_pretrained(folder, **kwargs), **hub)

    def _document(self) -> dict[str, Any]:
        """tokenizer.json without the present post-processor."""
        raise NotImplementedError

    def _tokenizer_json(self) -> dict[str, Any]:
        document = self._document()
        document["post_processor"] = _post_processor(document.get("post_processor"), self.special_tokens_template)
        return document

    def _entry(self, token: str | None) -> Any:
        known = self._added.get(token or "")
        return token if known is None else {"__type": "AddedToken", **known[1].to_dict()}

    def _saved_class(self) -> str:
        """The name by which transformers finds the class: the slow one's, where there is one."""
        if self.space_prefix is None:
            return "PreTrainedTokenizerFast"
        name = next(c.__name__ for c in type(self).__mro__ if c.__module__.startswith("llama2."))
        return "LlamaTokenizer" if name == "PreTrainedTokenizerFast" else name.removesuffix("Fast")

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            **self._extra,
            "add_bos_token": self._add_bos,
            "add_eos_token": self._add_eos,
            "added_tokens_decoder": {str(i): token.to_dict() for i, token in self.added_tokens_decoder.items()},
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "model_max_length": self.model_max_length,
            "model_input_names": self.model_input_names,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "tokenizer_class": self._saved_class(),
        }
        for name in NAMES:
            if self._special.get(name) is not None or name == "pad_token":
                config[name] = self._special.get(name)
        if self._additional:
            config["additional_special_tokens"] = self.additional_special_tokens
        if self.split_special_tokens:
            config["split_special_tokens"] = True
        if self.space_prefix is not None:
            config["legacy"] = self.space_prefix == "every"
            config["spaces_between_special_tokens"] = self.spaces_between_special_tokens
            config["use_default_system_prompt"] = self.use_default_system_prompt
            config["sp_model_kwargs"] = getattr(self, "sp_model_kwargs", {})
            if self.space_prefix == "never":
                config["add_prefix_space"] = False
        if self.chat_template is not None:
            config["chat_template"] = (
                self.chat_template
                if isinstance(self.chat_template, str)
                else [{"name": name, "template": text} for name, text in self.chat_template.items()]
            )
        return dict(sorted(config.items()))

    def _tokens_map(self) -> dict[str, Any]:
        by_role: dict[str, Any] = {}
        for name, value in self.special_tokens_map.items():
            tokens = [value] if isinstance(value, str) else value
            entries = [{k: v for k, v in self._added[t][1].to_dict().items() if k != "special"} for t in tokens]
            by_role[name] = entries[0] if isinstance(value, str) else entries
        return by_role


_INTERNAL = {
    "self",
    "args",
    "tokens",
    "ends",
    "template",
    "extra",
    "unknown",
    "max_len",
    "prefix",
    "kwargs",
    "from_slow",
}
_UPLOAD = ("commit_message", "commit_description", "private", "token", "revision", "create_pr")


def arguments_of(values: dict[str, Any]) -> dict[str, Any]:
    """`init_kwargs` of a constructor's locals(): what it was given, by name; objects of other libraries left out."""
    all_values = {**values, **values.get("kwargs", {})}
    hidden = ("self", "kwargs", "__class__", "prefix", "extra")
    shown = {name: value for name, value in all_values.items() if name not in hidden}
    return {**shown, "tokenizer_object": None} if shown.get("tokenizer_object") is not None else shown


def _is_token(value: Any) -> bool:
    return isinstance(value, (str, AddedToken)) and bool(str(value))


def _upload(folder: Path, repo_id: str, files: Any, **hub: Any) -> str:
    """Creates the repository where it does not exist and uploads these files; returns the address of the commit."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingDependencyError("push_to_hub needs huggingface_hub: pip install huggingface_hub") from error
    token, private = hub.pop("token", None), hub.pop("private", None)
    names = [str(Path(file).relative_to(folder)) for file in files]
    hub = {"commit_message": "Upload tokenizer", **hub}
    repository = huggingface_hub.create_repo(repo_id, token=token, private=private, exist_ok=True)
    return str(
        huggingface_hub.upload_folder(
            repo_id=getattr(repository, "repo_id", repo_id),
            folder_path=folder,
            allow_patterns=names,
            token=token,
            **hub,
        )
    )


def _older_templates(folder: Path, start: str) -> list[str]:
    """Templates of an earlier save, which would win over the one in tokenizer_config.json."""
    more = [path.relative_to(folder).as_posix() for path in (folder / (start + TEMPLATES)).glob("*.jinja")]
    return [start + TEMPLATE, start + TEMPLATE_JSON, *more]


def _templates(start: str, templates: Any) -> dict[str, str]:
    """chat_template.jinja for the default template, additional_chat_templates/NAME.jinja for each other one."""
    if isinstance(templates, str):
        templates = [{"name": "default", "template": templates}]
    found = {}
    for entry in templates or ():
        name = entry["name"]
        if Path(name).name != name or not name.strip("."):
            raise TokenizerError(f"a chat template is called {name!r}, which cannot be a file's name; rename it")
        found[start + TEMPLATE if name == "default" else f"{start}{TEMPLATES}/{name}.jinja"] = entry["template"]
    return found


def _post_processor(old: dict[str, Any] | None, template: Template) -> dict[str, Any] | None:
    """The template as a post-processor, beside the ByteLevel one that the file may have."""
    bare = not template.added(False) and not template.added(True)
    levels = [p for p in (old or {}).get("processors", [old] if old else []) if p["type"] == "ByteLevel"]
    parts = levels + ([] if bare else [template.to_json()])
    if len(parts) < 2:
        return parts[0] if parts else (template.to_json() if old and not levels else None)
    return {"type": "Sequence", "processors": parts}


def _json(name: str, value: dict[str, Any]) -> str:
    # no indentation in tokenizer.json: it has no reader but parsers, and json is ten times as slow with it
    indent = None if name.endswith("tokenizer.json") else 2
    return json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
