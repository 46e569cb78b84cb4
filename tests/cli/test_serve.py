"""`llama2 serve` and `llama2 batch`: options from the environment, refusals, and a file of requests."""

import contextlib
import fcntl
import gc
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llama2 import AutoTokenizer, LlamaForCausalLM
from llama2.cli import main, parallel, serve
from llama2.cli.args import parse
from llama2.cli.serve import ServeOptions, check_numbers, open_model
from llama2.errors import InputError

Run = Callable[..., tuple[int, str, str]]


def options(*words: str, **environment: str) -> serve.ServeOptions:
    return parse(serve.ServeOptions, "llama2 serve", words, environment)


def test_options_come_from_the_environment_under_all_names() -> None:
    found = options(
        HF_MODEL_ID="m", MAX_INPUT_LENGTH="10", MAX_TOTAL_TOKENS="20", LLAMA2_HOST="h", API_KEY="a, b", SM_NUM_GPUS="1",
        LLAMA2_PUBLIC_METRICS="true", LLAMA2_KV_CACHE="int8", LLAMA2_REQUEST_TIMEOUT="1.5", PORT="81", HOST="no",
    )  # fmt: skip
    assert (found.model, found.max_input_tokens, found.max_total_tokens, found.host) == ("m", 10, 20, "h")
    assert (found.api_key, found.public_metrics, found.kv_cache, found.request_timeout) == (
        ("a", "b"),
        True,
        "int8",
        1.5,
    )
    assert found.port == 81


def test_the_command_line_and_our_own_names_win() -> None:
    assert options("--port", "5", PORT="6", LLAMA2_PORT="7").port == 5
    assert options(PORT="6", LLAMA2_PORT="7").port == 7


