"""The page's renderer and its reader of events, in headless Chromium: by hand, hostile, streamed."""

import random
import re
from collections.abc import Callable

import pytest
from chat_page import Page, answers, idle, send
from chat_server import GATE, ChatServer

sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
pytestmark = pytest.mark.slow
expect = sync_api.expect

# -- markdown ----------------------------------------------------------------------------------------------------

RENDER = """async (text) => {
    const { MarkdownView } = await import("./markdown.js");
    const root = document.createElement("div");
    const started = performance.now();
    new MarkdownView(root).set(text);
    return [root.innerHTML, performance.now() - started];
}"""


LINK = ' target="_blank" rel="noopener noreferrer nofollow"'
TABLE = 'div class="table" role="region" aria-label="Table" tabindex="0"'


def markdown(page: Page, text: str) -> str:
    """The rendering of `text` as HTML, without the head of code, with short names for what every link and table has."""
    html = str(page.evaluate(RENDER, text)[0])
    html = re.sub(r'<div class="code-head">.*?</button></div>', "", html)
    return html.replace(LINK, "").replace(f"<{TABLE}>", "<div>")


CASES = {
    "a *b* **c** ***d*** ~~e~~ `f*g*`": (
        "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <del>e</del> <code>f*g*</code></p>"
    ),
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
        '<p>Here:</p><div><table><thead><tr><th scope="col">a</th><th class="right" scope="col">b</th></tr></thead>'
        '<tbody><tr><td>1 | 2</td><td class="right"><code>x</code></td></tr></tbody></table></div>'
    ),
    "```py\nx = 1 < 2\n```\nend": (
        '<div class="code"><pre tabindex="0" role="region" aria-label="Code, py"><code>x = '
        '<span class="code-number">1</span> &lt; <span class="code-number">2</span></code></pre></div><p>end</p>'
    ),
    '[a **b**](https://x.org/q?a=1&b=2 "T") https://y.org/a_(b). <https://z.org>': (
        '<p><a href="https://x.org/q?a=1&amp;b=2" title="T">a <strong>b</strong></a> '
        '<a href="https://y.org/a_(b)" title="https://y.org/a_(b)">https://y.org/a_(b)</a>. '
        '<a href="https://z.org/" title="https://z.org/">https://z.org</a></p>'
    ),
    "![cat](https://x.org/cat.png)": '<p><a href="https://x.org/cat.png" title="https://x.org/cat.png">cat</a></p>',
    "---\n\\*plain\\*": "<hr><p>*plain*</p>",
}


def test_markdown_by_hand(opened: Callable[..., Page]) -> None:
    page = opened()
    for text, html in CASES.items():
        assert markdown(page, text) == html, text


HACK = "window.hacked=1"
IMG = f"<img src=x onerror={HACK}>"
HOSTILE = [
    f"<script>{HACK}</script><img src=x onerror='{HACK}'>",
    f"<svg/onload={HACK}><iframe srcdoc='<script>parent.hacked=1</script>'>",
    f"[a](javascript:{HACK}) [b](JaVaScRiPt:{HACK}) [c](java\tscript:{HACK}) [d](\x01javascript:x)",
    f"[a](data:text/html,<script>{HACK}</script>) [b](vbscript:x) [c](file:///etc/passwd) [d](//evil.org) [e](../x)",
    f'[a](https://x.org "onmouseover={HACK}") [b](https://x.org" onclick="{HACK})',
    f'<javascript:{HACK}> <https://x.org" onclick={HACK}>',
    f"![x](javascript:{HACK}) ![x](https://evil.org/pixel.png) [![x](https://evil.org/p.png)](javascript:{HACK})",
    f"```html\n<script>{HACK}</script>",
    f'```" onload="{HACK}\n<b>x</b>\n```',
    f"`{IMG}` **{IMG}**",
    f"| <script>{HACK}</script> | b |\n|--|--|\n| {IMG} | [a](javascript:{HACK}) |",
    f"# {IMG}\n> {IMG}\n- {IMG}",
    f"&lt;script&gt;{HACK}&lt;/script&gt; &#106;avascript: [a](&#106;avascript:{HACK})",
    "[__proto__](https://x.org) constructor __proto__ toString\n```constructor\nx\n```\n```__proto__\nx\n```",
]
ALLOWED = """p br strong em del code pre a span ul ol li blockquote hr h3 h4 h5 h6 table thead tbody tr th td div
    input button svg path"""
