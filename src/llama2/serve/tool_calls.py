"""How models write that they call functions: the dialects of Llama's family, written by grammars and read as they come.

| dialect | a call | several |
| --- | --- | --- |
| json | `{"name": "f", "arguments": {...}}` | one per line; prompted, for templates that know no tools |
| llama3 | `{"name": "f", "parameters": {...}}`, also behind `<|python_tag|>` | `; ` between them |
| hermes | `<tool_call>\n{"name": "f", "arguments": {...}}\n</tool_call>` | one behind the other |
| mistral | `[TOOL_CALLS] [{"name": "f", "arguments": {...}}]` | in the list |
| mistral-args | `[TOOL_CALLS]f[ARGS]{...}` | one behind the other |
| function-tag | `<function=f>{...}</function>` | one per line |
| pythonic | `[f(a=1, b="x")]`, also between `<|python_start|>` and `<|python_end|>` | in the list |
| xml | `<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>` | one behind the other |
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from llama2.serve.tool_values import (
    XML_TEXT,
    python_arguments,
    python_end,
    python_value,
    xml_arguments,
    xml_value,
)

EMPTY = '""'
MOST_CALLS = 16  # in one answer, where it is held to a grammar
_PREFIX = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


@dataclass(frozen=True)
class ToolDialect:
    """One way to write calls. opening: marks before calls; bare: a call may also begin the answer without one.

    args: the mark between a name and its arguments, where calls are no JSON objects. form: how arguments are written.
    """

    name: str
    key: str = "arguments"
    opening: tuple[str, ...] = ()
    closing: str = ""
    between: str = "\n"
    before: str = ""
    after: str = ""
    bare: bool = False
    listed: bool = False
    args: str = ""
    form: Literal["json", "python", "xml"] = "json"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        """Dialects are compared by identity, also those that come from another process."""
        return _named, (self.name,)


JSON = ToolDialect("json", bare=True)
LLAMA3 = ToolDialect("llama3", "parameters", ("<|python_tag|>",), between="; ", bare=True)
HERMES = ToolDialect("hermes", opening=("<tool_call>",), closing="</tool_call>", before="\n", after="\n")
MISTRAL = ToolDialect("mistral", opening=("[TOOL_CALLS]",), between=", ", before=" [", after="]", listed=True)
MISTRAL_ARGS = ToolDialect("mistral-args", opening=("[TOOL_CALLS]",), between="", args="[ARGS]")
FUNCTION_TAG = ToolDialect("function-tag", opening=("<function=",), closing="</function>", args=">")


PYTHONIC = ToolDialect(
    "pythonic", opening=("<|python_start|>",), between=", ", before="[", after="]", bare=True, form="python"
)
XML = ToolDialect("xml", opening=("<tool_call>",), closing="</tool_call>", before="\n", after="\n", form="xml")
DIALECTS = (JSON, LLAMA3, HERMES, MISTRAL, MISTRAL_ARGS, FUNCTION_TAG, PYTHONIC, XML)
_PYTHON_CALL, _PYTHON_BEGIN = re.compile(r"\s*\[?\s*([\w.\-]+)\s*\("), re.compile(r"\s*\[?\s*([\w.\-]*)\s*")
_PYTHON_NAME = re.compile(r"[\s,]*([A-Za-z_]\w*)\s*=(?!=)\s*")
_XML_CALL, _XML_VALUE = re.compile(r"\s*<function=([^>\n]+)>"), re.compile(r"\s*<parameter=([^>\n]+)>")


def _named(name: str) -> ToolDialect:
    return next(dialect for dialect in DIALECTS if dialect.name == name)


def dialect_of(template: str | None) -> ToolDialect:
    """The dialect that a chat template has its model write."""
    if template is None or "tools" not in template:
        return JSON
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if "<function=" in template and "<parameter=" in template:
        return XML
    if "<tool_call>" in template:
        return HERMES
    if "<function=" in template:
        return FUNCTION_TAG
    if "[func_name1(" in template or "<|python_start|>" in template:  # Llama 3.2's and Llama 4's instructions
        return PYTHONIC
    return LLAMA3 if "<|python_tag|>" in template or '"parameters": ' in template else JSON


def call_grammar(
    dialect: ToolDialect, functions: Sequence[tuple[str, str]], several: bool, marks: dict[str, int]
) -> list[str]:
    """Rules of a grammar, `calls` the first of them, in llguidance's Lark.

    functions: names, and JSON schemas of what they take. marks: ids of those marks that are tokens of their own.
    """

    def text(value: str) -> str:
        return f"<[{marks[value]}]>" if value in marks else json.dumps(value)

    def joined(*parts: str) -> str:
        return " ".join(text(part) if part in marks or part else "" for part in parts if part)

    rules = [f"call: {' | '.join(f'call{i}' for i in range(len(functions)))}"]
    for i, (name, schema) in enumerate(functions):
        if dialect.form == "python":
            rules.append(f'call{i}: {json.dumps(f"{name}(")} arguments{i} ")"')
            rules.append(f"arguments{i}: {python_arguments(json.loads(schema)) or EMPTY}")
            continue
        if dialect.form == "xml":
            rules.append(f'call{i}: {json.dumps(f"<function={name}>{chr(10)}")} arguments{i} "</function>"')
            rules.append(f"arguments{i}: {xml_arguments(json.loads(schema)) or EMPTY}")
            continue
        if dialect.args:
            opening = "" if dialect.closing else text(dialect.opening[0])  # before each call, where there is a closing
            rules.append(f"call{i}: {opening} {json.dumps(name)} {text(dialect.args)} arguments{i}")
        else:
            begin = json.dumps(f'{{"name": {json.dumps(name)}, "{dialect.key}": ')
            rules.append(f'call{i}: {begin} arguments{i} "}}"')
        rules.append(f"arguments{i}: %json {schema}")
    if dialect.form == "xml" and any("XML_TEXT" in rule for rule in rules):
        rules.append(XML_TEXT)
    between = json.dumps(dialect.between) if dialect.between else ""
    tail = f"({between} call){{0,{MOST_CALLS - 1}}}" if several else ""
    if dialect.closing:  # each call between marks of its own
        one = joined(dialect.opening[0], dialect.before) + " call " + joined(dialect.after, dialect.closing)
        rules.append(f"marked: {one}")
        tail = tail.replace(" call)", " marked)")
        return [f"calls: marked {tail}", *rules]
    if dialect.form == "python":
        return [f'calls: "[" call {tail} "]"', *rules]
    if dialect.listed:
        return [f"calls: {joined(dialect.opening[0], dialect.before)} call {tail} {joined(dialect.after)}", *rules]
    return [f"calls: call {tail}", *rules]


class Said(NamedTuple):
    """A piece of an answer: text, the name of a call that begins, or more of the arguments of the last one."""

    text: str = ""
    name: str | None = None
    arguments: str = ""


class CallReader:
    """Splits an answer's text, as it comes, into what is said and the calls that are made.

    A JSON object is a call only where it names one of the functions; else it is text like any other.
    """

    def __init__(
        self,
        dialect: ToolDialect = JSON,
        names: Iterable[str] = (),
        hidden: Iterable[str] = (),
        takes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """names: of the functions; none for any. hidden: texts of control tokens, which are left out. takes: schemas of
        arguments by function, for dialects that write no types."""
        self.dialect, self.names = dialect, frozenset(names)
        self._takes, self._call = takes or {}, ""
        shown = (*dialect.opening, dialect.args, dialect.closing if dialect.form == "xml" else "")
        self._hidden = tuple(text for text in hidden if text and text not in shown)
        self._held, self._state = "", "start" if dialect.bare else "text"
        self._depth, self._in_string, self._escaped = 0, False, False
        self._marked = self._spoken = False

    def put(self, piece: str) -> list[Said]:
        """Returns the events of a piece of text."""
        for text in self._hidden:
            piece = piece.replace(text, "")
        self._held += piece
        found: list[Said] = []
        while True:
            before = self._state, len(self._held)
            found += getattr(self, f"_in_{self._state}")()
            if (self._state, len(self._held)) == before:
                return found

    def finish(self) -> list[Said]:
        """Returns what was held back, at the end."""
        held, self._held = self._held, ""
        if self._state == "open" and (said := self._whole(held)):
            return said
        if self._state == "open" and self.dialect.args and self.dialect.closing:
            held = self.dialect.opening[0] + held
        if self._state in ("start", "text", "open") and held:
            return [Said(held)]
        return []

    # -- states: each takes what it can from the front of what is held -----------------------------------------------

    def _in_start(self) -> list[Said]:
        """Nothing but white space yet."""
        text = self._held.lstrip()
        if not text:
            return []
        if any(mark.startswith(text) and mark != text for mark in self.dialect.opening):
            return []
        self._state = "open" if text.startswith("[" if self.dialect.form == "python" else "{") else "text"
        return []

    def _in_text(self) -> list[Said]:
        """Words, until a mark begins."""
        text, marks = self._held, self.dialect.opening
        places = [(text.find(mark), mark) for mark in marks if mark in text]
        if places:
            at, mark = min(places)
            self._held, self._state, self._marked = text[at + len(mark) :], "open", True
            said = (
                text[:at] if self._spoken or text[:at].strip() else ""
            )  # white space alone before a call says nothing
            return [Said(said)] if said else []
        if not self._spoken and not text.strip():
            return []
        keep = max((n for mark in marks for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
        self._held = text[len(text) - keep :]
        said = text[: len(text) - keep]
        self._spoken = self._spoken or bool(said.strip())
        if not self._spoken:
            self._held, said = text, ""
        return [Said(said)] if said else []

    def _in_open(self) -> list[Said]:
        """Behind a mark, or at a brace that may begin a call."""
        if self.dialect.form != "json":
            return self._in_open_form()
        if self.dialect.args:
            name, mark, rest = self._held.partition(self.dialect.args)
            if not mark:
                return []
            if self.dialect.closing and not self._known(name.strip()):
                self._held, self._state = rest, "text"
                return [Said(f"{self.dialect.opening[0]}{name}{mark}")]
            self._held, self._state = rest, "arguments"
            self._depth = 0
            return [Said(name=name.strip())]
        if self.dialect.listed and self._held.lstrip().startswith("["):
            self._held = self._held.lstrip()[1:]
        if (found := _PREFIX.match(self._held)) is not None and self._known(found[1]):
            self._held, self._state, self._depth = self._held[found.end() :], "arguments", 0
            return [Said(name=found[1])]
        start = self._held.lstrip()
        if start and not start.startswith(("{", "[")):
            return self._as_text()
        end = _end_of_value(start) if start else 0
        if not end:
            return []
        said = self._whole(start[:end])
        if not said:
            return self._as_text()
        self._held, self._state = start[end:], "between"
        return said

    def _in_open_form(self) -> list[Said]:
        """As `_in_open`, where a call is no JSON object."""
        python = self.dialect.form == "python"
        call = (_PYTHON_CALL if python else _XML_CALL).match(self._held)
        if call is not None and self._known(call[1].strip()):
            self._call, self._held = call[1].strip(), self._held[call.end() :]
            self._state, self._depth = self.dialect.form, 0
            return [Said(name=self._call)]
        begun = self._held.lstrip()
        if python:
            begin = _PYTHON_BEGIN.fullmatch(self._held)
            coming = begin is not None and (not self.names or any(name.startswith(begin[1]) for name in self.names))
        else:
            coming = "<function=".startswith(begun) or (begun.startswith("<function=") and "\n" not in begun
                                                       and ">" not in begun)  # fmt: skip
        return [] if coming else self._as_text()

    def _said_argument(self, name: str, value: str) -> Said:
        self._depth += 1
        return Said(arguments=f"{', ' if self._depth > 1 else '{'}{json.dumps(name, ensure_ascii=False)}: {value}")

    def _properties(self) -> Mapping[str, Any]:
        properties = self._takes.get(self._call, {}).get("properties")
        return properties if isinstance(properties, Mapping) else {}

    def _ended(self, rest: str) -> list[Said]:
        self._held, self._state = rest, "between"
        return [Said(arguments="}" if self._depth else "{}")]

    def _in_python(self) -> list[Said]:
        """Inside the brackets of a call: one argument that is complete, or their end."""
        text = self._held.lstrip(" \n\r\t,")
        if text.startswith(")"):
            return self._ended(text[1:])
        named = _PYTHON_NAME.match(text)
        start = named.end() if named is not None else 0
        end = python_end(text, start)
        if end < 0:
            return []
        places = list(self._properties())
        place = places[self._depth] if self._depth < len(places) else str(self._depth)
        self._held = text[end:]
        return [self._said_argument(named[1] if named is not None else place, python_value(text[start:end]))]

    def _in_xml(self) -> list[Said]:
        """Inside a function's element: one parameter that is complete, or the end."""
        text = self._held.lstrip()
        if text.startswith("</function>"):
            return self._ended(text.removeprefix("</function>"))
        opening = _XML_VALUE.match(text)
        if opening is None:
            partial = any(mark.startswith(text[: len(mark)]) for mark in ("</function>", "<parameter="))
            return [] if partial and "\n" not in text else self._ended(text)
        value, mark, rest = text[opening.end() :].partition("</parameter>")
        if not mark:
            return []
        self._held, name = rest, opening[1].strip()
        return [self._said_argument(name, xml_value(value, self._properties().get(name)))]

    def _as_text(self) -> list[Said]:
        """Returns the held text, which is not a call after all."""
        self._state, held, self._held = "text", self._held, ""
        return [Said(held)] if held else []

    def _whole(self, text: str) -> list[Said]:
        """A complete object as a call; nothing where it is none."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return []
        if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not self._known(found["name"]):
            return []
        arguments = found.get("arguments", found.get("parameters", {} if self._marked else None))
        if isinstance(arguments, str):
            return [Said(name=found["name"]), Said(arguments=arguments)]
        if not isinstance(arguments, dict):
            return []
        return [Said(name=found["name"]), Said(arguments=json.dumps(arguments, ensure_ascii=False))]

    def _known(self, name: str) -> bool:
        return not self.names or name in self.names

    def _in_arguments(self) -> list[Said]:
        """Inside the arguments, up to the brace that closes them."""
        text = self._held if self._depth else self._held.lstrip()
        closing = self.dialect.closing
        if not self._depth and self.dialect.args and closing and (closing.startswith(text) or text.startswith(closing)):
            if not text.startswith(closing):  # not yet
                return []
            self._held, self._state = text, "between"
            return [Said(arguments="{}")]
        for i, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = character == "\\", character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    self._held, self._state = text[i + 1 :], "between" if self.dialect.args else "close"
                    return [Said(arguments=text[: i + 1])]
        self._held = ""
        return [Said(arguments=text)] if text else []

    def _in_close(self) -> list[Said]:
        """Behind the arguments: the brace of the call itself."""
        text = self._held.lstrip()
        if text:
            self._held, self._state = text.removeprefix("}"), "between"
        return []

    def _in_between(self) -> list[Said]:
        """Behind a call: its closing mark, then another call, or words."""
        text = self._held.lstrip(" \n\r\t;,]")
        if self.dialect.form == "python":
            return self._between_python(text)
        closing = self.dialect.closing
        if closing and text and (text.startswith(closing) or closing.startswith(text)):
            if text.startswith(closing):
                self._held = text[len(closing) :]
            return []
        if not text or any(mark.startswith(text) and mark != text for mark in self.dialect.opening):
            return []
        self._held = text
        self._state = "open" if text.startswith("{") and not closing and not self.dialect.args else "text"
        return []

    def _between_python(self, text: str) -> list[Said]:
        """Behind a call of Python: another one in the same list, or words; the closing mark says nothing."""
        mark, listed = "<|python_end|>", "]" not in self._held[: len(self._held) - len(text)]
        if not text or (mark.startswith(text) and text != mark):
            return []
        self._held, self._state = text.removeprefix(mark), "open" if listed else "text"
        return []


def _end_of_value(text: str) -> int:
    """Where the JSON object or list that begins a text ends; 0 where it does not yet."""
    depth, in_string, escaped = 0, False, False
    for i, character in enumerate(text):
        if escaped:
            escaped = False
        elif in_string:
            escaped, in_string = character == "\\", character != '"'
        elif character == '"':
            in_string = True
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
            if depth <= 0:
                return i + 1
    return 0


def hidden_marks(tokenizer: Any, dialect: ToolDialect) -> dict[str, int]:
    """Those marks of a dialect that are control tokens of a vocabulary, with their ids."""
    found = {}
    for mark in (*dialect.opening, dialect.closing, dialect.args):
        token = tokenizer.convert_tokens_to_ids(mark) if mark in tokenizer.special_contents else None
        if isinstance(token, int):
            found[mark] = token
    return found
