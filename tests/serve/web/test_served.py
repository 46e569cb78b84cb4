"""The chat page over the real server: its headers, its own redirect, no key; and one answer in a browser."""

from typing import Any

import pytest
from chat_page import answers, idle, ready, send
from serve.conftest import Serve, Served
from wire import call, get

from llama2.serve import static
from llama2.serve.auth import Keys


def test_files_with_their_headers(served: Served) -> None:
    reply = get(served.port, "/ui/")
    assert reply.status == 200 and reply.content == static.assets()["index.html"].body
    assert reply.headers["content-security-policy"] == static.POLICY
    assert reply.headers["x-content-type-options"] == "nosniff" and reply.headers["referrer-policy"] == "no-referrer"
    script = get(served.port, "/ui/app.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    again = get(served.port, "/ui/app.js", **{"If-None-Match": script.headers["etag"]})
    assert again.status == 304 and again.content == b""
    assert call(served.port, "HEAD", "/ui/app.js").headers["content-length"] == str(len(script.content))


def test_the_page_without_its_slash_leads_to_it_below_any_prefix(served: Served) -> None:
    reply = get(served.port, "/ui")
    assert reply.status == 307 and reply.headers["location"] == "ui/"


@pytest.mark.parametrize("path", ["/ui/nothing.js", "/ui/../app.py", "/ui/..%2fapp.py", "/ui//etc/passwd", "/ui/%00"])
def test_other_paths_lead_nowhere(served: Served, path: str) -> None:
    assert get(served.port, path).status == 404


def test_the_page_is_open_where_the_routes_want_a_key(serve: Serve) -> None:
    locked = serve(keys=Keys(["abc"]))
    assert get(locked.port, "/ui/").status == 200
    assert get(locked.port, "/v1/models").status == 401


@pytest.mark.slow
def test_a_chat_with_a_model(browser: Any, serve: Serve) -> None:
    """Random weights: what counts is that the two sides understand each other, in every field and both ways."""
    model = serve(keys=Keys(["abc"]))
    tab = browser.new_page()
    tab.goto(f"{model.url}/ui")
    ready(tab)
    tab.get_by_label("API key").fill("abc")
    tab.keyboard.press("Enter")
    tab.locator("#model-name", has_text="tiny").wait_for()
    tab.click("#tune")
    tab.fill("#set-system", "Be brief")
    fields = {"temperature": "1.5", "top_p": "0.9", "top_k": "40", "max_tokens": "12", "seed": "7"}
    for name, value in fields.items():
        tab.fill(f"#set-{name}", value)
    tab.fill("#set-stop", "never-to-be-seen")
    tab.check("#set-probabilities")
    send(tab, "Hello")
    assert tab.locator(".error").count() == 0
    told = tab.locator(".token").count()  # special tokens are not told
    assert 6 < told <= 12
    assert "12 tokens" in tab.locator(".figures").inner_text()
    assert tab.locator(".meter").inner_text().endswith("of 1,024 tokens")
    first = answers(tab).inner_text()
    tab.get_by_role("button", name="Regenerate").click()
    tab.locator(".branches").wait_for()
    idle(tab)
    assert answers(tab).inner_text() == first  # the same seed
    tab.get_by_role("button", name="Continue").click()
    tab.wait_for_function("(told) => document.querySelectorAll('.token').length > told", arg=told)
    idle(tab)
    assert answers(tab).inner_text().startswith(first) and tab.locator(".error").count() == 0
    send(tab, "More " * 400)
    refused = tab.get_by_role("alert")
    assert "max_input_tokens" in refused.inner_text()  # the server says its bound
    assert refused.get_by_role("button").all_inner_texts() == ["Drop the oldest turns", "New chat", "Edit", "Retry"]
    tab.close()
    assert model.quiet()
