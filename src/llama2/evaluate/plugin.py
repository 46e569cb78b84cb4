"""Makes `--model llama2` known to lm-evaluation-harness, whichever way its release finds models from outside.

Newer ones read the entry point group `lm_eval.models`. lm-eval 0.4.13 has a registry and nothing that fills it from
outside before its command line looks a name up, so `register` is called when `lm_eval.models`, its table of models, has
been imported: by a finder in front of Python's, which llama2_lm_eval.pth beside the package makes. That file is read
whenever Python starts, so it imports nothing of ours before that table is asked for.
"""

from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

NAME, TARGET = "llama2", "llama2.evaluate.harness:HarnessModel"


class _Loader:
    """A module's loader that registers our class behind it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        return self._inner.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._inner.exec_module(module)
        register()


def find_spec(name: str, path: Any = None) -> ModuleSpec | None:
    """lm-eval's table of models, whose loader registers our class behind it."""
    spec = PathFinder.find_spec(name, path)
    if spec is not None and spec.loader is not None:
        spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
    return spec


def register() -> None:
    """Puts the class into lm-eval's registry, where it has no such name yet; it is imported when it is asked for."""
    import lm_eval.models  # noqa: F401  its own names first: it fills an empty registry only
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)
