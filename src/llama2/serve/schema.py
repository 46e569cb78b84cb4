"""JSON schemas as clients mean them, made ready for the constraint engine.

A schema that names properties is an object, and an object has the properties that it names and no others: a model that
may invent keys does. `additionalProperties` says otherwise. What the engine cannot hold is left out with a warning, or
with strict refused by it. No schema is fetched from anywhere.
"""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from llama2.errors import InputError

MAX_DEPTH = 128  # of schemas inside schemas, as of brackets in proof.py

_ONE = ("additionalProperties", "items", "additionalItems", "propertyNames", "contains")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_IN_PLACE = ("allOf", "anyOf", "oneOf")
_FAMILIES: Mapping[str, frozenset[str]] = {
    "object": frozenset((
        "properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties",
        "propertyNames", "dependentRequired", "dependentSchemas", "unevaluatedProperties",
    )),
    "array": frozenset((
        "items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains", "minContains",
        "maxContains", "unevaluatedItems",
    )),
    "string": frozenset(("pattern", "minLength", "maxLength", "format")),
    "number": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")),
}  # fmt: skip
_DECIDED = ("type", "enum", "const", "$ref", "$dynamicRef", "anyOf", "oneOf", "not", "if")
_ALTERNATIVE = frozenset(("required", "type", "title", "description", "$comment"))
_NOTES = frozenset((
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$comment", "$defs",
    "definitions",
))  # fmt: skip
_UNHELD_PATTERN = re.compile(r"\(\?(?:[=!]|<[=!])|\\[bBkG1-9]|\(\?P[=>]")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
# The engine takes 60 for the seconds of any minute, RFC 3339 for the last one of some days.
_LEAP_SECONDS = {"time": "^..:..:[0-5]", "date-time": "T..:..:[0-5]"}
_DRAFTS = re.compile(r"https?://json-schema\.org/(draft/(2019-09|2020-12)|draft-0[467])/schema#?$")


def prepared(schema: Mapping[str, Any], strict: bool = False) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A copy of a schema, typed and closed, and warnings of what was left out of it.

    strict: nothing is left out here, so that the engine refuses it. Raises InputError for schemas nested too deeply.
    """
    _check_depth(schema)
    found = _Schema(copy.deepcopy(dict(schema)), strict)
    found.prepare()
    return found.root, tuple(found.warnings)


def without_notes(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without what holds an answer to nothing, which the prompt tells and a grammar need not hold."""
    _check_depth(schema)
    found = _Schema(copy.deepcopy(dict(schema)), True)
    for _, node in found.nodes:
        for name in ("title", "description", "examples", "default", "$comment", "deprecated"):
            node.pop(name, None)
    return found.root


def moved(schema: Any, path: str) -> Any:
    """A prepared schema as part of another, its references to itself followed to its new place."""
    found = _Schema(copy.deepcopy(dict(schema)), True)
    for _, node in found.nodes:
        if isinstance(reference := node.get("$ref"), str) and reference.startswith("#"):
            node["$ref"] = path + reference[1:]
    for name in ("x-guidance", "$schema"):
        found.root.pop(name, None)
    return found.root


def loosened(source: str) -> tuple[str, tuple[str, ...]]:
    """A prepared schema without anything that the engine has refused in some document, and warnings of it."""
    found = _Schema(json.loads(source), False)
    found.loosen()
    return json.dumps(found.root), tuple(found.warnings)


