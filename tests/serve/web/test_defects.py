"""Faults of the chat page that users met, each driven in headless Chromium as it was met."""

import json
from collections.abc import Callable

import pytest
from chat_page import PHONE, Page, answers, idle, send
from chat_server import ChatServer

sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
pytestmark = pytest.mark.slow
expect = sync_api.expect
Open = Callable[..., Page]
FULL = {
    "error": {
        "message": "the prompt has 5000 tokens",
        "type": "invalid_request_error",
        "code": "context_length_exceeded",
    }
}


@pytest.mark.parametrize("view", [{"width": 1280, "height": 800}, {"width": 1000, "height": 700}, PHONE])
def test_the_page_never_scrolls_sideways(opened: Open, view: dict[str, int]) -> None:
    page = opened(viewport=view)
    send(page, "first")
    page.evaluate("document.querySelector('#set-seed').focus({preventScroll: false})")
    page.evaluate("document.querySelector('#set-seed').scrollIntoView()")
    page.evaluate("document.body.scrollLeft = 400, document.documentElement.scrollLeft = 400")
    assert page.evaluate("[document.body.scrollLeft, document.documentElement.scrollLeft, scrollX]") == [0, 0, 0]
    box = page.locator("#prompt").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= view["width"]


def test_no_arrow_to_the_latest_in_a_short_chat(opened: Open, server: ChatServer) -> None:
    page = opened()
    server.answers["long"] = "line\n\n" * 80
    send(page, "long")
    latest = page.get_by_label("To the latest")
    expect(latest).to_be_hidden()
    page.locator("#thread").evaluate("node => node.scrollTo(0, 0)")
    expect(latest).to_be_visible()
    page.get_by_role("button", name="Edit message").first.click()
    page.get_by_label("Edit your message").fill("short")
    page.keyboard.press("Enter")
    idle(page)
    expect(answers(page)).to_have_text("You said: short")
    expect(latest).to_be_hidden()


def test_a_full_context_can_be_made_smaller(opened: Open, server: ChatServer) -> None:
    page = opened()
    for text in ("one", "two", "three"):
        send(page, text)
    server.failures = [(400, FULL, {})]
    send(page, "four")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("5000 tokens")
    alert.get_by_role("button", name="Drop the oldest turns").click()
    idle(page)
    expect(answers(page).last).to_have_text("You said: four")
    assert [m["content"] for m in server.requests[-1]["messages"] if m["role"] == "user"] == ["three", "four"]
    expect(page.locator(".message.user")).to_have_count(4)  # they stay on the page
    send(page, "five")
    assert [m["content"] for m in server.requests[-1]["messages"] if m["role"] == "user"] == ["three", "four", "five"]
    server.failures = [(400, FULL, {})]
    send(page, "six")
    page.get_by_role("alert").get_by_role("button", name="New chat").click()
    expect(page.locator("#greeting")).to_be_visible()


def test_a_refusal_offers_to_edit(opened: Open, server: ChatServer) -> None:
    page = opened()
    server.failures = [(400, {"error": {"message": "the message has a marker", "code": None}}, {})]
    send(page, "bad")
    page.get_by_role("alert").get_by_role("button", name="Edit").click()
    area = page.get_by_label("Edit your message")
    expect(area).to_have_value("bad")
    area.fill("good")
    page.keyboard.press("Enter")
    idle(page)
    expect(answers(page)).to_have_text("You said: good")
    server.failures = [(503, {"error": {"message": "later"}}, {})]
    send(page, "again")
    expect(page.get_by_role("alert").get_by_role("button", name="Edit")).to_have_count(0)


