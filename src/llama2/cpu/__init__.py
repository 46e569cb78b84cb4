"""The native CPU engine seen from Python: weights in kernel layout, and a whole step of the model in one call.

    weights = CpuWeights.from_gguf(GgufFile(path))     no torch anywhere; or .from_module(model), in place
    runner  = CpuRunner(weights)
    cache   = PagedCache(weights, tokens=4096)
    sequence = cache.sequence()
    logits  = runner.feed(sequence, prompt_ids)        float32 (vocabulary,)

`CpuRunner.step` is the runner contract: a packed batch of new tokens of several sequences over the paged cache.
`reference.py` is the same step in torch, the oracle. Without a compiled module `available()` is False and the first
use raises MissingDependencyError with the remedy.
"""

from llama2.compiled import OneOpenMpThread, available, default_threads, instruction_sets
from llama2.cpu.cache import KV_DTYPES, PAGE, CachedSequence, CacheView, KvDtype, PagedCache, bytes_per_value
from llama2.cpu.model import CpuModel
from llama2.cpu.packed_file import PackedFile
from llama2.cpu.packed_file import find as find_packed
from llama2.cpu.packed_file import write as write_packed
from llama2.cpu.runner import CpuRunner, check_precision
from llama2.cpu.shortlist import shortlist_margin, shortlists
from llama2.cpu.weights import CpuWeights

__all__ = [
    "KV_DTYPES",
    "PAGE",
    "CacheView",
    "CachedSequence",
    "CpuModel",
    "CpuRunner",
    "CpuWeights",
    "KvDtype",
    "OneOpenMpThread",
    "PackedFile",
    "PagedCache",
    "available",
    "bytes_per_value",
    "check_precision",
    "default_threads",
    "find_packed",
    "instruction_sets",
    "shortlist_margin",
    "shortlists",
    "write_packed",
]
