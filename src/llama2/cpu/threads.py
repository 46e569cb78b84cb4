"""The compiled module and its threads, under the name that the engine and its users know; see `llama2.compiled`."""

from llama2.compiled import OneOpenMpThread, available, default_threads, instruction_sets, make_pool, native

__all__ = ["OneOpenMpThread", "available", "default_threads", "instruction_sets", "make_pool", "native"]
