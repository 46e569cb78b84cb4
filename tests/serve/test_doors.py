"""Who gets in and how: keys and their file, names and origins, the metrics' own key; what a terminal sees of it."""

import io
import json
import os
import time
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="serving needs the extra `serve`")

from serve.conftest import Serve, Served
from wire import Reply, call, get, post

from llama2.errors import InputError
from llama2.serve import auth as keys_module
from llama2.serve import logs, static
from llama2.serve.auth import Keys
from llama2.serve.errors import Refusal
from llama2.serve.origin import allowed_hosts, check_host


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of keys are looked at for every request."""
    monkeypatch.setattr(keys_module, "_LOOK_AGAIN", 0.0)


def bearer(keys: Keys, key: str) -> bool:
    return keys.owner(f"Bearer {key}") is not None


# -- keys --------------------------------------------------------------------------------------------------------


def test_keys_are_compared_whole(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(
        "\ufeff# a comment\na:b\nwith#sign\nalice: one\n  two  \nbob:\tthree:four\n#five\n", encoding="utf-8"
    )
    keys = Keys(["x:y"], file)
    for good in ("a:b", "with#sign", "one", "two", "three:four", "x:y"):
        assert bearer(keys, good), good
    for bad in ("b", "a", "with", "alice: one", "alice", "three", "four", "five", "#five", "y", "", " ", "A:B"):
        assert not bearer(keys, bad), bad
    assert keys.owner("Basic a:b") is None and keys.owner(None) is None and keys.owner("a:b") is None


@pytest.mark.parametrize("text", ["", "# nothing\n", "two words\n", "good\nk\x00y\n", "good\nschlüssel\n", "a: b c\n"])
def test_a_file_that_is_wrong_opens_nothing_and_says_so(eager: None, tmp_path: Path, text: str) -> None:
    file, out = tmp_path / "keys", io.StringIO()
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError):
        Keys([], file)
    file.write_text("old\n")
    keys = Keys(["given"], file)
    assert bearer(keys, "old")
    listener = logs.start("info", out)
    file.write_text(text, encoding="utf-8")
    for _ in range(3):
        assert not bearer(keys, "old") and not bearer(keys, "good") and bearer(keys, "given") and keys.wanted
    listener.stop()
    logs.logger.handlers.clear()
    lines = [line for line in map(json.loads, out.getvalue().splitlines()) if line["event"] != "request"]
    assert [line["event"] for line in lines] == ["no key of the file is valid"] and str(file) in lines[0]["reason"]
    assert "k\x00y" not in out.getvalue() and "schl" not in out.getvalue()  # a key is a secret
    file.write_text("new\n")
    assert bearer(keys, "new") and not bearer(keys, "old")


def test_a_file_that_cannot_be_read_opens_nothing(eager: None, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n")
    keys = Keys([], file)
    file.unlink()
    assert not bearer(keys, "one")
    file.write_bytes(b"\xff\xfe\n")
    assert not bearer(keys, "one")
    file.unlink()
    os.mkfifo(file)  # opening it would wait for ever
    assert not bearer(keys, "one")
    file.unlink()
    file.write_text("one\n")
    assert bearer(keys, "one")


def test_an_owner_is_its_key_wherever_that_stands(eager: None, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("a: one\nb: two\n")
    keys = Keys([], file)
    first = keys.owner("Bearer one")
    file.write_text("c: new\nsame: two\nx: one\n")
    assert keys.owner("Bearer one") == first
    assert len({keys.owner(f"Bearer {key}") for key in ("one", "two", "new")}) == 3


# -- names and origins -------------------------------------------------------------------------------------------


def test_a_server_on_loopback_answers_to_its_own_names_only(serve: Serve) -> None:
    served = serve(allowed_hosts=allowed_hosts(("model.example",), "127.0.0.1"))
    for host in ("127.0.0.1", "localhost", f"LOCALHOST:{served.port}", "[::1]:80", "model.example", "model.example.:1"):
        assert get(served.port, "/info", host=host).status == 200, host
    for host in ("evil.example", "127.0.0.1.evil.example", "evil.example:8000", "", "localhost.evil", "2130706433"):
        reply = get(served.port, "/info", host=host)
        assert reply.status == 421 and "--allowed-hosts" in reply.json["error"], host
        assert get(served.port, "/ui/", host=host).status == 421
        assert call(served.port, "POST", "/v1/completions", {"prompt": "x"}, {"host": host}).status == 421
        assert get(served.port, "/health", host=host).status == 200  # probes come by address


def test_names_by_what_the_server_listens_on() -> None:
    assert allowed_hosts((), "0.0.0.0") == () == allowed_hosts(("*",), "127.0.0.1")
    assert "localhost" in allowed_hosts((), "::1") and allowed_hosts(("A.b",), "0.0.0.0") == ("a.b",)
    check_host("anything", ())
    with pytest.raises(Refusal):
        check_host(None, ("localhost",))


def untyped(port: int, **headers: str) -> Reply:
    """A body that does not say what it is, as a page elsewhere can send without asking."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", "/tokenize", b'{"inputs": "x"}', named)
        return Reply(connection.getresponse())
    finally:
        connection.close()


