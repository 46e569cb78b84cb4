"""The chat page in headless Chromium, against canned answers: what a user does, and what a hostile answer may not do."""

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import BREAK, ERROR, GATE, ChatServer

sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs Chromium on the PATH (Debian: apt-get install chromium)", allow_module_level=True)

pytestmark = pytest.mark.slow
expect = sync_api.expect
Page = Any
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as server:
        yield server


@pytest.fixture
def opened(browser: Any, server: ChatServer) -> Iterator[Callable[..., Page]]:
    """Opens the page in a context of its own; every script error and every breach of the content policy fails the test."""
    contexts, faults = [], []

    def watch(message: Any) -> None:
        # The console repeats every failed request; those are the tests' own.
        if message.type == "error" and "Failed to load resource" not in message.text:
            faults.append(message.text)

    def open_page(path: str = "", context: Any = None, **options: Any) -> Page:
        if context is None:
            context = browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **options})
            context.set_default_timeout(10_000)
            contexts.append(context)
        page = context.new_page()
        page.on("console", watch)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(server.url + path)
        page.wait_for_selector("body.ready")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def send(page: Page, text: str, wait: bool = True) -> None:
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    if wait:
        idle(page)


def idle(page: Page) -> None:
    expect(page.locator(".send")).to_have_attribute("aria-label", "Send")


def answers(page: Page) -> Any:
    return page.locator(".message.assistant .text")


def sent(server: ChatServer) -> list[tuple[str, str]]:
    """Roles and texts of the last request."""
    return [(m["role"], m["content"]) for m in server.requests[-1]["messages"]]


# -- talking -----------------------------------------------------------------------------------------------------


