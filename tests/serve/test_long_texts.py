"""A text that is too long in any case is refused before it is tokenised."""

from typing import Any

import pytest
from serve.conftest import Serve, Served
from wire import post

TEXT = "word " * 60_000


@pytest.fixture
def counted(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of texts that were tokenised."""
    found: list[int] = []
    kind: Any = type(served.service.tokenizer)
    call = kind.__call__

    def counting(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(len(text))
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", counting)
    return found


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": TEXT}),
        ("/v1/completions", {"prompt": ["a", TEXT]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": TEXT}]}),
        ("/generate", {"inputs": TEXT}),
        ("/api/chat", {"model": "tiny", "messages": [{"role": "user", "content": TEXT}]}),
        ("/v1/messages", {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": TEXT}]}),
    ],
)
def test_it_is_refused_before(served: Served, counted: list[int], path: str, body: dict[str, Any]) -> None:
    reply = post(served.port, path, body)
    assert reply.status in (400, 422) and "tokens or more but at most 1023 are taken" in reply.content.decode()
    assert all(length < 100 for length in counted)


def test_what_fits_is_never_refused_for_its_bytes(served: Served) -> None:
    longest = served.service.model.longest
    assert longest >= 3 * max(len(served.service.tokenizer.token_bytes(i)) for i in range(260))
    for length in (1000, 1023):
        reply = post(served.port, "/v1/completions", {"prompt": "a" * length, "max_tokens": 1})
        assert reply.status == 200 and reply.json["usage"]["prompt_tokens"] == length
    reply = post(served.port, "/v1/completions", {"prompt": "a" * 1024, "max_tokens": 1})
    assert reply.status == 400 and "the prompt has 1024 tokens but" in reply.json["error"]["message"]


def test_what_is_cut_is_not_too_long(served: Served, serve: Serve) -> None:
    cut = post(served.port, "/v1/completions", {"prompt": TEXT, "truncate_prompt_tokens": 10, "max_tokens": 1})
    assert cut.status == 200 and cut.json["usage"]["prompt_tokens"] == 10
    truncating = serve(context_overflow="truncate")
    assert post(truncating.port, "/v1/completions", {"prompt": TEXT, "max_tokens": 1}).status == 200
