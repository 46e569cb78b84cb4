"""One process of tests/engine/test_parallel.py: compares with one process.

torchrun ... parallel_worker.py FOLDER, or each process with parallel_worker.py FOLDER STORE RANK SIZE
"""

import sys
from pathlib import Path

import numpy as np
import torch

from llama2 import LlamaForCausalLM
from llama2.engine.blocks import BlockPool
from llama2.engine.engine import Engine
from llama2.engine.parallel import follow, join, load_part
from llama2.engine.plan_runners import PAGE
from llama2.engine.scheduler import ScheduledSequence, Scheduler
from llama2.engine.torch_plan_runner import torch_plan_runner

CPU = torch.device("cpu")
PROMPTS = [[5, 9, 33, 7, 21, 60, 2, 8, 90, 11] * 4, [1, 2, 3], [44]]


def logits_of(runner: object, pages: int) -> torch.Tensor:
    """Logits of a few mixed steps: prompts in chunks, decoding, guesses."""
    scheduler, rows = Scheduler(BlockPool(pages, PAGE), budget=16), []
    for prompt in PROMPTS:
        scheduler.submit(ScheduledSequence(list(prompt), len(prompt) + 9))
    for step in range(9):
        chunks = scheduler.plan()
        found = iter(runner.step(chunks, [None] * len(chunks)))  # type: ignore[attr-defined]
        for chunk in chunks:
            if chunk.wanted:
                rows.append(next(found))
            scheduler.commit(chunk, [(7 * step + len(rows)) % 90] if chunk.sampled else ())
            if chunk.sampled:
                chunk.sequence.draft = [3, 4]
    return torch.from_numpy(np.concatenate(rows))


def main(folder: Path, *given: str) -> None:
    place = join(CPU, given[0], *map(int, given[1:])) if given else join(CPU)
    model = load_part(folder, place, "float32")
    held = sum(p.numel() for p in model.parameters())
    if place.rank:
        follow(model)
        return
    whole = LlamaForCausalLM.from_pretrained(folder, dtype="float32")
    every = sum(p.numel() for p in whole.parameters())
    assert held < 0.9 * every, (held, every)
    runner = model.plan_runner(20)
    ours, theirs = logits_of(runner, 20), logits_of(torch_plan_runner(whole, 20), 20)
    worst = float((ours - theirs).abs().max() / theirs.abs().max())
    assert ours.shape == theirs.shape and worst < 1e-5, worst
    texts = []
    for one, pages in ((model, 20), (whole, 20)):
        with Engine(one, runner="auto" if one is model else "torch", cache_tokens=pages * PAGE) as engine:
            done = [engine.generate(PROMPTS, max_new_tokens=12, eos_token_id=None)]
            done.append(engine.generate(PROMPTS, max_new_tokens=12, eos_token_id=None, do_sample=True, seed=3))
        texts.append([[c.tokens for c in each] for each in done])
    assert texts[0] == texts[1]
    print(f"equal {worst:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