def _check_depth(schema: Any) -> None:
    """Raises InputError; without recursion, for what is checked may be nested without end."""
    level = [schema]
    for _ in range(2 * MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            inner += value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        level = inner
        if not level:
            return
    raise InputError(f"the JSON schema nests more than {MAX_DEPTH} brackets; flatten it")


def _children(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas inside a schema, with where they stand."""
    for name in _ONE:
        if isinstance(node.get(name), dict):
            yield name, node[name]
    for name in _LISTS:
        if isinstance(node.get(name), list):
            yield from ((f"{name}.{i}", inner) for i, inner in enumerate(node[name]) if isinstance(inner, dict))
    for name in _MAPS:
        if isinstance(node.get(name), dict):
            yield from ((f"{name}.{key}", inner) for key, inner in node[name].items() if isinstance(inner, dict))


class _Schema:
    """One schema at work."""

    def __init__(self, root: dict[str, Any], strict: bool) -> None:
        self.root, self.strict, self.warnings = root, strict, list[str]()
        self.nodes: list[tuple[str, dict[str, Any]]] = []  # in order, each with its place
        self._visit("", root)
        self._named = any("$id" in node or "$anchor" in node for _, node in self.nodes)
        self._combined: set[int] = set()

    def _visit(self, place: str, node: dict[str, Any]) -> None:
        stack = [(place, node)]
        while stack:
            place, node = stack.pop()
            self.nodes.append((place, node))
            stack += [(f"{place}.{name}" if place else name, inner) for name, inner in _children(node)]

    def prepare(self) -> None:
        if not _DRAFTS.match(str(self.root.get("$schema", ""))):
            self.root.pop("$schema", None)
        for place, node in self.nodes:
            self._leave_out(place, node)
        for _, node in self.nodes:
            self._combine(node)
        for _, node in self.nodes:
            self._type(node)
        for _, node in self.nodes:
            self._close(node)
        for _, node in self.nodes:
            _nullable(node)

    def _warn(self, place: str, what: str) -> None:
        if len(self.warnings) < 16:
            self.warnings.append(f"the schema{f' at {place[:100]}' if place else ''} {what}")

    def _leave_out(self, place: str, node: dict[str, Any]) -> None:
        if node.get("uniqueItems") is False:
            del node["uniqueItems"]  # which asks for nothing
        for name in _COUNTS:
            if isinstance(value := node.get(name), float) and value.is_integer():
                node[name] = int(value)
        if node.get("format") in _LEAP_SECONDS and "pattern" not in node:
            node["pattern"] = _LEAP_SECONDS[node["format"]]
        if self.strict:
            return
        if isinstance(node.get("pattern"), str) and _UNHELD_PATTERN.search(node["pattern"]):
            self._warn(place, f"has the pattern {node.pop('pattern')[:60]!r}, which cannot be held; it is left out")
        patterns = node.get("patternProperties")
        for key in [key for key in patterns if _UNHELD_PATTERN.search(key)] if isinstance(patterns, dict) else ():
            del node["patternProperties"][key]
            self._warn(place, f"has patternProperties {key[:60]!r}, which cannot be held; they are left out")
        if isinstance(node.get("$ref"), str) and not node["$ref"].startswith("#") and not self._named:
            self._warn(place, f"refers to {node.pop('$ref')[:100]!r}, which is not fetched; anything is let through")

    def loosen(self) -> None:
        for place, node in self.nodes:
            for name, why in (("pattern", "cannot be held"), ("patternProperties", "cannot be held together")):
                if node.pop(name, None) is not None:
                    self._warn(place, f"has {name} that {why}; left out")
                    if name == "patternProperties" and node.get("additionalProperties") is False:
                        del node["additionalProperties"]
            if isinstance(node.get("$ref"), str) and not node["$ref"].startswith("#"):
                self._warn(
                    place, f"refers to {node.pop('$ref')[:100]!r}, which is not fetched; anything is let through"
                )

    def _target(self, reference: Any) -> dict[str, Any] | None:
        """Resolves a reference inside the document; None for what only the engine resolves."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            return None
        node: Any = self.root
        for part in reference[2:].split("/") if len(reference) > 1 else ():
            key = part.replace("%25", "%").replace("%22", '"').replace("~1", "/").replace("~0", "~")
            node = node.get(key) if isinstance(node, dict) else None
        return node if isinstance(node, dict) else None

    def _combine(self, node: dict[str, Any]) -> None:
        """Marks schemas that hold together with others for the same value: none of them knows all its properties."""
        applied = [name for name in (*_IN_PLACE, "$ref") if name in node]
        inner = len(node.get("allOf") or ()) if isinstance(node.get("allOf"), list) else 0
        own = set(node) - _NOTES - set(applied) - {"type", "$schema", "nullable", "$id", "$anchor"}
        if len(applied) > 1 or inner > 1 or (applied and own):
            for _, other in self._in_place(node):
                self._mark(other)

    def _in_place(self, node: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        for name in _IN_PLACE:
            if isinstance(node.get(name), list):
                yield from ((name, inner) for inner in node[name] if isinstance(inner, dict))
        if (target := self._target(node.get("$ref"))) is not None:
            yield "$ref", target

    def _mark(self, node: dict[str, Any]) -> None:
        stack = [node]
        while stack:
            node = stack.pop()
            if id(node) not in self._combined:
                self._combined.add(id(node))
                stack += [inner for _, inner in self._in_place(node)]

    def _families(self, node: dict[str, Any]) -> set[str]:
        """Kinds of values that a schema's keywords, and those of what it is combined with, are about."""
        found, stack, seen = set[str](), [node], set[int]()
        while stack:
            one = stack.pop()
            if id(one) in seen:
                continue
            seen.add(id(one))
            found |= {kind for kind, words in _FAMILIES.items() if not words.isdisjoint(one)}
            if isinstance(one.get("type"), str):
                found.add("number" if one["type"] == "integer" else one["type"])
            elif "type" in one or "enum" in one or "const" in one:
                found.add("several")
            stack += [inner for name, inner in self._in_place(one) if name in ("allOf", "$ref")]
        return found

    def _type(self, node: dict[str, Any]) -> None:
        """A schema that speaks of one kind of values only means such a value."""
        if id(node) in self._combined:
            return
        own = {kind for kind, words in _FAMILIES.items() if not words.isdisjoint(node)}
        if any(name in node for name in _DECIDED) and not ("type" not in node and own == {"object"}):
            return
        if any(name in node for name in ("type", "enum", "const", "$ref")):
            return
        found = self._families(node)
        if len(found) == 1 and (kind := next(iter(found))) in _FAMILIES:
            node["type"] = kind

    def _close(self, node: dict[str, Any]) -> None:
        """An object whose properties all stand here has no others."""
        named, patterns = node.get("properties"), node.get("patternProperties")
        if not isinstance(named, dict) and not isinstance(patterns, dict):
            return
        if id(node) in self._combined or any(k in node for k in ("additionalProperties", "unevaluatedProperties")):
            return
        if self._named or any(name in node for name in ("$ref", "$dynamicRef")):
            return
        if any(set(inner) - _ALTERNATIVE for _, inner in self._in_place(node)):
            return
        required = node.get("required")
        for name in required if isinstance(required, list) else ():
            if isinstance(name, str) and not (patterns or name in (named or {})):
                node.setdefault("properties", {})[name] = {}
        node["additionalProperties"] = False


def _nullable(node: dict[str, Any]) -> None:
    """OpenAPI's way to allow null."""
    if node.get("nullable") is not True:
        return
    del node["nullable"]
    kind = node.get("type")
    if "enum" in node and isinstance(node["enum"], list) and None not in node["enum"]:
        node["enum"] = [*node["enum"], None]
    if isinstance(kind, str):
        node["type"] = [kind, "null"]
    elif isinstance(kind, list):
        node["type"] = [*kind, *(["null"] if "null" not in kind else [])]
    elif kind is None and "enum" not in node:
        rest = {key: node.pop(key) for key in list(node) if key not in _NOTES}
        if rest:
            node["anyOf"] = [rest, {"type": "null"}]
