"""The map of the house, held by the syntax trees: imports point downward, and files and functions stay readable."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import llama2

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "llama2"

# Row of each module or family; a module imports lower rows, its own family, and nothing else of ours.
ROWS: dict[str, int] = {
    "errors": -3,
    "text_file": -2,
    "schema": -1,
    **dict.fromkeys(("generation", "runners"), -1),  # the folders alone; each file has a row of its own
    **dict.fromkeys(
        (
            "availability",
            "lazy",
            "plain",
            "recompute",
            "pattern",
            "mapping",
            "files",
            "processes",
            "options",
            "memory",
            "rope_types",
        ),
        0,
    ),
    **dict.fromkeys(("call_options", "keywords"), 0),
    **dict.fromkeys(("config_files", "logging", "presets", "rope_settings", "config_fields", "seeds"), 1),
    **dict.fromkeys(("array_kinds", "stored_arrays"), 1),
    **dict.fromkeys(("hf_argument_parser",), 2),
    **dict.fromkeys(("config", "generation.config", "compiled"), 2),
    **dict.fromkeys(("tokenizer", "quantization_config", "lora_config"), 3),
    **dict.fromkeys(("generation.arrays", "generation.tensors"), 4),
    **dict.fromkeys(("architecture", "documents", "rope", "cache", "outputs", "quantization", "linear"), 4),
    **dict.fromkeys(("attention", "companions", "coverage", "model_methods", "noise", "protocols"), 5),
    "pretrained": 6,
    **dict.fromkeys(("layers", "lora"), 7),
    "model": 8,
    "generation.drafts": 8,
    "generation.seeded": 8,
    "generation.call_settings": 8,
    **dict.fromkeys(("classifiers", "generation.processors", "generation.stopping", "generation.streamers", "cpu"), 9),
    **dict.fromkeys(("checkpoint", "plain_network", "generation.filters", "generation.guidance"), 10),
    "generation.sampler": 10,
    "runners.contract": 10,
    **dict.fromkeys(("runners.native", "runners.torch_pages", "runners.cuda_graphs", "runners.prepared"), 11),
    "generation.fast_sampling": 11,
    "generation.samplers": 11,
    "runners.native_trunk": 12,
    "runners.padded": 12,
    **dict.fromkeys(("generation.past_key_values", "generation.outputs"), 13),
    "generation.request": 14,
    **dict.fromkeys(("generation.beam", "generation.speculative"), 15),
    "generation.loop": 16,
    **dict.fromkeys(("auto", "engine"), 17),
    **dict.fromkeys(("pipelines", "peft_model", "train", "evaluate"), 18),
    "scoring": 19,
    **dict.fromkeys(("serve", "quantize", "align"), 20),
    "llama": 21,
    "cli": 22,
    **dict.fromkeys(("convert_llama_weights_to_hf", "__main__"), 23),
}
STRANGERS = {"quantization": {"layers", "model"}, "layers": {"quantization"}, "model": {"quantization"}}
# The third column: where torch may be imported at import time; a folder, or a file. Nowhere else. What is named here
# besides the network, training, quantising and the runners of torch are the loaders into torch and what converts.
TORCH = (
    *(
        "attention.py",
        "cache.py",
        "classifiers.py",
        "companions.py",
        "documents.py",
        "layers.py",
        "linear.py",
        "lora.py",
    ),
    *("model.py", "noise.py", "outputs.py", "peft_model.py", "pipelines.py", "plain_network.py", "pretrained.py"),
    *("recompute.py", "rope.py", "scoring.py", "seeds.py"),
    *("align", "checkpoint", "quantization", "quantize", "runners", "train"),
    *("cpu/modules.py", "cpu/reference.py", "engine/parallel.py", "engine/torch_plan_runner.py"),
    "evaluate/torch_steps.py",
    *("generation/beam.py", "generation/guidance.py", "generation/loop.py", "generation/outputs.py"),
    *("generation/past_key_values.py", "generation/request.py", "generation/sampler.py", "generation/speculative.py"),
    *("generation/stopping.py", "generation/tensors.py"),
)
DOORS = ("door", "declares")
UPWARD_DOORS = {
    ("checkpoint", "quantize.on_load", "quantized"),
    ("config_files", "auto", "load_config"),
    ("config_files", "auto", "load_fields"),
    ("config_files", "checkpoint.hub", "upload_file"),
    ("generation.config", "checkpoint.source", "settings_file"),
    ("companions", "checkpoint.transformers_model", "to_transformers"),
    *(
        ("companions", "checkpoint.adapters", name)
        for name in (
            "add_adapter",
            "load_adapter",
            "set_adapter",
            "enable_adapters",
            "disable_adapters",
            "delete_adapter",
            "active_adapters",
            "get_adapter_state_dict",
        )
    ),
    ("model_methods", "checkpoint.load", "from_pretrained"),
    ("model_methods", "checkpoint.save", "save_pretrained"),
    ("model_methods", "checkpoint.save", "push_to_hub"),
    ("model_methods", "checkpoint.quantized", "dequantize"),
    ("model_methods", "generation.loop", "generate"),
    ("model_methods", "generation.loop", "compute_transition_scores"),
}
MAX_FILE, MAX_FUNCTION = 500, 90

FILES = sorted(PACKAGE.rglob("*.py"))


def family(path: Path) -> str:
    return known(".".join(path.relative_to(PACKAGE).with_suffix("").parts))


def known(module: str) -> str:
    """The name under which a module of the package has its row: its own, or that of a folder it is in."""
    while module not in ROWS and "." in module:
        module = module.rpartition(".")[0]
    return module


@cache
def nodes(path: Path) -> list[ast.AST]:
    """Every node of the file's tree, the module first."""
    return list(ast.walk(ast.parse(path.read_text())))


