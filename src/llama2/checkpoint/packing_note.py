"""How the weights beneath an adapter were packed when it was trained (QLoRA): a file of its folder.

No torch here.

An adapter is measured on packed weights, and on others its answers are worse. Loading or merging it packs the
model in the same way.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2.checkpoint import read_json
from llama2.files import saving, write_text
from llama2.quantization.formats import parse
from llama2.quantization_config import QuantizationConfig

PACKING = "base_quantization.json"


def write_packing(folder: Path, content: Mapping[str, Any] | None) -> None:
    """Writes the quantization_config of the model that an adapter was trained on, or removes that of an earlier save.

    Models that are stored packed (GPTQ) are so wherever the adapter is loaded, and need no note.
    """
    if content is None or content.get("quant_method") != "bitsandbytes":
        with saving(folder) as save:
            save.remove([PACKING])
        return
    write_text(folder / PACKING, json.dumps(dict(content), indent=2, sort_keys=True) + "\n")


def read_packing(folder: Path) -> QuantizationConfig | None:
    """How the model beneath an adapter is to be packed; None for an adapter that was trained on plain weights."""
    return parse(read_json(folder / PACKING)) if (folder / PACKING).is_file() else None


def warn_of_packing(folder: Path, config: Any) -> None:
    """Warns where an adapter that was trained on packed weights is put on others."""
    if read_packing(folder) is not None and getattr(config, "quantization_config", None) is None:
        warnings.warn(
            f"{folder} was trained on packed weights (QLoRA) and is put on plain ones, where its answers are worse: "
            f"load the folder itself, or the model with quantization_config as in its {PACKING}",
            stacklevel=3,
        )
