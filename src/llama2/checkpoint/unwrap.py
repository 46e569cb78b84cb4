"""State dicts as training programs save them: inside other dicts, and with names of the wrappers that a model was in.

{"model": {...}, "optimizer": {...}}     one of WRAPPERS holds the tensors, at any depth
module., _orig_mod., model.model.        from DistributedDataParallel, torch.compile, FSDP and Lightning
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "model_state", "weights")
_ANYWHERE = ("_orig_mod.", "_forward_module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def inner_dict(content: Any, where: Path, is_tensor: Callable[[Any], bool]) -> Any:
    """The dict of tensors in what torch.save wrote: the content itself, or what is wrapped in it, which is told."""
    taken: list[str] = []
    while isinstance(content, Mapping) and not all(is_tensor(value) for value in content.values()):
        key = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if key is None or len(taken) == 8:  # a pickled dict may hold itself
            return content
        taken.append(key)
        content = content[key]
    if taken:
        warnings.warn(f"{where} holds the weights in {'.'.join(taken)}; the rest of it is not read", stacklevel=3)
    return content


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """{name without wrappers: name in the file}; the same names where there are none."""
    stored = list(names)
    plain = stored
    for part in _ANYWHERE:
        plain = [name.replace(part, "") for name in plain]
    while plain and all(name.startswith("module.") for name in plain):
        plain = [name.removeprefix("module.") for name in plain]
    if plain and all(name.startswith("model.") for name in plain) and any(_doubled(name) for name in plain):
        plain = [name.removeprefix("model.") for name in plain]
    return dict(zip(plain, stored, strict=True))


def _doubled(name: str) -> bool:
    return name.startswith(("model.model.", "model.lm_head.", "model.score."))


def without_wrappers(tensors: Mapping[str, Any], where: Path) -> Mapping[str, Any]:
    """The tensors under names without wrappers; that they had some is told."""
    names = plain_names(tensors)
    changed = next(((new, old) for new, old in names.items() if new != old), None)
    if changed is None:
        return tensors
    warnings.warn(
        f"{where} calls its tensors as a wrapped model does ({changed[1]}); they are read as {changed[0]} and so on",
        stacklevel=3,
    )
    return {new: tensors[old] for new, old in names.items()}
