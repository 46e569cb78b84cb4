"""accelerate's offloading runs: its hooks replace forward, so torch runs the model, module by module."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_ids, tiny_model

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("kind", ["cpu", "disk", "dispatch"])
def test_offloaded_models_answer(kind: str, tmp_path: Path) -> None:
    accelerate: Any = pytest.importorskip("accelerate")
    model, ids = tiny_model(torch.float32), tiny_ids(2, 7)
    settings: dict[str, Any] = {"max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        logits = model(ids).logits
    wanted = model.generate(ids, runner="torch", **settings)
    if kind == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif kind == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert model.device == torch.device("cpu")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
    with pytest.warns(UserWarning, match="not the native engine: the model's forward was replaced"):
        assert model.generate(ids, **settings).tolist() == wanted.tolist()