@pytest.fixture(scope="module", autouse=True)
def forget() -> Iterator[None]:
    """A million nodes would slow every collection of garbage in the tests that follow."""
    yield
    nodes.cache_clear()


def imported(found: list[ast.AST], path: Path) -> list[str]:
    """Absolute names of every module that these nodes import."""
    names = []
    for node in found:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import at line {node.lineno}; write the full name"
            module = node.module or ""
            names += [f"llama2.{alias.name}" for alias in node.names] if module == "llama2" else [module]
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    own = family(path)
    assert own in ROWS, f"{own} has no row; give it one in ROWS"
    for name in imported(nodes(path), path):
        assert name.split(".")[0] not in ("transformers", "peft", "trl", "llama_cpp"), f"{path} imports {name}"
        if name.startswith("llama2."):
            other = known(name.removeprefix("llama2."))
            assert other == own or ROWS[other] < ROWS[own], f"{own} (row {ROWS[own]}) imports {other} upward"
            assert other not in STRANGERS.get(own, set()), f"{own} and {other} do not know each other"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_own_imports_stand_at_the_top(path: Path) -> None:
    """Inside a function only third-party packages that are slow or optional, and commands in cli/."""
    if family(path) in ("cli", "__init__"):
        return
    for function in nodes(path):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [name for name in imported(list(ast.walk(function)), path) if name.startswith("llama2")]
            assert not inner, f"{path.name}:{function.lineno} {function.name} imports {inner} inside"


