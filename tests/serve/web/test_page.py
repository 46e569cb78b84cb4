"""The chat page in headless Chromium, against canned answers: what a user does, and what goes wrong."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_page import PHONE, Page, answers, idle, ready, send
from chat_server import BREAK, ERROR, GATE, ChatServer

sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
pytestmark = pytest.mark.slow
expect = sync_api.expect


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
    expect(page.locator(".aside")).to_contain_text("You stopped this answer.")
    send(page, "next")
    assert sent(server)[1] == ("assistant", "Once upon")


def test_continue_adds_to_the_same_answer(opened: Callable[..., Page], server: ChatServer) -> None:
    server.answers |= {"story": f"Once upon{GATE} a time", "Once upon": " a hill"}
    page = opened()
    send(page, "story", wait=False)
    expect(answers(page)).to_have_text("Once upon")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Continue").click()
    expect(answers(page)).to_have_text("Once upon a hill")
    idle(page)
    assert sent(server) == [("user", "story"), ("assistant", "Once upon")]
    assert server.requests[-1]["continue_final_message"] is True
    assert server.requests[-1]["add_generation_prompt"] is False
    expect(page.locator(".figures")).to_contain_text("4 tokens")
    expect(page.locator(".branches")).to_have_count(0)
    expect(page.locator(".aside")).to_have_count(0)


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
    page.locator("#prompt").dispatch_event("keydown", {"key": "Enter", "isComposing": True, "bubbles": True})
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
    ready(page)
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
    ready(page)
    expect(answers(page)).to_have_text("Once upon")
    expect(page.locator(".aside")).to_contain_text("This answer was interrupted.")


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
    ready(page)
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


def export(**message: object) -> str:
    """An exported file of one conversation with one message."""
    conversation = {"nodes": [{"id": "a", "parent": "root", "role": "user", "content": "", **message}]}
    return json.dumps({"format": "llama2-conversations", "version": 1, "conversations": [conversation]})


BAD_FILES = {
    "not JSON": ("{", "is not JSON"),
    "another format": ('{"format": "x"}', "is no export of this page"),
    "a later version": ('{"format": "llama2-conversations", "version": 2, "conversations": []}', "has version 2"),
    "no nodes": ('{"format": "llama2-conversations", "version": 1, "conversations": [{}]}', '"nodes" is missing'),
    "an orphan": (export(parent="a"), "comes before its parent"),
    "a strange role": (export(role="root"), "has the role root"),
    "no text": (export(content=None), "has no text"),
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
def test_a_stream_that_fails_keeps_what_came(
    opened: Callable[..., Page], server: ChatServer, how: str, text: str
) -> None:
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
    ready(page)
    assert page.evaluate(BRIGHTNESS, "body") > 200


# WCAG 2's ratio, of colours as the browser paints them.
CONTRASTS = """() => {
    const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 }).getContext("2d");
    const painted = (name) => {
        const probe = document.body.appendChild(document.createElement("i"));
        probe.style.color = `var(--${name})`;
        canvas.fillStyle = getComputedStyle(probe).color;
        canvas.fillRect(0, 0, 1, 1);
        probe.remove();
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const light = (name) => painted(name).reduce((sum, v, i) => sum + linear(v / 255) * [0.2126, 0.7152, 0.0722][i], 0);
    const ratio = (a, b) => {
        const [low, high] = [light(a), light(b)].sort((p, q) => p - q);
        return (high + 0.05) / (low + 0.05);
    };
    const inks = ["ink", "soft", "faint", "accent", "danger"];
    const pairs = inks.flatMap((ink) => ["paper", "side", "raised"].map((paper) => [ink, paper]));
    for (const ink of ["word", "string", "number", "faint"]) pairs.push([ink, "code"]);
    pairs.push(["on-accent", "accent"], ["ink", "bubble"]);
    return pairs.map(([a, b]) => [`${a} on ${b}`, ratio(a, b)]);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(opened: Callable[..., Page], scheme: str) -> None:
    low = [(pair, round(ratio, 2)) for pair, ratio in opened(color_scheme=scheme).evaluate(CONTRASTS) if ratio < 4.5]
    assert low == []


NAMELESS = """() => {
    const named = (node) => node.getAttribute("aria-label") || node.labels?.length || node.textContent.trim();
    const controls = [...document.querySelectorAll("button, input, textarea, select, [role]:not([role=status])")];
    return controls.filter((node) => node.checkVisibility() && !named(node)).map((node) => node.outerHTML);
}"""


def test_every_control_has_a_name(opened: Callable[..., Page]) -> None:
    page = opened()
    send(page, "first")
    page.click("#tune")
    nameless = page.evaluate(NAMELESS)
    assert nameless == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))


def test_reading_back_is_not_pulled_to_the_end(opened: Callable[..., Page], server: ChatServer) -> None:
    server.answers["long"] = "line\n\n" * 60 + f"pause{GATE}" + "\n\nmore" * 30
    page = opened()
    send(page, "long", wait=False)
    expect(answers(page)).to_contain_text("pause")
    page.wait_for_function(
        "(t => t.scrollHeight - t.scrollTop - t.clientHeight < 2)(document.getElementById('thread'))"
    )
    page.evaluate("document.getElementById('thread').scrollTop = 100")
    expect(page.get_by_role("button", name="To the latest")).to_be_visible()
    server.gate.set()
    idle(page)
    assert page.evaluate("document.getElementById('thread').scrollTop") == 100
    page.get_by_role("button", name="To the latest").click()
    expect(page.get_by_role("button", name="To the latest")).to_be_hidden()
