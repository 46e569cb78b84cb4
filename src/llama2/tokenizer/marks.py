"""Which text of a rendered chat came from the request: marks around every string that could become a control token.

A template may print any field: a tool's description, a parameter's name, an argument. Text of the request between
marks is encoded as text; only what the template itself writes may become special tokens.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from llama2.errors import TokenizerError

Fragment = tuple[str, bool]


def strings(value: Any) -> Iterator[str]:
    """Every string inside messages or tools, names of fields among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings(key)
            yield from strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from strings(inner)


def unused(texts: Iterable[str]) -> tuple[str, str]:
    """Two private-use characters that no text contains, a mark for the begin and one for the end."""
    seen = set().union(*map(set, texts))
    found = [chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in seen][:2]
    if len(found) < 2:
        raise TokenizerError("safe=True needs two private-use characters that no message contains")
    return found[0], found[1]


def wrap(text: str, marks: tuple[str, str]) -> str:
    """The text with marks inside its outer white space, so that a template which strips it does as before."""
    core = text.strip()
    start = text.index(core)
    return text[:start] + marks[0] + core + marks[1] + text[start + len(core) :] if core else text


def risky(tokens: Iterable[str]) -> Callable[[str], bool]:
    """Whether a string holds one of these tokens or could be part of one together with what is printed around it."""
    known = [token for token in tokens if token]
    begins = {token[:i] for token in known for i in range(1, len(token))}
    ends = {token[i:] for token in known for i in range(1, len(token))}
    longest = max(map(len, known), default=0)

    def test(text: str) -> bool:
        core = text.strip()
        if not core:
            return False
        sizes = range(1, min(longest, len(core) + 1))
        return (
            any(token in text or core in token for token in known)
            or any(core[-size:] in begins or core[:size] in ends for size in sizes)
            or any(text[-size:] in begins or text[:size] in ends for size in range(1, min(longest, len(text) + 1)))
        )

    return test


def marked(value: Any, marks: tuple[str, str], test: Callable[[str], bool]) -> Any:
    """A copy with marks around every string that `test` finds risky; the kind of a tool or a part stays what it is."""
    if isinstance(value, str):
        return wrap(value, marks) if test(value) else value
    if isinstance(value, Mapping):
        found = {}
        for key, inner in value.items():
            plain = key == "type" and inner in ("function", "text")
            name = key if key.isidentifier() else marked(key, marks, test)  # templates ask for identifiers by name
            found[name] = inner if plain else marked(inner, marks, test)
        return found
    if isinstance(value, (list, tuple)):
        return [marked(inner, marks, test) for inner in value]
    return value


def message(value: Mapping[str, Any], marks: tuple[str, str], test: Callable[[str], bool]) -> dict[str, Any]:
    """A message with marks: all of its content, and of the rest what is risky; its role is what templates go by."""
    rest = {k: v for k, v in value.items() if k not in ("role", "content")}
    found = {k: v for k, v in value.items() if k == "role"} | marked(rest, marks, test)
    if "content" in value:
        found["content"] = marked(value["content"], marks, lambda text: True)
    return {key: found[key] for key in value if key in found} | found


def split(rendered: str, marks: tuple[str, str], text: str) -> list[Fragment]:
    """The rendered chat, `text`, in pieces and whether each is the request's. rendered: the same with marks.

    Raises TokenizerError for a template that does something else to a marked text than to a plain one.
    """
    opening, closing = marks
    if not text.startswith(rendered.replace(opening, "").replace(closing, "")[: len(text)]):
        raise TokenizerError("safe=True cannot follow this chat template: it changes the text of messages")
    order = [c for c in rendered if c in marks]
    if any(mark != marks[i % 2] for i, mark in enumerate(order)) or len(order) % 2:
        raise TokenizerError("safe=True cannot follow this chat template: it takes the text of messages apart")
    found, size = [], 0
    for i, piece in enumerate(rendered.replace(closing, opening).split(opening)):
        piece = piece[: len(text) - size]  # a continued final message ends before the template does
        size += len(piece)
        found.append((piece, i % 2 == 1))
    return found
