"""Paths from the environment, and imports of transformers (upstream's) and llama2 under them. Imported before all else.

PEER_UPSTREAM (folder that holds upstream's tests/), PEER_PRODUCT (folder with the package llama2), PEER_NATIVE (folder
with its compiled _native*.so, optional), PEER_TOKENIZER (tokenizer.model), PEER_WORK (scratch: hub stand-in,
reports), PEER_VERSIONS_AS ("tokenizers=0.20.3": versions that an old transformers is told of; only its test
helpers are used), PEER_STRICT, PEER_RUNNER, PEER_ACT, PEER_NO_SKIPS: see README.md.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

WORK = Path(os.environ["PEER_WORK"])
UPSTREAM = Path(os.environ["PEER_UPSTREAM"])
PRODUCT = Path(os.environ["PEER_PRODUCT"])
MODEL_FILE = Path(os.environ["PEER_TOKENIZER"])
STRICT = bool(os.environ.get("PEER_STRICT"))
RUNNER = os.environ.get("PEER_RUNNER")
ACTIVATION = os.environ.get("PEER_ACT")
NO_SKIPS = bool(os.environ.get("PEER_NO_SKIPS"))
REPORT = WORK / os.environ.get("PEER_REPORT", "report.json")
PARTS = [
    "auto",
    "cache",
    "config",
    "generation.loop",
    "generation.config",
    "lora",
    "model",
    "runners.native",
    "outputs",
    "pipelines",
    "plain_network",
    "pretrained",
    "generation.processors",
    "generation.request",
    "rope",
    "generation.sampler",
    "generation.stopping",
    "generation.streamers",
    "tokenizer",
    "tokenizer.files",
]

os.environ["HF_HOME"] = str(WORK / "hf")
os.environ["HF_HUB_CACHE"] = str(WORK / "hf" / "hub")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
sys.path.insert(0, str(PRODUCT))
sys.path.insert(0, str(UPSTREAM))
sys.path.append(str(UPSTREAM / "utils"))


def _transformers() -> Any:
    """The library, told the versions of PEER_VERSIONS_AS while it is imported."""
    told = dict(pair.split("=") for pair in os.environ.get("PEER_VERSIONS_AS", "").split(",") if pair)
    real = importlib.metadata.version
    importlib.metadata.version = lambda name: told.get(name) or real(name)
    try:
        importlib.import_module("transformers")
        importlib.import_module("transformers.testing_utils")
    finally:
        importlib.metadata.version = real
    module: Any = sys.modules["transformers"]  # the package replaces its own entry
    # tests/pipelines would import a second transformers from upstream's src/.
    parts = importlib.import_module("transformers.utils.import_utils")
    parts.direct_transformers_import = module.utils.direct_transformers_import = lambda *_, **__: module
    return module


def _diffusers() -> None:
    """An empty stand-in: peft's test helpers import it."""
    if importlib.util.find_spec("diffusers") is not None:
        return

    def name_of(name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})

    module: Any = type(sys)("diffusers")
    module.__getattr__ = name_of
    sys.modules["diffusers"] = module


def _llama2() -> Any:
    module = importlib.import_module("llama2")
    if not Path(str(module.__file__)).is_relative_to(PRODUCT):
        raise SystemExit(f"llama2 was imported from {module.__file__}, not from PEER_PRODUCT={PRODUCT}")
    if os.environ.get("PEER_NATIVE"):
        module.__path__.append(os.environ["PEER_NATIVE"])
    for part in PARTS:
        importlib.import_module(f"llama2.{part}")
    return module


transformers: Any = _transformers()
_diffusers()
llama2: Any = _llama2()
V5 = int(transformers.__version__.split(".")[0]) >= 5
