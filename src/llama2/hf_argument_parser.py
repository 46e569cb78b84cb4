"""HfArgumentParser: options of a script from the fields of dataclasses. Standard library only.

parser = HfArgumentParser((ModelArguments, TrainingArguments))
model_args, training_args = parser.parse_args_into_dataclasses()
"""

import dataclasses
import json
import sys
import types
import typing
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from llama2.errors import InputError, MissingDependencyError
from llama2.text_file import read_object, read_utf8

_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


class HfArgumentParser(ArgumentParser):
    """An argparse parser with an option --name, also spelt --na-me, for each field of the given dataclasses.

    Fields without a default are required. A flag may stand alone (--fp16) or take a value, and one that is on by
    default can be switched off by --no_name. Lists take several values, mappings a JSON object; Literal and Enum name
    the choices. A field's metadata may hold "help" and "aliases". `add_argument` adds further options.
    """

    def __init__(self, dataclass_types: type | Iterable[type] | None = None, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", ArgumentDefaultsHelpFormatter)
        super().__init__(**kwargs)
        given: Any = dataclass_types or ()
        self.dataclass_types: list[Any] = [given] if isinstance(given, type) else list(given)
        for kind in self.dataclass_types:
            self._add_dataclass(kind)

    def _add_dataclass(self, kind: Any) -> None:
        if not dataclasses.is_dataclass(kind):
            raise InputError(f"HfArgumentParser takes dataclasses but got {kind!r}")
        where = self.add_argument_group(kind._argument_group_name) if hasattr(kind, "_argument_group_name") else self
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            if field.init:
                self._add_field(where, field, hints.get(field.name, field.type))

    @staticmethod
    def _add_field(where: Any, field: "dataclasses.Field[Any]", hint: Any) -> None:
        settings = _option(hint)
        if "help" in field.metadata:
            settings["help"] = field.metadata["help"]
        if field.default is not dataclasses.MISSING:
            settings["default"] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            settings["default"] = field.default_factory()
        elif settings.get("nargs") != "?":
            settings["required"] = True
        else:
            settings["default"] = False
        names = [f"--{field.name}", *field.metadata.get("aliases", [])]
        if "_" in field.name:
            names.insert(1, f"--{field.name.replace('_', '-')}")
        where.add_argument(*names, dest=field.name, **settings)
        if settings.get("nargs") == "?" and settings.get("default") is True:
            off = [f"--no_{field.name}", f"--no-{field.name.replace('_', '-')}"]
            where.add_argument(*dict.fromkeys(off), dest=field.name, action="store_false", default=True)

    def parse_args_into_dataclasses(
        self,
        args: list[str] | None = None,
        return_remaining_strings: bool = False,
        look_for_args_file: bool = True,
        args_filename: str | None = None,
        args_file_flag: str | None = None,
    ) -> tuple[Any, ...]:
        """One object for each dataclass, a Namespace of further options if there are any, and the strings left over.

        args: the words, default sys.argv. Before them come the words of files: `args_filename`, or the script's own
        name with .args where it exists, and those that the option `args_file_flag` names. Raises InputError for words
        that are no option, unless return_remaining_strings hands them back.
        """
        words = list(sys.argv[1:] if args is None else args)
        words = self._file_words(words, look_for_args_file, args_filename, args_file_flag) + words
        if args_file_flag:
            words = _without_option(words, args_file_flag)
        namespace, rest = self.parse_known_args(words)
        made = self._objects(vars(namespace))
        if vars(namespace):
            made.append(namespace)
        if return_remaining_strings:
            return (*made, rest)
        if rest:
            raise InputError(f"some arguments are no option of this script: {rest}")
        return tuple(made)

    def _file_words(self, words: list[str], look: bool, name: str | None, flag: str | None) -> list[str]:
        files: list[Path] = []
        if name is not None:
            files.append(Path(name))
        elif look and sys.argv and (own := Path(sys.argv[0]).with_suffix(".args")).is_file():
            files.append(own)
        if flag:
            finder = ArgumentParser(add_help=False)
            finder.add_argument(flag, dest="files", action="append", default=[])
            files += [Path(given) for given in finder.parse_known_args(words)[0].files]
        found: list[str] = []
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} is no file; give the path of a file with arguments")
            found += file.read_text(encoding="utf-8").split()
        return found

    def _objects(self, values: dict[str, Any]) -> list[Any]:
        """An object of each dataclass; takes what it uses out of `values`."""
        made = []
        for kind in self.dataclass_types:
            names = [field.name for field in dataclasses.fields(kind) if field.init]
            made.append(kind(**{name: values[name] for name in names if name in values}))
        for kind in self.dataclass_types:
            for field in dataclasses.fields(kind):
                values.pop(field.name, None)
        return made

    def parse_dict(self, args: Mapping[str, Any], allow_extra_keys: bool = False) -> tuple[Any, ...]:
        """One object for each dataclass, from a mapping. Raises InputError for keys that no dataclass has."""
        values = dict(args)
        made = self._objects(values)
        if values and not allow_extra_keys:
            raise InputError(f"some keys are not used by the HfArgumentParser: {sorted(values)}")
        return tuple(made)

    def parse_json_file(self, json_file: str | Path, allow_extra_keys: bool = False) -> tuple[Any, ...]:
        """As `parse_dict`, from a JSON file."""
        return self.parse_dict(read_object(json_file, Path(json_file).name), allow_extra_keys)

    def parse_yaml_file(self, yaml_file: str | Path, allow_extra_keys: bool = False) -> tuple[Any, ...]:
        """As `parse_dict`, from a YAML file."""
        return self.parse_dict(read_options(Path(yaml_file)), allow_extra_keys)


