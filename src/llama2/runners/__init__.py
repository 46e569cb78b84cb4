"""Runners compute a step: torch, CUDA graphs, the native engine, all behind one contract."""