@pytest.mark.parametrize(
    ("environment", "message"),
    [({"MAX_TOTAL_TOKENS": "x"}, "MAX_TOTAL_TOKENS is 'x'; it must be a whole number"),
     ({"LLAMA2_KV_CACHE": "x"}, "must be one of auto"), ({"LLAMA2_PUBLIC_METRICS": "x"}, "true or false")],
)  # fmt: skip
def test_a_wrong_value_in_the_environment(environment: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        options(**environment)


def test_the_number_of_processes(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert options(SM_NUM_GPUS="4").tensor_parallel == 4 and parallel.ranks(1, {}) is None
    assert parallel.ranks(options(SM_NUM_GPUS="0").tensor_parallel, {}) is None  # SageMaker without a GPU
    assert parallel.ranks(None, {"WORLD_SIZE": "2", "RANK": "1"}) == parallel.RankOptions(1, 2, 1, 2)
    with pytest.raises(InputError, match="is 3 but 2 processes were started"):
        parallel.ranks(3, {"WORLD_SIZE": "2"})
    monkeypatch.setenv("SM_NUM_GPUS", "2")
    assert run("serve", checkpoint, "--draft", checkpoint)[0] == 2


def test_two_processes_serve_one_model(checkpoint: Path) -> None:
    pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")
    body = json.dumps({"prompt": "a b", "max_tokens": 12, "temperature": 0, "ignore_eos": True}).encode()
    words = ("--tensor-parallel", "2", "--runner", "torch", "--dtype", "float32")
    with serving(checkpoint, *words) as (process, port):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            text = json.load(reply)["choices"][0]["text"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    model = LlamaForCausalLM.from_pretrained(checkpoint, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer("a b", return_tensors="pt").input_ids
    found = model.generate(ids, max_new_tokens=12, eos_token_id=None, runner="torch")[0, ids.shape[1] :]
    assert text == tokenizer.decode(found)


@pytest.mark.slow
def test_the_end_of_one_process_is_that_of_all(checkpoint: Path) -> None:
    pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")
    if not Path("/proc/self/stat").exists():
        pytest.skip("finds the other process in /proc")
    with serving(checkpoint, "--tensor-parallel", "2") as (process, _):
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        assert process.wait(60) != 0


@contextlib.contextmanager
def serving(model: Path, *words: str) -> Iterator[tuple["subprocess.Popen[bytes]", int]]:
    """`llama2 serve` with a cache of 1024 tokens, ready: its process and its port, of its own choice."""
    argv = [sys.executable, "-m", "llama2", "serve", str(model), "--port", "0", "--max-batch-total-tokens", "1024"]
    with tempfile.NamedTemporaryFile() as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*argv, *words], env=environment, stderr=log.file)
        try:
            yield process, ready_port(process, Path(log.name))
        finally:
            process.kill()
            process.wait()


def ready_port(process: "subprocess.Popen[bytes]", log: Path, context: ssl.SSLContext | None = None) -> int:
    """The port of a server, as its log names it, once it has its model. How long that may take is pytest's to bound."""
    while process.poll() is None:
        if found := re.search(r"running on (https?)://127\.0\.0\.1:(\d+)", log.read_text()):
            with contextlib.suppress(urllib.error.HTTPError):  # 503 while it loads
                urllib.request.urlopen(f"{found[1]}://localhost:{found[2]}/ready", context=context, timeout=60).close()
                return int(found[2])
        time.sleep(0.05)
    raise AssertionError(f"the server has ended with {process.returncode}: {log.read_text()}")


def test_several_models_of_a_folder(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")
    shutil.copytree(checkpoint, tmp_path / "models" / "owner" / "x")
    (tmp_path / "models" / "broken.gguf").write_bytes(b"junk")
    (tmp_path / "models" / "empty").mkdir()
    with serving(checkpoint, "--models", str(tmp_path / "models"), "--keep-alive", "1h") as (process, port):

        def ask(path: str, body: dict[str, object] | None = None) -> tuple[int, dict[str, Any]]:
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    return reply.status, json.load(reply)
            except urllib.error.HTTPError as error:
                return error.code, json.load(error)

        names = [card["id"] for card in ask("/v1/models")[1]["data"]]
        assert names == [checkpoint.name, "owner/x"]
        for name in ("owner/x", "x", checkpoint.name):
            code, answer = ask("/v1/completions", {"model": name, "prompt": "a", "max_tokens": 2})
            assert code == 200 and answer["model"] == name
        assert [row["name"] for row in ask("/api/ps")[1]["models"]] == [f"{checkpoint.name}:latest", "owner/x:latest"]
        code, answer = ask("/v1/completions", {"model": "broken", "prompt": "a"})
        assert code == 500 and "GGUF header" in answer["error"]["message"]
        assert str(tmp_path) not in answer["error"]["message"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--models", "/nowhere"), "/nowhere', which is no folder"),
        (("--keep-alive", "soon"), "--keep-alive: it is 'soon'"),
        (("--keep-alive", "5m", "--lora-adapters", "a=b"), "--lora-adapters is of one model"),
        (("--keep-alive", "5m", "--tensor-parallel", "2"), "--tensor-parallel is of one model"),
        (("/nowhere.gguf",), "/nowhere.gguf"),
        (("--max-models", "0"), "--max-models is 0; it must be at least 1"),
    ],
)
def test_several_models_that_cannot_be_served_are_told_at_the_start(
    run: Run, checkpoint: Path, words: tuple[str, ...], message: str
) -> None:
    pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")
    code, _, err = run("serve", checkpoint, "--port", "0", *words)
    assert code == 2 and message in err


def test_guesses_change_no_answer(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
    source = tmp_path / "in.jsonl"
    lines = [{"prompt": text, "max_tokens": 20, "temperature": i, "seed": 1} for i, text in enumerate(["a b a b", "c"])]
    source.write_text("\n".join(map(json.dumps, lines)))
    texts = []
    for i, more in enumerate([(), ("--draft", checkpoint), ("--speculate", "3")]):
        target = tmp_path / f"{i}.jsonl"
        code, _, err = run("batch", "-m", checkpoint, source, target, "--max-batch-total-tokens", "1024", *more)
        assert code == 0 and ("guesses in a step" in err) == (more[:1] == ("--draft",))
        rows = map(json.loads, target.read_text().splitlines())
        texts.append({row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows})
    assert texts[0] == texts[1] == texts[2]
    assert run("batch", "-m", checkpoint, source, tmp_path / "x", "--speculate", "-1")[0] == 2


def test_batch_answers_each_line_once(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"prompt": "a", "max_tokens": 4},
        {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions",
         "body": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}},
        {"inputs": "Hi", "parameters": {"max_new_tokens": 2}},
        {"prompt": "a", "temperature": -1},
    ]  # fmt: skip
    source.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    size = ("--max-batch-total-tokens", "1024", "--quiet")
    code, out, err = run("batch", "-m", checkpoint, source, target, *size)
    assert (code, out) == (1, "") and "4 lines answered" in err and "1 of them with an error" in err
    found = {row["custom_id"]: row for row in map(json.loads, target.read_text().splitlines())}
    assert set(found) == {"line-1", "c", "line-3", "line-4"}
    assert found["c"]["response"]["body"]["usage"]["completion_tokens"] == 3 and found["c"]["error"] is None
    assert found["line-4"]["response"]["status_code"] == 400 and "temperature" in found["line-4"]["error"]["message"]

    whole = target.read_text().splitlines(keepends=True)
    target.write_text("".join(whole[:2]) + whole[2][:20])  # as an interruption in the middle of a line leaves it
    code, _, err = run("batch", "-m", checkpoint, source, target, *size)
    assert "2 of 4 lines are answered already" in err
    again = target.read_text().splitlines(keepends=True)
    assert again[:2] == whole[:2] and len(again) == 4
    assert {json.loads(line)["custom_id"] for line in again} == set(found)
    assert run("batch", "-m", checkpoint, source, target, *size)[0] == 0 and target.read_text() == "".join(again)


@pytest.mark.parametrize(
    ("line", "message"),
    [("x", "not a JSON object"),
     ('{"a": 1}', "needs messages, prompt or inputs"), ('{"prompt": "x", "stream": true}', "stream"),
     ('{"url": "/metrics", "body": {}}', "/metrics"), ('{"prompt": "x", "custom_id": "line-9"}', "")],
)  # fmt: skip
def test_batch_refuses_lines_that_are_none(run: Run, checkpoint: Path, tmp_path: Path, line: str, message: str) -> None:
    pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
    source = tmp_path / "in.jsonl"
    source.write_text(line + "\n" + ('{"prompt": "x", "custom_id": "line-9"}\n' if not message else ""))
    code, _, err = run("batch", "-m", checkpoint, source, tmp_path / "out.jsonl")
    assert code == 2 and (message or "is there twice") in err and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "held",
    [
        b"precious notes, and no line feed",
        b"a line\nprecious",
        b'{"custom_id": "a", "url": "/v1/completions", "body": {}}\n',
        b'{"custom_id": "a", "response": 1, "error": null}\n{"my": "not',
    ],
)
def test_batch_leaves_a_file_that_is_not_its_own_as_it_is(
    run: Run, checkpoint: Path, tmp_path: Path, held: bytes
) -> None:
    pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "x"}\n')
    target.write_bytes(held)
    code, _, err = run("batch", "-m", checkpoint, source, target)
    assert code == 2 and "is no answer of `llama2 batch`; give another output file, or --overwrite" in err
    assert target.read_bytes() == held
    assert run("batch", "-m", checkpoint, source, source)[0] == 2 and source.read_text() == '{"prompt": "x"}\n'


