"""TensorBoard's event files, for those who ask for them."""

from pathlib import Path
from typing import Any

from llama2.errors import MissingDependencyError


class Tensorboard:
    """What is logged as TensorBoard's event files, in `folder`/runs or where `place` says."""

    def __init__(self, folder: Path, place: str | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError(
                "report_to='tensorboard' needs the package tensorboard: pip install 'llama2[train]'"
            ) from error
        self._writer: Any = SummaryWriter(place or str(folder / "runs"))

    def write(self, entry: dict[str, Any]) -> None:
        """One logged entry."""
        for name, value in entry.items():
            if name != "step":
                self._writer.add_scalar(name.replace("eval_", "eval/"), value, entry["step"])
        self._writer.flush()
