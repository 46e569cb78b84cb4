"""Pages of the site that are written by nobody: Python names, commands, HTTP routes and metrics, from the code itself.

A hook of mkdocs (mkdocs.yml): `reference_pages` are the pages, the functions named `on_...` put them into the site. A
link of a page that leaves docs/ (to the code, to README.md) becomes the path that it names.
"""

import argparse
import inspect
import re
from pathlib import Path
from typing import Any

import llama2
from llama2 import cli
from llama2.cli.completion import children, whole_parser

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = {
    "Models": (
        "model",
        "classifiers",
        "pretrained",
        "auto",
        "config",
        "outputs",
        "cache",
        "pipelines",
        "llama",
        "engine",
    ),
    "Tokenizers": ("tokenizer",),
    "Generation": ("generation", "seeds"),
    "Quantisation and adapters": ("quantization_config", "lora_config", "peft_model"),
    "Training": ("train", "align", "hf_argument_parser"),
    "Errors and availability": ("errors", "availability"),
}


def family(name: str) -> str:
    """Returns the family of a public name, by the module that it comes from. Raises KeyError for another module."""
    top = llama2._HOME[name].partition(".")[0]
    found = [title for title, modules in FAMILIES.items() if top in modules]
    if not found:
        raise KeyError(f"{name} comes from llama2.{llama2._HOME[name]}: name its family in tools/reference.py")
    return found[0]


def reference_pages() -> dict[str, str]:
    """Returns every generated page by its path within docs/."""
    pages = {f"reference/python/{name}.md": _python_page(name) for name in llama2.__all__}
    pages["reference/python/index.md"] = _python_index()
    for name in cli.COMMANDS:
        pages[f"reference/commands/{name}.md"] = _command_page(name)
    pages["reference/commands/index.md"] = _command_index()
    pages["reference/metrics.md"] = _metrics_page()
    pages["reference/routes.md"] = _routes_page()
    return pages


def reference_nav() -> list[Any]:
    """Returns what the navigation has of them."""
    python: list[Any] = ["reference/python/index.md"]
    python += [
        {title: [{n: f"reference/python/{n}.md"} for n in llama2.__all__ if family(n) == title]} for title in FAMILIES
    ]
    commands = ["reference/commands/index.md", *({n: f"reference/commands/{n}.md"} for n in cli.COMMANDS)]
    return [
        {"Python": python},
        {"Commands": commands},
        {"HTTP routes": "reference/routes.md"},
        {"Metrics": "reference/metrics.md"},
    ]


def _title(text: str) -> str:
    return f"---\ntitle: {text}\n---\n\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.:])\s", " ".join(text.split()), maxsplit=1)[0].rstrip(":")


def _python_page(name: str) -> str:
    value = getattr(llama2, name)
    home = f"llama2.{llama2._HOME[name]}"
    if isinstance(value, type) and (value.__module__, value.__name__) != (home, name) and value.__name__ != name:
        same = f"`{value.__name__}`"
        if value.__name__ in llama2.__all__:
            same = f"[{same}]({value.__name__}.md)"
        return f"{_title(name)}# {name}\n\n`from llama2 import {name}`: another name of {same}.\n"
    path = f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else f"{home}.{name}"
    return f"{_title(name)}# {name}\n\n`from llama2 import {name}`\n\n::: {path}\n"


def _python_index() -> str:
    parts = [_title("Python"), "# Python\n\nEvery public name: `from llama2 import NAME`.\n"]
    for title in FAMILIES:
        parts.append(f"\n## {title}\n\n| name | |\n| --- | --- |\n")
        for name in llama2.__all__:
            if family(name) == title:
                text = _first_sentence(inspect.getdoc(getattr(llama2, name)) or "")
                parts.append(f"| [{name}]({name}.md) | {_cell(text)} |\n")
    return "".join(parts)


def _command_index() -> str:
    rows = "".join(f"| [{name}]({name}.md) | {_cell(text)} |\n" for name, (_, text) in cli.COMMANDS.items())
    return (
        f"{_title('Commands')}# Commands\n\nOptions may also stand in the environment and in config.toml "
        f"([Settings](../../cli.md#settings)).\n\n| command | |\n| --- | --- |\n{rows}"
    )


