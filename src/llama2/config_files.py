"""A configuration's way from and to config.json and the hub. Standard library only."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, Unpack, overload

from llama2.call_options import HUB_DEFAULTS, ConfigOptions, showing
from llama2.files import write_text
from llama2.keywords import drop, refuse_unknown
from llama2.lazy import door
from llama2.text_file import read_object


class SettingsFile:
    """Base of what is kept as one JSON file in a folder or a repository: it supplies the text and save_pretrained."""

    def to_json_string(self, use_diff: bool = True) -> str:
        """The text of the file."""
        raise NotImplementedError(f"{type(self).__name__} must define to_json_string(use_diff)")

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Writes the file into a folder."""
        raise NotImplementedError(f"{type(self).__name__} must define save_pretrained(save_directory)")

    def _write(self, file: Path, push_to_hub: bool, options: dict[str, Any]) -> None:
        """Writes the file, synced, then renamed, and uploads it where that is asked for, with these options.

        Raises InputError for an option that nobody knows.
        """
        drop("save_pretrained", options, stacklevel=4)
        write_text(file, self.to_json_string())
        if push_to_hub:
            _upload_file(file, **options)
        else:
            refuse_unknown("save_pretrained", options)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Uploads the file; token=, private=, commit_message= as for a model."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Writes the text to this file."""
        write_text(Path(json_file_path), self.to_json_string(use_diff))


class ConfigFiles(SettingsFile):
    """Base of LlamaConfig, which supplies from_dict and to_json_string."""

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **overrides: Any) -> Any:
        """A configuration from the content of a config.json."""
        raise NotImplementedError(f"{cls.__name__} must define from_dict(config_dict)")

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> Self:
        """Reads one JSON file. Raises CheckpointError where it is missing or not a JSON object."""
        made: Self = cls.from_dict(read_object(Path(path), "config.json"))
        return made

    @classmethod
    def get_config_dict(cls, path: str | os.PathLike[str], **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The content of a folder's, file's or hub id's configuration, and the keywords that are no hub settings."""
        content: dict[str, Any] = _load_fields(path, kwargs)
        return content, kwargs

    @overload
    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        gguf_file: str | None = None,
        return_unused_kwargs: Literal[False] = False,
        **overrides: Unpack[ConfigOptions],
    ) -> Self: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        gguf_file: str | None = None,
        return_unused_kwargs: Literal[True],
        **overrides: Any,
    ) -> tuple[Self, dict[str, Any]]: ...

    @classmethod
    @showing(ConfigOptions, HUB_DEFAULTS, more=True)
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        gguf_file: str | None = None,
        return_unused_kwargs: bool = False,
        **overrides: Any,
    ) -> Any:
        """The configuration of a folder, a config.json, a GGUF file or a hub id.

        Args:
            path: a folder of transformers' or of Meta's files, a config.json, a GGUF file or a hub id.
            gguf_file: the name of the GGUF file in the folder or repository.
            return_unused_kwargs: True gives a pair, the configuration and the keywords that are no field of it.
            revision, cache_dir, token, local_files_only, force_download, subfolder: settings of the hub.
            Other keywords are fields and win over the file's.

        Raises:
            CheckpointError: there is none, or it is not of a Llama model.
            ConfigError: a value that cannot work.
        """
        return _load_config(path, cls=cls, gguf_file=gguf_file, return_unused_kwargs=return_unused_kwargs, **overrides)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes `save_directory`/config.json, synced, then renamed; push_to_hub uploads it (repo_id=, token=, ...)."""
        self._write(Path(save_directory) / "config.json", push_to_hub, kwargs)


_load_config = door("auto", "load_config", "LlamaConfig of a path or a hub id.")
_load_fields = door("auto", "load_fields", "Content of the configuration of a path or a hub id.")
_upload_file = door("checkpoint.hub", "upload_file", "Uploads one file to the hub.")
