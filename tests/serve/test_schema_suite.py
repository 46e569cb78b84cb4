"""JSON-Schema-Test-Suite, draft 2020-12: what a constraint lets through fits the schema that it was made from.

Of the required tests those count whose schema the engine holds in full (strict) and that some JSON fits. The suite is
not part of this repository: LLAMA2_SCHEMA_SUITE names its folder.
"""

import json
import os
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="serving needs the extra `serve`")
pytest.importorskip("jsonschema", reason="checking answers needs jsonschema")

from jsonschema import Draft202012Validator
from serve.walks import EndlessError, walk

from llama2.errors import InputError
from llama2.serve.constraint import Compiler, json_schema

SEEDS = int(os.environ.get("LLAMA2_SCHEMA_SEEDS", "20"))
# Schemas without any keyword that shapes a value let whole paragraphs of random JSON through: nothing to see there.
LEAST_HELD = 100  # of the suite's schemas: fewer would mean that most are refused


def cases() -> list[tuple[str, dict[str, Any]]]:
    """The suite's schemas, by name, but for Unicode properties, which `re` cannot check. Skips where there is none."""
    folder = os.environ.get("LLAMA2_SCHEMA_SUITE")
    if not folder:
        pytest.skip("needs JSON-Schema-Test-Suite; set LLAMA2_SCHEMA_SUITE to its folder")
    files = sorted((Path(folder) / "tests" / "draft2020-12").glob("*.json"))
    assert len(files) > 40, f"{folder} is not the suite: it has {len(files)} files"
    found = []
    for file in files:
        groups = json.loads(file.read_text(encoding="utf-8"))
        found += [(f"{file.stem}: {group['description']}", group["schema"]) for group in groups]
    return [(name, schema) for name, schema in found if isinstance(schema, dict) and r"\\p{" not in json.dumps(schema)]


def fault(schema: Any, text: str) -> str | None:
    """Why a text does not fit a schema. Where multiples count, numbers are decimal: binary ones are not exact."""
    exact: Any = Decimal if "multipleOf" in json.dumps(schema) else None
    with localcontext(prec=5000):
        schema = json.loads(json.dumps(schema), parse_float=exact)
        checker = Draft202012Validator.FORMAT_CHECKER
        errors = Draft202012Validator(schema, format_checker=checker).iter_errors(json.loads(text, parse_float=exact))
        return next((error.message[:200] for error in errors), None)


def test_what_is_let_through_fits(parts: tuple[Any, Compiler]) -> None:
    held, endless, wrong = 0, 0, []
    for name, schema in cases():
        constraint = json_schema(schema, strict=True)
        try:
            parts[1].compiled(constraint)
        except InputError:
            continue
        held += 1
        for seed in range(SEEDS):
            try:
                text = walk(*parts, constraint, seed)
            except EndlessError:
                endless += 1
                continue
            if (message := fault(schema, text)) is not None:
                wrong.append(f"{name}, seed {seed}: {text[:200]} -- {message}")
                break
    assert held >= LEAST_HELD and endless <= held * SEEDS // 50
    assert not wrong, "\n".join(wrong)