def test_send_and_figures(opened: Callable[..., Page], server: ChatServer) -> None:
    page = opened()
    expect(page.locator("#greeting")).to_be_visible()
    expect(page.locator("#model-name")).to_have_text("llama-2")
    server.pace = 0.01
    send(page, "Hello there")
    expect(answers(page)).to_have_text("You said: Hello there")
    expect(page.locator(".message.user .text")).to_have_text("Hello there")
    figures = page.locator(".figures").inner_text()
    assert re.search(r"^4 tokens  ·  \d+(\.\d)? tokens/s  ·  first after \d\.\d\d s$", figures), figures
    expect(page.locator(".meter")).to_have_text("11 of 4,096 tokens")
    expect(page.locator("#spoken")).to_have_text("Answer: You said: Hello there")
    assert page.evaluate("document.activeElement.id") == "prompt"
    body = server.requests[-1]
    assert body == {
        "model": "tiny/llama-2",
        "messages": [{"role": "user", "content": "Hello there"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    send(page, "Again")
    assert sent(server) == [("user", "Hello there"), ("assistant", "You said: Hello there"), ("user", "Again")]


def test_answer_shows_while_it_streams(opened: Callable[..., Page], server: ChatServer) -> None:
    server.answers["story"] = f"Once **upon** a{GATE} time"
    page = opened()
    send(page, "story", wait=False)
    expect(answers(page)).to_have_text("Once upon a")
    expect(answers(page).locator("strong")).to_have_text("upon")
    expect(page.locator(".message.assistant")).to_have_attribute("aria-busy", "true")
    expect(page.locator("#spoken")).to_be_empty()
    server.gate.set()
    idle(page)
    expect(answers(page)).to_have_text("Once upon a time")
    expect(page.locator(".message.assistant")).to_have_attribute("aria-busy", "false")


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_ends_the_request_and_keeps_the_text(opened: Callable[..., Page], server: ChatServer, how: str) -> None:
    server.answers["story"] = f"Once upon{GATE} a time"
    page = opened()
    send(page, "story", wait=False)
    expect(answers(page)).to_have_text("Once upon")
    if how == "button":
        page.click(".send")
    else:
        page.keyboard.press("Escape")
    idle(page)
    assert server.gone.wait(5), "the server was not told"
    expect(answers(page)).to_have_text("Once upon")
    expect(page.locator(".aside")).to_have_text("You stopped this answer.")
    send(page, "next")
    assert sent(server)[1] == ("assistant", "Once upon")


def test_stop_before_the_first_token(opened: Callable[..., Page], server: ChatServer) -> None:
    server.answers["story"] = f"{GATE}late"
    page = opened()
    send(page, "story", wait=False)
    expect(page.locator(".waiting")).to_be_visible()
    page.keyboard.press("Escape")
    idle(page)
    send(page, "other")
    assert sent(server) == [("user", "story\n\nother")]  # templates want roles that alternate


def test_enter_shift_enter_and_composing(opened: Callable[..., Page], server: ChatServer) -> None:
    page = opened()
    page.focus("#prompt")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#prompt")).to_have_value("one\ntwo")
    page.evaluate(
        "document.getElementById('prompt').dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    assert server.requests == []
    page.keyboard.press("Enter")
    idle(page)
    assert sent(server) == [("user", "one\ntwo")]


def test_stream_in_the_background(opened: Callable[..., Page], server: ChatServer) -> None:
    server.answers["story"] = f"Once{GATE} upon"
    page = opened()
    send(page, "story", wait=False)
    expect(answers(page)).to_have_text("Once")
    page.keyboard.press("Control+k")
    send(page, "second")
    expect(answers(page)).to_have_text("You said: second")
    expect(page.locator(".busy")).to_have_count(1)
    server.gate.set()
    expect(page.locator(".busy")).to_have_count(0)
    page.click(".conversations .open:has-text('story')")
    expect(answers(page)).to_have_text("Once upon")


# -- branches ----------------------------------------------------------------------------------------------------


def test_edit_makes_a_branch(opened: Callable[..., Page], server: ChatServer) -> None:
    page = opened()
    send(page, "first")
    send(page, "second")
    page.keyboard.press("ArrowUp")
    editor = page.locator(".editor textarea")
    expect(editor).to_be_focused()
    expect(editor).to_have_value("second")
    editor.fill("changed")
    page.keyboard.press("Enter")
    idle(page)
    assert sent(server)[-1] == ("user", "changed") and len(sent(server)) == 3
    expect(answers(page).last).to_have_text("You said: changed")
    branches = page.locator(".message.user .branches").last
    expect(branches).to_contain_text("2/2")
    page.get_by_role("button", name="Previous version").click()
    expect(answers(page).last).to_have_text("You said: second")
    expect(page.locator(".message.user .branches").last).to_contain_text("1/2")
    expect(page.get_by_role("button", name="Next version")).to_be_focused()
    send(page, "third")
    assert [text for _, text in sent(server)][2:] == ["second", "You said: second", "third"]


def test_editing_the_first_message_branches_at_the_root(opened: Callable[..., Page], server: ChatServer) -> None:
    page = opened()
    send(page, "first")
    page.locator(".message.user .edit").click()
    page.locator(".editor textarea").fill("other start")
    page.get_by_role("button", name="Send", exact=True).first.click()
    idle(page)
    assert sent(server) == [("user", "other start")]
    expect(page.locator("#title")).to_have_text("other start")
    page.get_by_role("button", name="Previous version").click()
    expect(answers(page)).to_have_text("You said: first")


def test_escape_leaves_the_editor(opened: Callable[..., Page]) -> None:
    page = opened()
    send(page, "first")
    page.locator(".message.user .edit").click()
    page.keyboard.press("Escape")
    expect(page.locator(".editor")).to_have_count(0)
    expect(page.locator(".message.user .edit")).to_be_focused()


def test_regenerate_is_a_sibling(opened: Callable[..., Page], server: ChatServer) -> None:
    page = opened()
    server.answers["dice"] = "one"
    send(page, "dice")
    server.answers["dice"] = "two"
    page.get_by_role("button", name="Regenerate").click()
    idle(page)
    expect(answers(page)).to_have_text("two")
    expect(page.locator(".branches")).to_contain_text("2/2")
    assert sent(server) == [("user", "dice")]
    page.get_by_role("button", name="Previous version").click()
    expect(answers(page)).to_have_text("one")


def test_an_edited_answer_is_what_the_model_sees(opened: Callable[..., Page], server: ChatServer) -> None:
    page = opened()
    send(page, "first")
    page.locator(".message.assistant .edit").click()
    page.locator(".editor textarea").fill("I said **this**")
    page.get_by_role("button", name="Save").click()
    expect(answers(page).locator("strong")).to_have_text("this")
    send(page, "next")
    assert sent(server)[1] == ("assistant", "I said **this**")


# -- conversations -----------------------------------------------------------------------------------------------


def test_reload_brings_everything_back(opened: Callable[..., Page], server: ChatServer) -> None:
    page = opened()
    send(page, "first")
    page.get_by_role("button", name="Regenerate").click()
    idle(page)
    page.click("#tune")
    page.fill("#set-system", "Be brief")
    page.fill("#set-temperature", "0.3")
    page.wait_for_timeout(1700)  # settings are saved within a second and a half
    page.reload()
    page.wait_for_selector("body.ready")
    expect(answers(page)).to_have_text("You said: first")
    expect(page.locator(".branches")).to_contain_text("2/2")
    expect(page.locator("#set-temperature")).to_have_value("0.3")
    send(page, "more")
    assert sent(server)[0] == ("system", "Be brief")
    assert server.requests[-1]["temperature"] == 0.3


def test_reload_in_the_middle_of_an_answer(opened: Callable[..., Page], server: ChatServer) -> None:
    server.answers["story"] = f"Once upon{GATE} a time"
    page = opened()
    send(page, "story", wait=False)
    expect(answers(page)).to_have_text("Once upon")
    page.wait_for_timeout(1700)
    page.reload()
    page.wait_for_selector("body.ready")
    expect(answers(page)).to_have_text("Once upon")
    expect(page.locator(".aside")).to_have_text("This answer was interrupted.")


def test_rename_delete_and_undo(opened: Callable[..., Page]) -> None:
    page = opened()
    send(page, "first")
    page.keyboard.press("Control+k")
    expect(page.locator("#greeting")).to_be_visible()
    send(page, "second")
    page.get_by_role("button", name="More for first").click()
    page.get_by_role("menuitem", name="Rename").click()
    page.keyboard.type("Llamas & <b>friends</b>")
    page.keyboard.press("Enter")
    expect(page.locator(".conversations .open")).to_have_text(["second", "Llamas & <b>friends</b>"])
    page.get_by_role("button", name="More for second").click()
    page.get_by_role("menuitem", name="Delete").click()
    expect(page.locator(".conversations .open")).to_have_count(1)
    expect(page.locator("#greeting")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".conversations .open")).to_have_count(2)
    page.reload()
    page.wait_for_selector("body.ready")
    expect(page.locator(".conversations .open")).to_have_text(["second", "Llamas & <b>friends</b>"])


def test_back_goes_to_the_conversation_before(opened: Callable[..., Page]) -> None:
    page = opened()
    send(page, "first")
    page.keyboard.press("Control+k")
    send(page, "second")
    page.click(".conversations .open:has-text('first')")
    expect(answers(page)).to_have_text("You said: first")
    page.go_back()
    expect(answers(page)).to_have_text("You said: second")


def test_export_and_import(opened: Callable[..., Page], tmp_path: Path) -> None:
    page = opened()
    send(page, "first")
    page.get_by_role("button", name="Regenerate").click()
    idle(page)
    with page.expect_download() as download:
        page.click("#export")
    file = tmp_path / "chats.json"
    download.value.save_as(file)
    kept = json.loads(file.read_text())
    assert kept["format"] == "llama2-conversations" and len(kept["conversations"][0]["nodes"]) == 4
    other = opened()
    other.set_input_files("#file", file)
    expect(answers(other)).to_have_text("You said: first")
    expect(other.locator(".branches")).to_contain_text("2/2")
    assert other.url != page.url


BAD_FILES = {
    "not JSON": ("{", "is not JSON"),
    "another format": ('{"format": "x"}', "is no export of this page"),
    "a later version": ('{"format": "llama2-conversations", "version": 2, "conversations": []}', "has version 2"),
    "no nodes": ('{"format": "llama2-conversations", "version": 1, "conversations": [{}]}', '"nodes" is missing'),
    "an orphan": (
        '{"format": "llama2-conversations", "version": 1, "conversations": [{"nodes": [{"id": "a", "parent": "a", "role": "user", "content": ""}]}]}',
        "comes before its parent",
    ),
    "a strange role": (
        '{"format": "llama2-conversations", "version": 1, "conversations": [{"nodes": [{"id": "a", "parent": "root", "role": "root", "content": ""}]}]}',
        "has the role root",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_import_says_what_is_wrong(opened: Callable[..., Page], tmp_path: Path, kind: str) -> None:
    text, reason = BAD_FILES[kind]
    file = tmp_path / "bad.json"
    file.write_text(text)
    page = opened()
    page.set_input_files("#file", file)
    expect(page.locator(".notice")).to_contain_text(reason)
    expect(page.locator(".conversations .open")).to_have_count(0)


def test_full_storage_keeps_the_text_first_then_says_so(opened: Callable[..., Page]) -> None:
    page = opened()
    page.click("#tune")
    page.check("#set-probabilities")
    page.evaluate("""() => {
        const { store } = app.library, write = store.write.bind(store);
        store.write = async (conversation) => {
            globalThis.tried = [...conversation.nodes.values()].some((node) => node.tokens);
            if (globalThis.full || globalThis.tried) throw new (await import("./store.js")).FullError("full");
            await write(conversation);
        };
    }""")
    send(page, "first")
    page.wait_for_function("tried === false")
    expect(page.locator(".notice")).to_have_count(0)
    page.evaluate("globalThis.full = true")
    send(page, "second")
    expect(page.locator(".notice")).to_contain_text("storage is full")


def test_two_tabs_show_the_same(opened: Callable[..., Page]) -> None:
    page = opened()
    send(page, "first")
    other = opened("#" + page.url.split("#")[1], context=page.context)
    expect(answers(other)).to_have_text("You said: first")
    send(page, "second")
    expect(answers(other).last).to_have_text("You said: second")


# -- settings ----------------------------------------------------------------------------------------------------


def test_settings_reach_the_request(opened: Callable[..., Page], server: ChatServer) -> None:
    page = opened()
    page.click("#tune")
    page.fill("#set-system", "Be kind")
    for name, value in {"temperature": "0.7", "top_p": "0.9", "top_k": "40", "max_tokens": "64", "seed": "7"}.items():
        page.fill(f"#set-{name}", value)
    page.fill("#set-stop", "END\n\\n\\n")
    send(page, "first")
    body = server.requests[-1]
    expected = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "max_tokens": 64, "seed": 7, "stop": ["END", "\n\n"]}
    assert {name: body[name] for name in expected} == expected
    assert sent(server) == [("system", "Be kind"), ("user", "first")]
    page.fill("#set-top_p", "1.5")
    expect(page.locator("#set-top_p")).to_have_attribute("aria-invalid", "true")
    send(page, "second")
    assert server.requests[-1]["top_p"] == 0.9
    page.get_by_role("button", name="Use for new chats").click()
    page.keyboard.press("Control+k")
    send(page, "third")
    assert server.requests[-1]["seed"] == 7
    page.get_by_role("button", name="Reset").click()
    send(page, "fourth")
    assert "seed" not in server.requests[-1] and sent(server)[0][0] == "user"


def test_model_of_the_conversation(opened: Callable[..., Page], server: ChatServer) -> None:
    server.models = ["base", "adapters/poet"]
    page = opened()
    page.select_option("#model", "adapters/poet")
    send(page, "first")
    assert server.requests[-1]["model"] == "adapters/poet"
    page.keyboard.press("Control+k")
    send(page, "second")
    assert server.requests[-1]["model"] == "base"


def test_token_probabilities_on_hover_and_keys(opened: Callable[..., Page], server: ChatServer) -> None:
    page = opened()
    page.click("#tune")
    page.check("#set-probabilities")
    server.answers["llamas"] = "Llamas hum when worried."
    send(page, "llamas")
    assert server.requests[-1]["logprobs"] is True and server.requests[-1]["top_logprobs"] == 5
    tokens = page.locator(".token")
    expect(tokens).to_have_text(["Llamas", " hum", " when", " worried."])
    tokens.nth(1).hover()
    rows = page.locator(".token-card li")
    expect(rows).to_have_text(["·other48 %", "·third24 %", "·hum20 %"])
    expect(page.locator(".token-card .chosen")).to_have_text("·hum20 %")
    expect(page.locator(".figures")).to_contain_text("perplexity")
    page.mouse.move(5, 5)
    expect(page.locator(".token-card")).to_be_hidden()
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token.current")).to_have_text(" when")
    page.uncheck("#set-probabilities")
    expect(page.locator(".message.assistant .markdown")).to_have_text("Llamas hum when worried.")


# -- faults ------------------------------------------------------------------------------------------------------


def test_error_and_retry(opened: Callable[..., Page], server: ChatServer) -> None:
    server.failures = [(503, {"error": {"message": "The server is draining"}}, {"Retry-After": "5"})]
    page = opened()
    send(page, "first")
    expect(page.get_by_role("alert")).to_contain_text("The server is draining The server asks to wait 5 s.")
    page.get_by_role("button", name="Retry").click()
    idle(page)
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(answers(page)).to_have_text("You said: first")
    expect(page.locator(".branches")).to_have_count(0)


BODIES = {
    "flat": ({"error": "Model is overloaded", "error_type": "overloaded"}, "Model is overloaded"),
    "detail": ({"detail": [{"loc": ["body"], "msg": "no"}]}, '"msg":"no"'),
    "none": ({}, "status 429"),
}


@pytest.mark.parametrize("kind", BODIES)
def test_error_bodies_of_other_dialects(opened: Callable[..., Page], server: ChatServer, kind: str) -> None:
    body, text = BODIES[kind]
    server.failures = [(429, body, {})]
    page = opened()
    send(page, "first")
    expect(page.get_by_role("alert")).to_contain_text(text)


@pytest.mark.parametrize(("how", "text"), [(ERROR, "The engine failed"), (BREAK, "before the answer was finished")])
def test_a_stream_that_fails_keeps_what_came(opened: Callable[..., Page], server: ChatServer, how: str, text: str) -> None:
    server.answers["story"] = f"Once upon{how}"
    page = opened()
    send(page, "story")
    expect(answers(page)).to_have_text("Once upon")
    expect(page.get_by_role("alert")).to_contain_text(text)
    server.answers["story"] = "Whole"
    page.get_by_role("button", name="Retry").click()
    idle(page)
    expect(answers(page)).to_have_text("Whole")
    expect(page.locator(".branches")).to_contain_text("2/2")


def test_server_away(opened: Callable[..., Page], server: ChatServer) -> None:
    page = opened()
    page.route("**/v1/**", lambda route: route.abort())
    send(page, "first")
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    page.unroute("**/v1/**")
    page.get_by_role("button", name="Retry").click()
    idle(page)
    expect(answers(page)).to_have_text("You said: first")


def test_key_is_asked_for_and_forgotten_with_the_tab(opened: Callable[..., Page], server: ChatServer) -> None:
    server.key = "secret"
    page = opened()
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("did not accept")
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#model-name")).to_have_text("llama-2")
    send(page, "first")
    expect(answers(page)).to_have_text("You said: first")
    server.key = "changed"
    send(page, "second")
    page.get_by_label("API key").fill("changed")
    page.keyboard.press("Enter")
    expect(answers(page).last).to_have_text("You said: second")
    other = opened("#" + page.url.split("#")[1], context=page.context)
    expect(other.get_by_role("dialog")).to_contain_text("kept in this tab only")
    assert "changed" not in other.evaluate("JSON.stringify({...localStorage})")


# -- looks -------------------------------------------------------------------------------------------------------


def test_phone(opened: Callable[..., Page]) -> None:
    page = opened(viewport=PHONE, is_mobile=True, has_touch=True)
    page.fill("#prompt", "A rather long question " * 8 + "unbreakable" * 12)
    page.tap(".send")
    idle(page)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.evaluate("document.getElementById('thread').scrollWidth <= innerWidth")
    expect(page.locator("#sidebar")).to_be_hidden()
    page.tap("#menu")
    expect(page.locator("#sidebar")).to_be_visible()
    assert page.evaluate("document.getElementById('sidebar').contains(document.activeElement)")
    assert page.evaluate("document.getElementById('main').inert")
    page.keyboard.press("Escape")
    expect(page.locator("#sidebar")).to_be_hidden()
    expect(page.locator("#menu")).to_be_focused()
    page.tap("#tune")
    expect(page.locator("#panel")).to_be_in_viewport()
    page.mouse.click(10, 400)
    expect(page.locator("#panel")).to_be_hidden()
    page.focus("#prompt")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_have_value("\n")  # a phone's keyboard has no Shift+Enter
    for button in page.locator(".message.assistant .actions button").all():
        assert button.bounding_box()["height"] >= 36


BRIGHTNESS = """(name) => {
    const [r, g, b] = getComputedStyle(document.querySelector(name)).backgroundColor.match(/[\\d.]+/g).map(Number);
    return (r + g + b) / 3;
}"""


def test_dark_and_light(opened: Callable[..., Page]) -> None:
    page = opened(color_scheme="dark")
    assert page.evaluate(BRIGHTNESS, "body") < 60
    for label, bright in [("light", True), ("dark", False), ("as the system", False)]:
        page.click("#theme")
        expect(page.locator("#theme")).to_have_attribute("aria-label", f"Theme: {label}")
        assert (page.evaluate(BRIGHTNESS, "body") > 200) is bright
    page.click("#theme")
    page.reload()
    page.wait_for_selector("body.ready")
    assert page.evaluate(BRIGHTNESS, "body") > 200


CONTRASTS = """() => {
    const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
    const rgb = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); return canvas.getImageData(0, 0, 1, 1).data; };
    const light = (colour) => [...rgb(colour)].slice(0, 3).map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const value = (name) => { const probe = document.createElement("i"); document.body.append(probe); probe.style.color = `var(--${name})`; const c = getComputedStyle(probe).color; probe.remove(); return c; };
    const ratio = (a, b) => { const [x, y] = [light(value(a)), light(value(b))].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
    const pairs = [];
    for (const ink of ["ink", "soft", "faint", "accent", "danger"]) for (const paper of ["paper", "side", "raised"]) pairs.push([ink, paper]);
    for (const ink of ["word", "string", "number", "faint"]) pairs.push([ink, "code"]);
    pairs.push(["on-accent", "accent"], ["ink", "bubble"]);
    return pairs.map(([a, b]) => [`${a} on ${b}`, ratio(a, b)]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(opened: Callable[..., Page], scheme: str) -> None:
    low = [(pair, round(ratio, 2)) for pair, ratio in opened(color_scheme=scheme).evaluate(CONTRASTS) if ratio < 4.5]
    assert low == []


def test_every_control_has_a_name(opened: Callable[..., Page]) -> None:
    page = opened()
    send(page, "first")
    page.click("#tune")
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, textarea, select, [role]:not([role=status])")].filter((node) =>
        node.checkVisibility() && !(node.getAttribute("aria-label") || node.labels?.length || node.textContent.trim() || node.placeholder))
        .map((node) => node.outerHTML)""")
    assert nameless == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))


def test_reading_back_is_not_pulled_to_the_end(opened: Callable[..., Page], server: ChatServer) -> None:
    server.answers["long"] = "line\n\n" * 60 + f"pause{GATE}" + "\n\nmore" * 30
    page = opened()
    send(page, "long", wait=False)
    expect(answers(page)).to_contain_text("pause")
    page.wait_for_function("(t => t.scrollHeight - t.scrollTop - t.clientHeight < 2)(document.getElementById('thread'))")
    page.evaluate("document.getElementById('thread').scrollTop = 100")
    expect(page.get_by_role("button", name="To the latest")).to_be_visible()
    server.gate.set()
    idle(page)
    assert page.evaluate("document.getElementById('thread').scrollTop") == 100
    page.get_by_role("button", name="To the latest").click()
    expect(page.get_by_role("button", name="To the latest")).to_be_hidden()


# -- markdown ----------------------------------------------------------------------------------------------------

RENDER = """async (text) => {
    const { MarkdownView } = await import("./markdown.js");
    const root = document.createElement("div");
    const started = performance.now();
    new MarkdownView(root).set(text);
    return [root.innerHTML, performance.now() - started];
}"""


def markdown(page: Page, text: str) -> str:
    html = str(page.evaluate(RENDER, text)[0])
    return re.sub(r'<div class="code-head">.*?</button></div>', "", html).replace(' target="_blank" rel="noopener noreferrer nofollow"', "")


CASES = {
    "a *b* **c** ***d*** ~~e~~ `f*g*`": "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <del>e</del> <code>f*g*</code></p>",
    "snake_case_name and 2*3*4 _ok_": "<p>snake_case_name and 2<em>3</em>4 <em>ok</em></p>",
    "**bold *both* bold** *a": "<p><strong>bold <em>both</em> bold</strong> *a</p>",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "# A\n\n## B #\n#no": '<h3 class="h1">A</h3><h4 class="h2">B</h4><p>#no</p>',
    "- a\n- b\n  - c\n  - d\n- e": "<ul><li>a</li><li>b<ul><li>c</li><li>d</li></ul></li><li>e</li></ul>",
    "3. a\n4. b\n\n   more": '<ol start="3"><li><p>a</p></li><li><p>b</p><p>more</p></li></ol>',
    "- [x] done\n- [ ] open": (
        '<ul><li class="task"><input type="checkbox" disabled="" checked="" aria-label="Done">done</li>'
        '<li class="task"><input type="checkbox" disabled="" aria-label="Open">open</li></ul>'
    ),
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "Here:\n| a | b |\n|:--|--:|\n| 1 \\| 2 | `x` |": (
        '<p>Here:</p><div class="table" role="region" aria-label="Table" tabindex="0"><table><thead><tr><th scope="col">a</th>'
        '<th class="right" scope="col">b</th></tr></thead><tbody><tr><td>1 | 2</td><td class="right"><code>x</code></td></tr></tbody></table></div>'
    ),
    "```py\nx = 1 < 2\n```\nend": (
        '<div class="code"><pre tabindex="0" role="region" aria-label="Code, py"><code>x = <span class="code-number">1</span> &lt; '
        '<span class="code-number">2</span></code></pre></div><p>end</p>'
    ),
    "[a **b**](https://x.org/q?a=1&b=2 \"T\") https://y.org/a_(b). <https://z.org>": (
        '<p><a href="https://x.org/q?a=1&amp;b=2" title="T">a <strong>b</strong></a> <a href="https://y.org/a_(b)" title="https://y.org/a_(b)">'
        'https://y.org/a_(b)</a>. <a href="https://z.org/" title="https://z.org/">https://z.org</a></p>'
    ),
    "![cat](https://x.org/cat.png)": '<p><a href="https://x.org/cat.png" title="https://x.org/cat.png">cat</a></p>',
    "---\n\\*plain\\*": "<hr><p>*plain*</p>",
}  # fmt: skip


def test_markdown_by_hand(opened: Callable[..., Page]) -> None:
    page = opened()
    for text, html in CASES.items():
        # Class and attribute order is the order of writing; sets of attributes are compared as written.
        assert markdown(page, text) == html, text


HOSTILE = [
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>",
    "<svg/onload=window.hacked=1><iframe srcdoc='<script>parent.hacked=1</script>'>",
    "[a](javascript:window.hacked=1) [b](JaVaScRiPt:window.hacked=1) [c](java\tscript:window.hacked=1) [d](\x01javascript:x)",
    "[a](data:text/html,<script>window.hacked=1</script>) [b](vbscript:x) [c](file:///etc/passwd) [d](//evil.org) [e](../x)",
    '[a](https://x.org "onmouseover=window.hacked=1") [b](https://x.org" onclick="window.hacked=1)',
    "<javascript:window.hacked=1> <https://x.org\" onclick=window.hacked=1>",
    "![x](javascript:window.hacked=1) ![x](https://evil.org/pixel.png) [![x](https://evil.org/p.png)](javascript:window.hacked=1)",
    "```html\n<script>window.hacked = 1</script>",
    "```\" onload=\"window.hacked=1\n<b>x</b>\n```",
    "`<img src=x onerror=window.hacked=1>` **<img src=x onerror=window.hacked=1>**",
    "| <script>window.hacked=1</script> | b |\n|--|--|\n| <img src=x onerror=window.hacked=1> | [a](javascript:window.hacked=1) |",
    "# <img src=x onerror=window.hacked=1>\n> <img src=x onerror=window.hacked=1>\n- <img src=x onerror=window.hacked=1>",
    "&lt;script&gt;window.hacked=1&lt;/script&gt; &#106;avascript: [a](&#106;avascript:window.hacked=1)",
    "[__proto__](https://x.org) constructor __proto__ toString\n```constructor\nx\n```\n```__proto__\nx\n```",
]  # fmt: skip
ALLOWED = """p br strong em del code pre a span ul ol li blockquote hr h3 h4 h5 h6 table thead tbody tr th td div input
button svg path""".split()
ATTRIBUTES = """class href title target rel start type disabled checked aria-label aria-hidden role tabindex scope viewBox d""".split()
INSPECT = """(root) => [...document.querySelector(root).querySelectorAll("*")].map((node) =>
    [node.localName, node.getAttributeNames(), node.getAttribute("href")])"""


def test_hostile_answers_stay_text(opened: Callable[..., Page], server: ChatServer) -> None:
    page = opened()
    page.route(re.compile("evil|x\\.org"), lambda route: pytest.fail(f"asked for {route.request.url}"))
    for text in HOSTILE:
        server.answers["go"] = text
        page.keyboard.press("Control+k")
        send(page, "go")
        for tag, names, href in page.evaluate(INSPECT, ".message.assistant .text"):
            assert tag in ALLOWED, (text, tag)
            assert set(names) <= set(ATTRIBUTES), (text, names)
            assert href is None or re.match("https?://", href), (text, href)
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    send(page, HOSTILE[0])
    expect(page.locator(".message.user .text").last).to_have_text(HOSTILE[0])
    assert page.locator(".message.user .text").last.evaluate("node => node.children.length") == 0


BOMBS = {
    "brackets": "[" * 50_000,
    "links": "[a](" * 20_000,
    "link spaces": "[a](" + " " * 50_000 + "x",
    "images": "![" * 30_000,
    "stars": "*a " * 30_000,
    "nested stars": "*a **b " * 10_000 + "c** d* " * 10_000,
    "mixed marks": "*_~~a" * 10_000,
    "ticks": "".join("`" * (i % 300) + "a" for i in range(600)),
    "quotes": ">" * 20_000 + " a",
    "lists": "- " * 10_000 + "a",
    "deep list": "\n".join(" " * (2 * i) + "- a" for i in range(300)),
    "pipes": "|" * 20_000 + "\n" + "|-" * 20_000,
    "table rows": "a|b\n-|-\n" + "c|d\n" * 5_000,
    "fences": "```\n" * 5_000,
    "urls": "https://" * 10_000 + ")" * 10_000,
    "quoted code": "```js\n" + "\"'" * 20_000 + "\n```",
    "comment": "```c\n" + "/*" * 20_000 + "\n```",
    "escapes": "\\" * 50_001,
    "blank": "\n" * 50_000 + "a",
}


def test_no_text_makes_the_page_hang(opened: Callable[..., Page]) -> None:
    page = opened()
    slow = {name: ms for name, text in BOMBS.items() if (ms := page.evaluate(RENDER, text)[1]) > 2000}
    assert slow == {}
    # Drawing, too, must survive the deepest nesting that is kept.
    for name in ("quotes", "lists", "deep list", "nested stars"):
        page.evaluate(
            """async (text) => { const { MarkdownView } = await import("./markdown.js");
            const root = document.createElement("div"); document.body.append(root); new MarkdownView(root).set(text); root.offsetHeight; root.remove(); }""",
            BOMBS[name],
        )


STREAMED = """async ([text, cuts]) => {
    const { MarkdownView } = await import("./markdown.js");
    const [grown, whole] = [document.createElement("div"), document.createElement("div")];
    const view = new MarkdownView(grown);
    for (const cut of cuts) view.set(text.slice(0, cut));
    view.set(text);
    new MarkdownView(whole).set(text);
    return [grown.innerHTML, whole.innerHTML];
}"""
FRAGMENTS = ["a", "b c", "\n", "\n\n", "- ", "  - ", "1. ", "2) ", "# ", "#", "> ", ">", "```", "```py\n", "\n```\n", "~~~", "|", "-|-", "a | b\n", "|--|--|\n",
             "**", "*", "_", "`", "[x](https://a.org)", "![", "](", "---", "- [ ] ", "    ", "\t", "\\", "\r\n", "https://a.org", "<b>", "é🦙"]  # fmt: skip


def test_fold_of_the_stream_is_the_whole(opened: Callable[..., Page]) -> None:
    page = opened()
    rng = random.Random(1)
    texts = [*CASES, *HOSTILE, "\n\n".join(CASES)] + ["".join(rng.choices(FRAGMENTS, k=rng.randrange(3, 40))) for _ in range(1500)]
    for text in texts:
        length = len(text.encode("utf-16-le")) // 2  # JavaScript counts UTF-16 units
        cuts = list(range(length)) if rng.random() < 0.5 else sorted(rng.sample(range(length), min(length, 5)))
        grown, whole = page.evaluate(STREAMED, [text, cuts])
        assert grown == whole, (text, cuts)


def test_only_the_last_block_is_made_again(opened: Callable[..., Page], server: ChatServer) -> None:
    server.answers["long"] = f"first\n\n```py\nx = 1\n{GATE}y = 2\n```\n\nlast"
    page = opened()
    send(page, "long", wait=False)
    expect(answers(page).locator("code")).to_contain_text("x = 1")
    page.evaluate("document.querySelector('.markdown p').mark = document.querySelector('.markdown pre').mark = true")
    server.gate.set()
    idle(page)
    assert page.evaluate("document.querySelector('.markdown p').mark") is True
    expect(answers(page).locator(".code-number")).to_have_text(["1", "2"])


def test_copy_code(opened: Callable[..., Page], server: ChatServer) -> None:
    server.answers["code"] = "```js\nlet a = 1;\n\nlet b;\n```"
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    send(page, "code")
    page.get_by_role("button", name="Copy code").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "let a = 1;\n\nlet b;"
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as on plain http
    page.get_by_role("button", name="Copy message").last.click()
    expect(page.get_by_role("button", name="Copied").last).to_be_visible()


# -- events ------------------------------------------------------------------------------------------------------

EVENTS = """async ([bytes, size]) => {
    const { events } = await import("./sse.js");
    const all = Uint8Array.from(bytes);
    const body = new ReadableStream({ start(out) { for (let at = 0; at < all.length; at += size) out.enqueue(all.slice(at, at + size)); out.close(); } });
    const found = [];
    for await (const data of events(body)) found.push(data);
    return found;
}"""


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_however_they_are_cut(opened: Callable[..., Page], end: str, size: int) -> None:
    lines = [": ping", "", "event: x", "data: one", "data:two", "", "id: 3", "", "data: é🦙", "", "data", "", "data: [DONE]", "", ": end", "", "data: cut off"]
    stream = end.join(lines).encode()
    assert opened().evaluate(EVENTS, [list(stream), size]) == ["one\ntwo", "é🦙", "", "[DONE]"]
