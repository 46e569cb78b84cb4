"""The site: every public name, flag, route and metric is on a generated page, and nothing comes from elsewhere."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import llama2
from llama2 import cli

ROOT = Path(__file__).resolve().parent.parent


def tool(name: str) -> ModuleType:
    """A module of tools/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    pytest.importorskip("fastapi", reason="routes and metrics need the extra `serve`")
    return tool("reference")


@pytest.fixture(scope="module")
def pages(reference: ModuleType) -> dict[str, str]:
    return reference.reference_pages()


def test_every_public_name_has_a_page(reference: ModuleType, pages: dict[str, str]) -> None:
    """Its page shows the object itself, or links to the class that it is another name of."""
    index = pages["reference/python/index.md"]
    for name in llama2.__all__:
        page = pages[f"reference/python/{name}.md"]
        assert f"# {name}\n" in page and f"[{name}]({name}.md)" in index
        shown = re.search(r"^::: (.+)$", page, re.MULTILINE)
        if shown is None:
            assert f"another name of [`{getattr(llama2, name).__name__}`]" in page
        else:
            module, _, last = shown[1].rpartition(".")
            assert getattr(sys.modules[module], last) is getattr(llama2, name)
            assert (getattr(llama2, name).__doc__ or "").strip()


def test_every_page_is_in_the_navigation(reference: ModuleType, pages: dict[str, str]) -> None:
    def leaves(nav: Any) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        return [leaf for part in (nav.values() if isinstance(nav, dict) else nav) for leaf in leaves(part)]

    assert sorted(leaves(reference.reference_nav())) == sorted(pages)
    own = set(re.findall(r"([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert own == {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}


def test_every_command_and_flag_is_on_a_page(pages: dict[str, str]) -> None:
    for name in cli.COMMANDS:
        page = pages[f"reference/commands/{name}.md"]
        tasks = getattr(cli._module(name), "TASKS", None)
        for task in tasks or ("",):
            part = page.split(f"\n## {task}\n")[1].split("\n## ")[0] if task else page
            for field in dataclasses.fields(cli.options_class((name, task) if task else (name,))):
                if field.metadata["positional"]:
                    assert f"`{field.metadata['metavar']}`" in part
                elif field.metadata["switches"]:
                    assert all(f"`--{v}`" in part for v in re.findall(r"--(\w+)", field.metadata["help"]))
                else:
                    assert f"--{field.name.replace('_', '-')}" in part, (name, task, field.name)


def test_every_metric_of_a_server_is_on_the_page(pages: dict[str, str]) -> None:
    from llama2.serve.model_pool import ModelPool
    from llama2.serve.service import Service

    service = Service()
    service.offer(ModelPool(list))
    service.metrics.add_of_model("a", requests=1)
    told = set(re.findall(r"^# TYPE (\S+) (\S+)$", service.metrics.page(), re.MULTILINE))
    assert len(told) > 25
    assert told == set(re.findall(r"^\| `(\S+)` \| (\w+) \|", pages["reference/metrics.md"], re.MULTILINE))


def test_every_route_is_on_the_page(pages: dict[str, str]) -> None:
    from llama2.serve.app import DIALECTS

    routes = {f"`{route.method} {route.path}`" for dialect in DIALECTS for route in dialect.routes}
    assert len(routes) > 50 and routes == set(
        re.findall(r"^\| (`\w+ /\S*`) \|", pages["reference/routes.md"], re.MULTILINE)
    )


def test_what_comes_from_elsewhere_is_found(reference: ModuleType) -> None:
    html = (
        '<script src="https://cdn.example/x.js"></script><link href="//fonts.example/y.css" rel="stylesheet">'
        '<link rel="canonical" href="https://here.example/"><a href="https://there.example">x</a><img src="own.svg">'
    )
    assert reference.loaded_from_elsewhere(html) == ["https://cdn.example/x.js", "//fonts.example/y.css"]


@pytest.mark.slow
def test_the_site_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strict: a link without a target, a page outside of nav and a page that needs another host are errors."""
    commands = pytest.importorskip("mkdocs.commands.build", reason="needs `make .make/docs`")
    pytest.importorskip("mkdocstrings")
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    monkeypatch.setattr("warnings.filters", [])
    commands.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    assert (tmp_path / "reference" / "python" / "LlamaForCausalLM.html").stat().st_size > 100_000
    assert "generate" in (tmp_path / "reference" / "python" / "LlamaForCausalLM.html").read_text()


def test_every_command_has_a_manual_page() -> None:
    pytest.importorskip("argparse_manpage", reason="needs `make .make/docs`")
    made = tool("man_pages").manual_pages()
    assert made == tool("man_pages").manual_pages()
    macros = {line.split()[0] for page in made.values() for line in page.splitlines() if line.startswith(".")}
    assert macros <= {".TH", ".SH", ".SS", ".TP", ".PP", ".B", ".BR", ".I", ".RS", ".RE", ".nf", ".fi", ".br", ".sp"}
    for name in cli.COMMANDS:
        assert f".BR llama2-{name} (1)".replace("-", "\\-") in made["llama2.1"]
        for task in getattr(cli._module(name), "TASKS", None) or ("",):
            page = made[f"llama2-{name}-{task}.1" if task else f"llama2-{name}.1"]
            assert page.startswith(".TH LLAMA2") and f".B llama2 {name}".replace("-", "\\-") in page