ATTRIBUTES = """class href title target rel start type disabled checked aria-label aria-hidden role tabindex scope
    viewBox d"""
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
            assert tag in ALLOWED.split(), (text, tag)
            assert set(names) <= set(ATTRIBUTES.split()), (text, names)
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
    "heading of spaces": "# " + " " * 50_000 + "x",
    "heading of signs": "# " + "# " * 30_000 + "x",
    "delimiter of spaces": "a|b\n-" + " " * 50_000 + "x",
    "line separators": "> a\u2028b\n\n# c\u2028d\n\n- e\u2029f\n\n> \u2028",
}


DRAW = """async (text) => {
    const { MarkdownView } = await import("./markdown.js");
    const root = document.body.appendChild(document.createElement("div"));
    new MarkdownView(root).set(text);
    root.getBoundingClientRect();
    root.remove();
}"""


def test_no_text_makes_the_page_hang(opened: Callable[..., Page]) -> None:
    page = opened()
    slow = {name: ms for name, text in BOMBS.items() if (ms := page.evaluate(RENDER, text)[1]) > 2000}
    assert slow == {}
    # Drawing, too, must survive the deepest nesting that is kept.
    for name in ("quotes", "lists", "deep list", "nested stars"):
        page.evaluate(DRAW, BOMBS[name])


STREAMED = """async ([text, cuts]) => {
    const { MarkdownView } = await import("./markdown.js");
    const [grown, whole] = [document.createElement("div"), document.createElement("div")];
    const view = new MarkdownView(grown);
    for (const cut of cuts) view.set(text.slice(0, cut));
    view.set(text, true);
    new MarkdownView(whole).set(text, true);
    return [grown.innerHTML, whole.innerHTML];
}"""
FRAGMENTS = [
    *("a", "b c", "\n", "\n\n", "- ", "  - ", "1. ", "2) ", "# ", "#", "> ", ">", "```", "```py\n", "\n```\n", "~~~"),
    *("|", "-|-", "a | b\n", "|--|--|\n", "**", "*", "_", "`", "[x](https://a.org)", "![", "](", "---", "- [ ] "),
    *("    ", "\t", "\\", "\r\n", "https://a.org", "<b>", "é🦙"),
]


def test_fold_of_the_stream_is_the_whole(opened: Callable[..., Page]) -> None:
    page = opened()
    rng = random.Random(1)
    texts = [*CASES, *HOSTILE, "\n\n".join(CASES)] + [
        "".join(rng.choices(FRAGMENTS, k=rng.randrange(3, 40))) for _ in range(1500)
    ]
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
    const body = new ReadableStream({
        start(out) {
            for (let at = 0; at < all.length; at += size) out.enqueue(all.slice(at, at + size));
            out.close();
        },
    });
    const found = [];
    for await (const data of events(body)) found.push(data);
    return found;
}"""
LINES = [
    *(": ping", "", "event: x", "data: one", "data:two", "", "id: 3", "", "data: é🦙", "", "data", ""),
    *("data: [DONE]", "", ": end", "", "data: cut off"),
]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_however_they_are_cut(opened: Callable[..., Page], end: str, size: int) -> None:
    lines = [
        ": ping",
        "",
        "event: x",
        "data: one",
        "data:two",
        "",
        "id: 3",
        "",
        "data: é🦙",
        "",
        "data",
        "",
        "data: [DONE]",
        "",
        ": end",
        "",
        "data: cut off",
    ]
    stream = end.join(lines).encode()
    assert opened().evaluate(EVENTS, [list(stream), size]) == ["one\ntwo", "é🦙", "", "[DONE]"]