def test_an_invalid_setting_says_why_under_its_field(opened: Open, server: ChatServer) -> None:
    page = opened(viewport=PHONE, is_mobile=True, has_touch=True)
    page.locator("#tune").tap()
    page.fill("#set-top_k", "3.5")
    hint = page.locator("#set-top_k-hint")
    expect(hint).to_contain_text("A whole number from 0 to 1000")
    expect(page.locator("#set-top_k")).to_have_attribute("aria-describedby", "set-top_k-hint")
    page.fill("#set-top_k", "3")
    expect(hint).to_have_text("Only this many of the likeliest tokens")
    page.select_option("#set-form", "schema")
    page.fill("#set-schema", "{")
    expect(page.locator("#set-schema-hint")).to_contain_text("Not JSON yet")


def test_a_wide_table_scrolls_by_itself_on_a_phone(opened: Open, server: ChatServer) -> None:
    page = opened(viewport=PHONE, is_mobile=True, has_touch=True)
    heads = [f"column {i}" for i in range(8)]
    server.answers["table"] = "\n".join(
        f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * 8, ["some value"] * 8)
    )
    page.fill("#prompt", "table")
    page.get_by_role("button", name="Send").tap()
    idle(page)
    sizes = page.locator(".table").evaluate("node => [node.scrollWidth, node.clientWidth]")
    assert sizes[0] > sizes[1] + 100
    page.locator(".table").evaluate("node => node.scrollTo(200, 0)")
    assert page.locator(".table").evaluate("node => node.scrollLeft") == 200
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_entities_are_characters(opened: Open, server: ChatServer) -> None:
    page = opened()
    server.answers["entities"] = (
        "a &lt;b&gt; &amp; &eacute;&#33;&#x41; &nonsense; `&lt;` &lt;script&gt;alert(1)&lt;/script&gt;"
    )
    send(page, "entities")
    expect(answers(page)).to_have_text("a <b> & é!A &nonsense; &lt; <script>alert(1)</script>")
    assert page.locator("script").count() == 2  # the page's own


def test_settings_reach_the_request(opened: Open, server: ChatServer) -> None:
    page = opened()
    page.locator("#tune").click()
    page.fill("#set-min_p", "0.1")
    page.fill("#set-repetition_penalty", "1.15")
    page.select_option("#set-form", "schema")
    page.fill("#set-schema", '{"type": "object"}')
    send(page, "Hi")
    body = server.requests[-1]
    assert (body["min_p"], body["repetition_penalty"]) == (0.1, 1.15)
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"}
    page.select_option("#set-form", "json")
    send(page, "Ho")
    assert server.requests[-1]["response_format"] == {"type": "json_object"}
    page.reload()
    page.wait_for_selector("body.ready")
    assert page.input_value("#set-repetition_penalty") == "1.15"


def test_text_goes_to_a_base_model_as_it_is(opened: Open, server: ChatServer) -> None:
    page = opened()
    page.locator("#tune").click()
    page.fill("#set-system", "ignored here")
    page.check("#set-base")
    page.fill("#prompt", "Once upon a")
    page.keyboard.press("Enter")
    idle(page)
    body = server.requests[-1]
    assert "messages" not in body and body["prompt"] == "Once upon a" and body["max_tokens"] == -1


def test_text_files_can_be_dropped_in(opened: Open, server: ChatServer) -> None:
    page = opened()
    drop = """([name, text]) => {
      const data = new DataTransfer();
      data.items.add(new File([text], name, {type: "text/plain"}));
      const main = document.getElementById("main");
      main.dispatchEvent(new DragEvent("dragover", {dataTransfer: data, bubbles: true, cancelable: true}));
      main.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
    }"""
    page.fill("#prompt", "What is this?")
    page.evaluate(drop, ["a.py", "print('```')\n"])
    expect(page.locator("#prompt")).to_have_value("What is this?\n\na.py:\n````\nprint('```')\n````")
    page.evaluate(drop, ["b.bin", "\0\1"])
    expect(page.locator("#notices")).to_contain_text("b.bin is no text file")
    page.keyboard.press("Enter")
    idle(page)
    assert json.dumps(server.requests[-1]["messages"][-1]["content"]).count("a.py") == 1