def test_batch_waits_for_nobody(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    """Another process has the lock of OUT."""
    pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
    source, lock = tmp_path / "in.jsonl", tmp_path / ".out.jsonl.lock"
    source.write_text('{"prompt": "x"}\n')
    lock.write_text('{"pid": 77, "machine": "here", "since": "today"}')
    with lock.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        code, _, err = run("batch", "-m", checkpoint, source, tmp_path / "out.jsonl")
    assert code == 2 and "is being written by process 77 on 'here', since 'today'" in err
    assert not (tmp_path / "out.jsonl").exists()


def test_serving_over_tls_on_sagemakers_terms(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="serving needs the extra `serve`")
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate),
             "-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]  # fmt: skip
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("needs openssl")
    log = tmp_path / "log"
    environment = {
        "HF_MODEL_ID": str(checkpoint),
        "MAX_TOTAL_TOKENS": "64",
        "MAX_BATCH_TOTAL_TOKENS": "1024",
        "PATH": "/usr/bin",
    }
    argv = [sys.executable, "-m", "llama2.cli", "serve", "--port", "0", "--ssl-certfile", str(certificate),
            "--ssl-keyfile", str(key)]  # fmt: skip
    with log.open("wb") as file, subprocess.Popen(argv, stderr=file, env=environment) as process:
        context = ssl.create_default_context(cafile=str(certificate))
        try:
            port = ready_port(process, log, context)
            body = json.dumps({"inputs": "Hi", "parameters": {"max_new_tokens": 3}}).encode()
            request = urllib.request.Request(
                f"https://localhost:{port}/invocations", body, {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, context=context, timeout=60) as reply:
                assert "generated_text" in json.load(reply)[0]
        finally:
            process.terminate()
            assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("--step-stretch", "0.5", "0 for no bound, or at least 1"),
        ("--step-stretch", "-1", "at least 0"),
        ("--max-running-per-key", "0", "at least 1"),
        ("--header-timeout", "inf", "finite"),
        ("--port", "99999", "between 0 and 65535"),
    ],
)
def test_numbers_that_bound_nothing_are_refused_before_a_model_is_looked_for(
    flag: str, value: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "-m", "/no/such/model", flag, value]) == 2
    error = capsys.readouterr().err
    assert flag in error and told in error


@pytest.mark.parametrize("name", ["port", "tensor_parallel", "max_stop_sequences", "max_top_n_tokens", "stall_timeout"])
def test_zero_is_taken_where_it_says_something(name: str) -> None:
    """SageMaker sets SM_NUM_GPUS=0 on machines without a GPU."""
    check_numbers(replace(ServeOptions(), **{name: 0}))


def test_what_is_loaded_is_never_collected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection of all objects of a loaded model holds the interpreter's lock for 0.3 s."""
    frozen: list[int] = []

    class Opened:
        def open(self, engine: Any, bounds: Any) -> None:
            frozen.append(gc.get_freeze_count())

    monkeypatch.setattr("llama2.cli.serve.make_engine", lambda *_: (object(), object()))
    gc.unfreeze()
    try:
        assert gc.get_freeze_count() == 0
        open_model(None, None, (), Opened())  # type: ignore[arg-type]
        assert frozen[0] > 10_000
    finally:
        gc.freeze()  # as tests/conftest.py has it
