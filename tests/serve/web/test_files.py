"""The page's files: complete, under a strict policy, and free of what the policy forbids. No browser needed."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llama2.serve import static

WEB = Path(static.__file__).parent / "web"
FILES = sorted(WEB.iterdir())


def test_policy_word_for_word() -> None:
    assert static.POLICY == (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_every_file_is_served_with_its_type(file: Path) -> None:
    found = static.asset(file.name)
    assert found is not None and found.body == file.read_bytes()
    kinds = {".js": "text/javascript", ".css": "text/css", ".html": "text/html", ".svg": "image/svg+xml"}
    assert found.headers["Content-Type"].split(";")[0] == kinds[file.suffix]
    assert found.headers["Content-Security-Policy"] == static.POLICY


def test_the_empty_path_is_the_page_and_no_other_path_leads_anywhere() -> None:
    assert static.asset("") == static.asset("index.html")
    for path in (
        "../static.py",
        "..%2fpage.py",
        "/etc/passwd",
        "./app.js",
        "app.js/",
        "APP.JS",
        "nothing.js",
        ".",
        "web/app.js",
    ):
        assert static.asset(path) is None, path


def test_a_client_with_the_same_copy_is_told_so() -> None:
    found = static.asset("app.js")
    assert found is not None
    tag = found.headers["ETag"]
    assert found.fresh(tag) and found.fresh(f'"other", W/{tag}')
    assert not found.fresh(None) and not found.fresh('"other"')


def test_all_that_is_named_exists_and_all_that_exists_is_named() -> None:
    index = (WEB / "index.html").read_text()
    named = {"index.html", *re.findall(r'(?:src|href)="([\w.]+)"', index)}
    for file in WEB.glob("*.js"):
        named |= set(re.findall(r'from "\./([\w.]+)"', file.read_text()))
    assert named == {file.name for file in FILES}


def test_nothing_inline_and_nothing_from_elsewhere() -> None:
    index = (WEB / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)|javascript:", index)
    for file in FILES:
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://\w|url\(|@import", text), f"{file.name} names another host"
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|DOMParser", text
        ), file.name


def test_modules_stay_readable() -> None:
    for file in FILES:
        assert file.read_text().count("\n") <= 500, file.name


def blocks(*texts: str) -> tuple[list[Any], float]:
    """The blocks that the page sees in each text, and the milliseconds that all of them took."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    program = f"""
        import {{ blocks }} from {json.dumps((WEB / "blocks.js").as_uri())};
        const texts = JSON.parse(process.argv[1]);
        const began = performance.now();
        const found = texts.map((text) => blocks(text.split("\\n")));
        console.log(JSON.stringify([found, performance.now() - began]));
    """
    words = [node, "--no-warnings", "--input-type=module", "-e", program, json.dumps(texts)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    found, milliseconds = json.loads(done.stdout)
    return found, milliseconds


def test_line_separators_within_a_line_belong_to_it() -> None:
    found, _ = blocks("> a\u2028b", "# a\u2028b", "- a\u2029b", "> \u2028\nc")
    assert found[0][0]["lines"] == ["a\u2028b"] and found[1][0]["text"] == "a\u2028b"
    assert found[2][0]["items"] == [["a\u2029b"]]
    assert found[3][0]["kind"] == "quote"


def test_headings_keep_their_text_and_take_no_cube_of_their_length() -> None:
    found, milliseconds = blocks("# A", "## B #", "# C#", "### ##", "# a # b ##  ", "# " + " " * 30_000 + "x")
    assert [(b[0]["level"], b[0]["text"][-20:].strip()) for b in found] == [
        (1, "A"), (2, "B"), (1, "C#"), (3, ""), (1, "a # b"), (1, "x"),
    ]  # fmt: skip
    _, more = blocks("a|b\n-" + " " * 30_000 + "x", "# " + "# " * 20_000 + "x")
    assert milliseconds < 5_000 and more < 5_000  # seconds of the old patterns' minutes