def _command_page(name: str) -> str:
    parser = children(whole_parser())[name]
    parts = [_title(f"llama2 {name}"), f"# llama2 {name}\n\n"]
    tasks = children(parser)
    if not tasks:
        return "".join(parts + _flags(parser))
    parts.append(f"{cli.COMMANDS[name][1]}. The task is the first word.\n")
    for task, child in tasks.items():
        parts.append(f"\n## {task}\n\n")
        parts += _flags(child)
    return "".join(parts)


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    parts = [f"{_cell(parser.description or '').replace('%%', '%')}\n"]
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if a.help != argparse.SUPPRESS and a.dest != "help"]
        if not actions:
            continue
        title = {"options": "Options", "positional arguments": "Arguments"}.get(group.title or "", group.title)
        parts.append(f"\n**{title}**\n\n| | default | |\n| --- | --- | --- |\n")
        for action in actions:
            help, default = _help(action)
            parts.append(f"| {_spelled(action)} | {default} | {_cell(help)} |\n")
    return parts


def _spelled(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar}`"
    value = "" if action.nargs == 0 else f" {action.metavar or ''}"
    if action.choices is not None:
        value = " " + "\\|".join(map(str, action.choices))
    return ", ".join(f"`{name}{value.rstrip()}`" for name in action.option_strings)


def _help(action: argparse.Action) -> tuple[str, str]:
    text = (action.help or "").replace("%%", "%")
    found = re.search(r" \(default: ([^()]*)\)$", text)
    return (text[: found.start()], f"`{found[1]}`") if found else (text, "")


def _metrics_page() -> str:
    from llama2.serve.metrics import Counter, Gauge, Histogram
    from llama2.serve.model_pool import ModelPool
    from llama2.serve.service import Service

    service = Service()
    service.offer(ModelPool(list))
    metrics = service.metrics
    every = [m for m in vars(metrics).values() if isinstance(m, Counter | Histogram)]
    parts = [
        _title("Metrics"),
        "# Metrics\n\n`GET /metrics` of `llama2 serve`, in Prometheus' text format. Histograms have `_bucket`, `_sum` "
        "and `_count`. A server of several models adds the label `model` to its gauges.\n\n"
        "| name | type | label | |\n| --- | --- | --- | --- |\n",
    ]
    for metric in (*every, *metrics.of_models.values(), *metrics.gauges):
        label = f"`{metric.label}`" if isinstance(metric, Counter) and metric.label else ""
        kind = "gauge" if isinstance(metric, Gauge) else type(metric).__name__.lower()
        parts.append(f"| `{metric.name}` | {kind} | {label} | {_cell(metric.help)} |\n")
    return "".join(parts)


def _routes_page() -> str:
    from llama2.serve.app import DIALECTS

    keys = {"key": "the server's", "open": "none", "metrics": "of metrics"}
    parts = [
        _title("HTTP routes"),
        "# HTTP routes\n\nRoutes of `llama2 serve`, by API. `GET /openapi.json` of a server has the fields of each "
        "body; [apis.md](../apis.md) has examples.\n",
    ]
    for dialect in DIALECTS:
        parts.append(f"\n## {dialect.name}\n\n| route | key | |\n| --- | --- | --- |\n")
        parts += [f"| `{r.method} {r.path}` | {keys[r.access]} | {_cell(r.summary)} |\n" for r in dialect.routes]
    return "".join(parts)


def loaded_from_elsewhere(html: str) -> list[str]:
    """Returns the addresses that a browser would fetch from another host to show a page: scripts, styles, pictures."""
    tags = re.findall(r"<(?:script|img|iframe|link)\b[^>]*>", html)
    tags = [tag for tag in tags if not re.search(r"rel=[\"']?(?:canonical|next|prev)\b", tag)]
    return [found[1] for tag in tags if (found := re.search(r"(?:src|href)=[\"']?((?:https?:)?//[^\"'\s>]+)", tag))]


# -- hooks of mkdocs ---------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Puts the generated pages into the navigation."""
    section = next(entry["Reference"] for entry in config.nav if isinstance(entry, dict) and "Reference" in entry)
    section[:0] = reference_nav()
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    for path, text in reference_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links out of docs/ into the path that they name."""
    folder = Path(config.docs_dir, page.file.src_uri).parent

    def path(match: re.Match[str]) -> str:
        target = (folder / match[2].split("#")[0]).resolve()
        if target.is_relative_to(Path(config.docs_dir).resolve()):
            return match[0]
        named = str(target.relative_to(ROOT))
        return f"`{named}`" if match[1] in (named, f"`{named}`") else f"{match[1]} (`{named}`)"

    return _LINK.sub(path, markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Refuses a page that needs another host."""
    if found := loaded_from_elsewhere(output):
        raise ValueError(f"{page.file.src_uri} fetches {', '.join(found)}")
    return output
