"""Options from the environment and config.toml, `llama2 config`, `llama2 completion` and `llama2 doctor`."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from llama2 import compiled
from llama2.cli import COMMANDS, main
from llama2.cli.args import parse
from llama2.cli.chat import ChatOptions
from llama2.cli.completion import SHELLS, whole_parser
from llama2.cli.finetune import TASKS
from llama2.cli.info import InfoOptions
from llama2.cli.serve import ServeOptions
from llama2.cli.settings import config_path
from llama2.errors import InputError

Write = Callable[[str], dict[str, str]]


@pytest.fixture
def written(tmp_path: Path) -> Write:
    """The environment of a user with this config.toml."""

    def write(text: str) -> dict[str, str]:
        environment = {"XDG_CONFIG_HOME": str(tmp_path)}
        path = config_path(environment)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return environment

    return write


CONFIG = """
model = "everywhere"
temperature = 0.5
seed = 3

[serve]
port = 8081
api-key = ["a", "b"]
public_metrics = true
kv_cache = "int8"

[finetune]
learning_rate = 0.001

[finetune.sft]
lora_r = 8
"""


def test_the_command_line_wins_then_the_environment_then_the_file(written: Write) -> None:
    environment = written(CONFIG)

    def serve(*words: str, **variables: str) -> ServeOptions:
        return parse(ServeOptions, "llama2 serve", words, environment | variables)

    assert (serve().port, serve().model, serve().api_key) == (8081, "everywhere", ("a", "b"))
    assert serve().public_metrics and serve().kv_cache == "int8"
    assert serve(LLAMA2_PORT="1").port == 1 and serve(LLAMA2_PORT="1", LLAMA2_SERVE_PORT="2").port == 2
    assert serve("--port", "3", LLAMA2_SERVE_PORT="2").port == 3 and serve("--port=4").port == 4
    assert serve("--api-key", "c").api_key == ("c",)  # replaces, and does not add
    assert serve(PORT="5").port == 5 and serve(PORT="5", LLAMA2_PORT="6").port == 6
    assert serve("other").model is None and serve("other").paths == ("other",)  # a model that is named beats all
    assert serve("-m", "other").model == "other"


def test_an_option_at_the_top_counts_where_a_command_has_it(written: Write) -> None:
    environment = written(CONFIG)
    chat = parse(ChatOptions, "llama2 chat", (), environment)
    assert (chat.model, chat.temperature, chat.seed) == ("everywhere", 0.5, 3)
    assert parse(InfoOptions, "llama2 info", (), environment).model == "everywhere"
    sft = parse(TASKS["sft"], "llama2 finetune sft", (), environment)
    assert (sft.learning_rate, sft.lora_r, sft.seed) == (0.001, 8, 3)  # type: ignore[attr-defined]
    assert parse(TASKS["dpo"], "llama2 finetune dpo", (), environment).lora_r is None  # type: ignore[attr-defined]
    assert parse(ChatOptions, "llama2 chat", ()) == ChatOptions()  # without an environment nothing is read


@pytest.mark.parametrize(
    ("text", "message"),
    [("[serve]\nport = '80'", r"\[serve\] port is '80'; it must be a whole number"),
     ("[serve]\nport = true", "it must be a whole number"),
     ("[serve]\nkv_cache = 'int9'", "must be one of auto"),
     ("[serve]\nprot = 80", r"prot is no option of `llama2 serve`; did you mean port\?"),
     ("serve = 3", r"serve must be a table, \[serve\]"),
     ("[serve]\napi_key = [1]", "a text, or a list of texts"),
     ("model = ", "is no TOML file")],
)  # fmt: skip
def test_what_is_wrong_in_the_file_is_named(written: Write, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(ServeOptions, "llama2 serve", (), written(text))


def test_a_file_that_was_named_must_exist(tmp_path: Path) -> None:
    named = {"LLAMA2_CONFIG": str(tmp_path / "x.toml")}
    with pytest.raises(InputError, match=r"LLAMA2_CONFIG names .*x\.toml, which is no file"):
        parse(ChatOptions, "llama2 chat", (), named)
    (tmp_path / "x.toml").write_text("seed = 4")
    assert parse(ChatOptions, "llama2 chat", (), named).seed == 4


def test_config_tells_where_each_value_comes_from(
    written: Write, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (
        written(CONFIG + "\n[quantize]\nbits = 4\n") | {"LLAMA2_TOP_P": "0.9", "LLAMA2_PROT": "1"}
    ).items():
        monkeypatch.setenv(name, value)
    assert main(["config", "chat", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows["top_p"] == {"value": 0.9, "origin": "LLAMA2_TOP_P", "variables": ["LLAMA2_CHAT_TOP_P", "LLAMA2_TOP_P"]}
    assert rows["seed"]["value"] == 3 and rows["seed"]["origin"].endswith("config.toml: seed")
    assert "max_new_tokens" not in rows
    assert main(["config", "chat", "--all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_new_tokens"]["origin"] == "default"
    assert main(["config"]) == 0
    told = capsys.readouterr()
    assert "llama2 serve --port 8081" in told.out and "no command has an option LLAMA2_PROT" in told.err
    assert main(["config", "finetune"]) == 2 and "needs one of sft" in capsys.readouterr().err
    assert main(["config", "srve"]) == 2 and "did you mean serve?" in capsys.readouterr().err


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_every_command_and_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*COMMANDS, "sft", "max-new-tokens", "kv-cache"):
        assert word in script, word
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_completion_in_bash_itself(capsys: pytest.CaptureFixture[str]) -> None:
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    main(["completion", "bash"])
    script = capsys.readouterr().out
    ask = 'COMP_WORDS=(llama2 chat --temp); COMP_CWORD=2; _shtab_llama2 llama2 --temp chat; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], text=True, capture_output=True)
    assert done.stdout.split() == ["--temperature"], done.stderr


def test_completion_of_no_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "csh"]) == 2
    assert "needs one of bash, zsh, fish, not 'csh'" in capsys.readouterr().err
    assert "serve" in whole_parser().format_help()


@pytest.mark.skipif(not compiled.available(), reason="the compiled module is not built")
def test_doctor_names_what_a_build_leaves_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "instruction_sets", lambda: ["avx2"])
    monkeypatch.setattr(compiled, "left_out", lambda: ["scalar"])
    monkeypatch.delenv("LLAMA2_ISA", raising=False)
    main(["doctor", "--json", "--no-measure"])
    engine = json.loads(capsys.readouterr().out)["processor"]["native engine"]
    assert engine == "avx2; this build leaves out scalar"


def test_doctor_tells_of_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == (1 if found["problems"] else 0)
    assert {"software", "processor", "memory", "gpu", "files", "problems"} == set(found)
    assert "torch" in found["software"]["packages"] and "used" in found["processor"]["threads"]
    assert "hf_secret" not in json.dumps(found)
    assert main(["doctor", "--no-measure"]) == code
    text = capsys.readouterr().out
    assert "processor" in text and "read" not in text.split("gpu")[0].split("memory")[1].split()