def read_options(file: Path) -> dict[str, Any]:
    """The names and values of a .json file, or of a YAML file by any other name. Raises InputError for what is none,
    and MissingDependencyError where YAML cannot be read."""
    if not file.is_file():
        raise InputError(f"{file} does not exist; give a .yaml or .json file of options")
    content = _parsed(file)
    if not isinstance(content, dict):
        raise InputError(f"{file} is no object of names and values; write lines such as `lora_r: 16`")
    return content


def _parsed(file: Path) -> Any:
    text = read_utf8(file, "utf-8-sig")
    if file.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise InputError(f"{file} is not JSON ({error}); correct it") from error
    try:
        yaml: Any = import_module("yaml")
    except ImportError as error:
        raise MissingDependencyError("options in YAML need pyyaml: pip install pyyaml, or use .json") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{file} is not YAML ({error}); correct it") from error


def _without_option(words: list[str], flag: str) -> list[str]:
    """The words without this option and its value."""
    kept, skip = [], False
    for word in words:
        if not skip and word != flag and not word.startswith(f"{flag}="):
            kept.append(word)
        skip = not skip and word == flag
    return kept


def _option(hint: Any) -> dict[str, Any]:
    """The arguments of add_argument for a field of this type."""
    members = [hint]
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
    if bool in members:
        return {
            "type": _flag if members == [bool] else _first_of(_flag, *_readers(members)),
            "nargs": "?",
            "const": True,
        }
    lists = [member for member in members if (get_origin(member) or member) in (list, tuple)]
    if lists:
        inner = [inner for inner in get_args(lists[0]) if inner is not Ellipsis] or [str]
        return {"type": _first_of(*_readers(inner)), "nargs": "+"}
    if choices := [choice for member in members for choice in _choices(member)]:
        by_text = {str(choice): choice for choice in choices}
        return {"type": lambda text: by_text.get(text, text), "choices": choices}
    return {"type": _first_of(*_readers(members))}


def _choices(kind: Any) -> list[Any]:
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [member.value for member in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []


def _readers(kinds: list[Any]) -> list[Callable[[str], Any]]:
    """Returns the converters of a text to these types, the most particular first."""
    plain = [get_origin(kind) or kind for kind in kinds]
    readers: list[Callable[[str], Any]] = []
    if any(isinstance(kind, type) and issubclass(kind, Mapping) for kind in plain):
        readers.append(_mapping)
    readers += [kind for kind in (int, float, str) if kind in plain]
    readers += [kind for kind in plain if callable(kind) and kind not in (int, float, str, bool, dict, Any, Mapping)]
    return readers or [str]


def _first_of(*readers: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader that takes the first of these that can read the text."""

    def read(text: str) -> Any:
        for reader in readers:
            try:
                return reader(text)
            except (ValueError, TypeError, ArgumentTypeError):
                continue
        raise ArgumentTypeError(f"{text!r} is none of {', '.join(getattr(r, '__name__', str(r)) for r in readers)}")

    return read


def _flag(text: str) -> bool:
    if isinstance(text, bool):
        return text
    if text.lower() in (*_TRUE, *_FALSE):
        return text.lower() in _TRUE
    raise ArgumentTypeError(f"{text!r} is no truth value; write true or false")


def _mapping(text: str) -> dict[str, Any]:
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ArgumentTypeError(f"{text!r} is no JSON object")
    return content


__all__ = ["HfArgumentParser", "Namespace"]
