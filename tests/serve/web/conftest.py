"""Chromium and a server of canned answers for the chat page."""

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chat_page import WIDE, Page, ready
from chat_server import ChatServer


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("needs Chromium on the PATH (Debian: apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as server:
        yield server


@pytest.fixture
def opened(browser: Any, server: ChatServer) -> Iterator[Callable[..., Page]]:
    """Opens the page in a context of its own; a script error or a breach of the content policy fails the test."""
    contexts, faults = [], []

    def watch(message: Any) -> None:
        # The console repeats every failed request; those are the tests' own.
        if message.type == "error" and "Failed to load resource" not in message.text:
            faults.append(message.text)

    def open_page(path: str = "", context: Any = None, **options: Any) -> Page:
        if context is None:
            context = browser.new_context(**{"viewport": WIDE, "reduced_motion": "reduce", **options})
            context.set_default_timeout(15_000)
            contexts.append(context)
        page = context.new_page()
        page.on("console", watch)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(server.url + path)
        return ready(page)

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []
