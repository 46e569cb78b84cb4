"""What a user does on the chat page, for tests that drive it."""

from typing import Any

Page = Any  # playwright's, which may be missing
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


def send(page: Page, text: str, wait: bool = True) -> None:
    """Writes and sends; waits for the end of the answer."""
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    if wait:
        idle(page)


def idle(page: Page) -> None:
    """Waits until no answer is being written in the conversation in view."""
    page.wait_for_selector(".send[aria-label=Send]")


def answers(page: Page) -> Any:
    return page.locator(".message.assistant .text")


def ready(page: Page) -> Page:
    page.wait_for_selector("body.ready")
    return page