def imports_torch(path: Path) -> bool:
    names = imported(list(nodes(path)[0].body), path)  # type: ignore[attr-defined]
    return any(name.split(".")[0] == "torch" for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_torch_is_imported_where_it_may_be(path: Path) -> None:
    own = path.relative_to(PACKAGE)
    allowed = any(str(parent) in TORCH for parent in (own, *own.parents))
    assert allowed or not imports_torch(path), f"{own} imports torch; see TORCH"


@pytest.mark.parametrize("part", TORCH)
def test_no_place_for_torch_is_kept_for_nothing(part: str) -> None:
    assert any(imports_torch(f) for f in FILES if f == PACKAGE / part or PACKAGE / part in f.parents)


# What loads torch, or needs another extra, in a folder of which the rest does without, beside what TORCH names.
MEETS_TORCH = {"evaluate": ("arena", "harness", "opening", "plugin", "tasks"), "serve": ("__main__", "ray")}
# Of checkpoint/, which has both kinds: what reads a model for the native engine.
LIGHT = (
    "native_files",
    "native_model",
    "array_pickle",
    "hf",
    "meta",
    "peft_adapter",
    "packing_note",
    "source",
    "hub",
    "gguf",
)


@pytest.mark.parametrize("folder", ["cpu", "engine", "evaluate", "serve", "tokenizer", "checkpoint"])
def test_a_folder_is_imported_where_there_is_no_torch(folder: str) -> None:
    """Also not through what its modules import."""
    files = [f.relative_to(PACKAGE).with_suffix("") for f in FILES if PACKAGE / folder in f.parents]
    files = [f for f in files if f"{f}.py" not in TORCH and f.name not in MEETS_TORCH.get(folder, ())]
    names = [".".join(f.parts) for f in files if folder != "checkpoint" or f.name in LIGHT]
    code = "import sys, importlib\nsys.modules['torch'] = None\n"
    code += "".join(f"importlib.import_module('llama2.{name}')\n" for name in names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_upward_door_is_listed() -> None:
    """A door may also delay a heavy module of its own row or below; upward ones are few and named here."""
    upward = set()
    for path in FILES:
        own = family(path)
        for node in nodes(path):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in DOORS:
                module, name = (arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant))
                if ROWS[known(module)] > ROWS[own]:
                    upward.add((own, module, name))
    assert upward == UPWARD_DOORS


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_budgets(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE, f"{path.name} has more than {MAX_FILE} lines"
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{path.name}: {node.name} has {length} lines"
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            returns = node.returns is not None or node.name == "__init__"
            assert not untyped and returns, f"{path.name}: {node.name} is not fully typed"
        assert not isinstance(node, ast.Global), f"{path.name} uses global"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"{path.name} has a bare except"


# Where annotations say what is taken and given, because everything passes through: no more bare Any than there are.
SPOKEN = ("generation/request.py", "engine", "train")
MOST_BARE_ANY = 58


def bare(annotation: ast.expr | None) -> bool:
    return (isinstance(annotation, ast.Name) and annotation.id == "Any") or (
        isinstance(annotation, ast.Constant) and annotation.value == "Any"
    )


def test_few_annotations_are_a_bare_any() -> None:
    """Of parameters, results and fields; the bound falls with them and never rises."""
    count = 0
    for path in FILES:
        if any(part == PACKAGE / name for part in (path, *path.parents) for name in SPOKEN):
            for node in nodes(path):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    a = node.args
                    taken = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
                    count += bare(node.returns) + sum(bare(x.annotation) for x in taken if x is not None)
                count += isinstance(node, ast.AnnAssign) and bare(node.annotation)
    assert 0 < count <= MOST_BARE_ANY


# Words that say of a local variable that it is one, and not what it holds.
EMPTY_WORDS = {"found", "part", "place", "kind", "at", "wanted", "held", "given", "made", "there"}
MOST_EMPTY_WORDS = 1030


def stored_names(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """Names that a function binds itself, those of functions in it apart."""
    names, waiting = set(), list[ast.AST](function.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)
    return names


def test_local_names_say_what_they_hold() -> None:
    """One name in one function counts once; the bound falls with the count and never rises."""
    functions = [n for path in FILES for n in nodes(path) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    count = sum(len(stored_names(function) & EMPTY_WORDS) for function in functions)
    assert 0 < count <= MOST_EMPTY_WORDS


def test_environment_is_read_in_the_command_line_only() -> None:
    """And where torchrun's variables are."""
    for path in FILES:
        if family(path) != "cli" and path != PACKAGE / "train" / "distributed.py":
            for node in nodes(path):
                assert not (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")), path


# Names of transformers, which it and TRL read on our classes too, and of torch, which classes of ours have as well.
PRIVATE_ELSEWHERE = {"_attn_implementation", "_hf_peft_config_loaded", "_init_weights"} | {
    "_buffers", "_modules", "_parameters", "_version",
}  # fmt: skip


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(path: Path) -> set[str]:
    """Private names that the module gives: to functions, classes, variables, fields, and attributes of self or cls."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and own(node.value):
            names.add(node.attr)
    return {name for name in names if private(name)}


def own(value: ast.expr) -> bool:
    """self, cls or super()."""
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        return value.func.id == "super"
    return isinstance(value, ast.Name) and value.id in ("self", "cls")


@cache
def private_names() -> set[str]:
    """Every private name of the package; another one belongs to another library."""
    return {name for path in FILES for name in defined(path)} - PRIVATE_ELSEWHERE


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_module_reaches_into_the_private_parts_of_another(path: Path) -> None:
    """Neither by import, nor as an attribute of something that is not self, nor through getattr with its name."""
    theirs = private_names() - defined(path)
    for node in nodes(path):
        reached: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llama2"):
            reached = [alias.name for alias in node.names if private(alias.name)]
        elif isinstance(node, ast.Attribute) and not own(node.value):
            reached = [node.attr] if node.attr in theirs else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("attr"):
            texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            reached = [text for text in texts if text in theirs and not own(node.args[0])]
        assert not reached, f"{path.name}:{node.lineno} reaches for {reached}; make it public"  # type: ignore[attr-defined]


def test_one_name_is_one_class() -> None:
    """A reader, and an import, finds one class behind each public name."""
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


def test_the_stub_is_what_the_tool_writes() -> None:
    """__init__.pyi tells type checkers what the lazy package gives."""
    path = PACKAGE.parent.parent / "tools" / "write_stub.py"
    spec = importlib.util.spec_from_file_location("write_stub", path)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.TARGET.read_text() == tool.stub(llama2._HOMES), "run `make format`"
