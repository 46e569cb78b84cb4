"""HfArgumentParser: the values that transformers' parser gives for the same dataclasses and words."""

import json
import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

from llama2 import HfArgumentParser, InputError, TrainingArguments


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Script:
    """A field of each kind."""

    model_name: str
    rows: int = 3
    rate: float = 0.5
    fast: bool = False
    shuffle: bool = True
    salt: Optional[int] = None  # noqa: UP045
    names: list[str] = field(default_factory=lambda: ["a"])
    sizes: list[int] = field(default_factory=list)
    kind: Literal["one", "two", 3] = "one"
    colour: Colour = Colour.RED
    options: dict[str, Any] | None = field(default=None, metadata={"help": "JSON", "aliases": ["-o"]})
    share: int | float | str = 1
    maybe: bool | None = None


def parse(*words: str) -> Script:
    (made,) = HfArgumentParser(Script).parse_args_into_dataclasses(["--model_name", "m", *words])
    assert isinstance(made, Script)
    return made


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ([], "rows", 3),
        (["--rows", "5"], "rows", 5),
        (["--rate", "1e-3"], "rate", 1e-3),
        (["--fast"], "fast", True),
        (["--fast", "False"], "fast", False),
        (["--fast", "yes"], "fast", True),
        (["--no_shuffle"], "shuffle", False),
        (["--no-shuffle"], "shuffle", False),
        (["--shuffle", "false"], "shuffle", False),
        ([], "shuffle", True),
        ([], "salt", None),
        (["--salt", "7"], "salt", 7),
        (["--names", "x", "y"], "names", ["x", "y"]),
        ([], "names", ["a"]),
        (["--sizes", "1", "2"], "sizes", [1, 2]),
        (["--kind", "two"], "kind", "two"),
        (["--kind", "3"], "kind", 3),
        (["--colour", "blue"], "colour", "blue"),
        (["--options", '{"a": [1]}'], "options", {"a": [1]}),
        (["-o", "{}"], "options", {}),
        (["--share", "0.5"], "share", 0.5),
        (["--share", "2"], "share", 2),
        (["--share", "all"], "share", "all"),
        ([], "maybe", None),
        (["--maybe"], "maybe", True),
        (["--maybe", "no"], "maybe", False),
        (["--model-name", "n"], "model_name", "n"),
    ],
)
def test_words_become_fields(words: list[str], name: str, value: Any) -> None:
    found = getattr(parse(*words), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("words", [["--rows", "x"], ["--kind", "four"], ["--fast", "perhaps"], ["--options", "[1]"]])
def test_words_that_do_not_fit(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
    assert words[0] in capsys.readouterr().err


def test_required_and_unknown_words() -> None:
    parser = HfArgumentParser((Script,))
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses([])
    with pytest.raises(InputError, match="--typo"):
        parser.parse_args_into_dataclasses(["--model_name", "m", "--typo", "1"])
    _, rest = parser.parse_args_into_dataclasses(["--model_name", "m", "--typo", "1"], return_remaining_strings=True)
    assert rest == ["--typo", "1"]
    parser.add_argument("--more", type=int, default=4)
    script, further = parser.parse_args_into_dataclasses(["--model_name", "m"])
    assert script.rows == 3 and further.more == 4
    with pytest.raises(InputError, match="dataclasses"):
        HfArgumentParser(int)


def test_mappings_and_files(tmp_path: Path) -> None:
    parser, fields = HfArgumentParser(Script), {"model_name": "m", "rows": 9}
    (tmp_path / "a.json").write_text(json.dumps(fields))
    (tmp_path / "a.yaml").write_text("model_name: m\nrows: 9\n")
    for made in (
        parser.parse_dict(fields),
        parser.parse_json_file(tmp_path / "a.json"),
        parser.parse_yaml_file(tmp_path / "a.yaml"),
        parser.parse_dict({**fields, "other": 1}, allow_extra_keys=True),
    ):
        assert made == (Script("m", 9),)
    with pytest.raises(InputError, match="other"):
        parser.parse_dict({**fields, "other": 1})


def test_files_of_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of files come first, so that those of the command line win."""
    (tmp_path / "run.args").write_text("--model_name m --rows 8\n")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "run.py"), "--rate", "0.1"])
    (made,) = HfArgumentParser(Script).parse_args_into_dataclasses()
    assert (made.model_name, made.rows, made.rate) == ("m", 8, 0.1)
    words = ["--config", str(tmp_path / "run.args"), "--rows", "2"]
    (made,) = HfArgumentParser(Script).parse_args_into_dataclasses(
        words, look_for_args_file=False, args_file_flag="--config"
    )
    assert (made.model_name, made.rows) == ("m", 2)


def test_beside_the_training_arguments(tmp_path: Path) -> None:
    script, args = HfArgumentParser((Script, TrainingArguments)).parse_args_into_dataclasses(
        ["--model_name", "m", "--output_dir", str(tmp_path), "--learning-rate", "3e-4", "--max_steps", "5"]
    )
    assert script.model_name == "m"
    assert (Path(args.output_dir), args.learning_rate, args.max_steps) == (tmp_path, 3e-4, 5)
