"""torch's own: compile of forward, and export."""

from pathlib import Path

import torch
from product import IDS, tiny_model

MASK = torch.ones_like(IDS)
MASK[0, :3] = 0


@torch.no_grad()
def case_compile_with_a_mask(folder: Path) -> None:
    model = tiny_model(torch.float32)
    compiled = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    for how in ({}, {"attention_mask": MASK}):
        want = model(IDS, **how).logits
        torch.testing.assert_close(compiled(IDS, **how).logits, want, rtol=0, atol=1e-4)


@torch.no_grad()
def case_export_with_a_mask(folder: Path) -> None:
    model = tiny_model(torch.float32)
    program = torch.export.export(model, (IDS,), {"attention_mask": MASK, "use_cache": False})
    found = program.module()(IDS, attention_mask=MASK, use_cache=False)
    torch.testing.assert_close(found.logits, model(IDS, attention_mask=MASK).logits, rtol=0, atol=1e-4)