def test_bodies_of_other_origins_must_be_json(serve: Serve) -> None:
    served = serve(cors_origins=("https://friend.example",))
    own = f"http://127.0.0.1:{served.port}"
    assert untyped(served.port).status == 200  # no browser
    assert untyped(served.port, origin=own).status == 200
    assert untyped(served.port, origin="https://friend.example").status == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://["):
        assert untyped(served.port, origin=origin).status == 415, origin
        assert (
            post(served.port, "/tokenize", b'{"inputs": "x"}', origin=origin, content_type="text/plain").status == 415
        )
    assert untyped(served.port, sec_fetch_site="cross-site").status == 415
    assert untyped(served.port, sec_fetch_site="same-origin").status == 200


def test_a_key_in_any_of_its_headers(serve: Serve) -> None:
    port = serve(keys=Keys(["user"])).port
    assert get(port, "/info", x_api_key="user").status == get(port, "/info", api_key="user").status == 200
    assert get(port, "/info", authorization="Basic xyz", x_api_key="user").status == 200  # a proxy's own login
    for headers in ({"x_api_key": "User"}, {"api_key": ""}, {"authorization": "Bearer "}, {"authorization": "user"}):
        assert get(port, "/info", **headers).status == 401


def test_head_where_get_works(served: Served) -> None:
    for path in ("/", "/health", "/v1/models", "/info", "/openapi.json"):
        reply, head = get(served.port, path), call(served.port, "HEAD", path)
        assert head.status == 200 and head.content == b""
        assert head.headers["content-length"] == reply.headers["content-length"]
    assert call(served.port, "HEAD", "/generate").status == 405


def test_metrics_may_have_a_key_of_their_own(serve: Serve) -> None:
    served = serve(keys=Keys(["user"]))
    served.service.metrics_keys = Keys(["watcher"])
    assert get(served.port, "/metrics", authorization="Bearer user").status == 200  # the routes were made before
    from llama2.serve.app import make_app

    served.server.config.loaded_app = make_app(served.service)
    assert get(served.port, "/metrics", authorization="Bearer watcher").status == 200
    assert get(served.port, "/metrics", authorization="Bearer user").status == 401
    assert get(served.port, "/info", authorization="Bearer watcher").status == 401
    assert get(served.port, "/info", authorization="Bearer user").status == 200


def test_the_page_keeps_to_itself() -> None:
    headers = static.HEADERS
    assert headers["X-Frame-Options"] == "DENY" and headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "camera=()" in headers["Permissions-Policy"]


# -- logs --------------------------------------------------------------------------------------------------------


def test_no_log_line_controls_a_terminal() -> None:
    out = io.StringIO()
    listener = logs.start("info", out)
    nasty = "a\x1b[2J\x9b2J\x7f\u2028\u202e\r\nb\ud800"
    logs.logger.info(nasty, extra={"fields": {"path": nasty}})
    listener.stop()
    logs.logger.handlers.clear()
    lines = out.getvalue().removesuffix("\n").split("\n")
    assert all(" " <= c <= "~" for line in lines for c in line)
    assert sum(json.loads(line)["path"] == nasty for line in lines) == 1  # others are of servers that still end


def test_paths_with_control_characters_are_logged_escaped(serve: Serve) -> None:
    out = io.StringIO()
    served = serve()
    listener = logs.start("info", out)
    get(served.port, "/%C2%9B2J%1B%5B")
    while "2J" not in out.getvalue():  # the line is written after the answer
        time.sleep(0.005)
    listener.stop()
    logs.logger.handlers.clear()
    assert "\\u009b" in out.getvalue() and "\x9b" not in out.getvalue()


# -- what is written about it ------------------------------------------------------------------------------------


def test_every_limit_that_can_be_set_is_documented() -> None:
    from dataclasses import fields

    from llama2.cli.serve import ServeOptions

    text = (Path(__file__).resolve().parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    words = ("timeout", "max_", "per_minute", "limit", "hosts", "metrics", "key", "workers")
    # What these bound is a matter of the model and the memory: docs/serving.md.
    others = {
        "max_input_tokens", "max_total_tokens", "max_batch_total_tokens", "max_batch_prefill_tokens", "max_batch_size",
        "max_best_of", "max_models", "max_top_n_tokens", "request_timeout", "api_key", "ssl_keyfile",
    }  # fmt: skip
    named = [f.name for f in fields(ServeOptions) if any(word in f.name for word in words) and f.name not in others]
    assert len(named) > 15
    missing = [name for name in named if f"`--{name.replace('_', '-')}`" not in text]
    assert not missing
