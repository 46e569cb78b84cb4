"""Reordered bfloat16 weights give the linear's own result and never go stale."""

import pytest
import torch
from tiny import tiny_ids, tiny_model

from llama2.prepack import prepacked

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 products in oneDNN"
)


@needs_bf16
def test_same_logits_and_no_stale_copy() -> None:
    model, ids = tiny_model(torch.bfloat16, attention_bias=True), tiny_ids()
    with torch.no_grad():
        for scale in (1.0, 0.5):
            model.lm_head.weight.mul_(scale)  # in place: same address, new version
            plain = model(ids).logits
            with prepacked(model):
                assert "forward" in vars(model.lm_head)
                packed = model(ids).logits
            assert "forward" not in vars(model.lm_head)
            assert (plain.float() - packed.float()).abs().max() <= 0.02 * plain.float().abs().max()
        assert plain.abs().max() > 0.5


@needs_bf16
def test_leaves_training_and_gradients_alone() -> None:
    model = tiny_model(torch.bfloat16)
    with prepacked(model):
        assert "forward" not in vars(model.lm_head)
    with torch.no_grad(), prepacked(model.train()):
        assert "forward" not in vars(model.lm_head)
