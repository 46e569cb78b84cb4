"""Gradients of checkpointed layers are those of the forward pass, whatever hooks were there meanwhile."""

import pytest
import torch
from tiny import tiny_ids, tiny_model

IDS = tiny_ids(2, 8)


def gradients(checkpointed: bool, use_reentrant: bool = False, on: str = "mlp.up_proj") -> dict[str, torch.Tensor]:
    model = tiny_model().train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
    module = model.get_submodule(f"model.layers.0.{on}")
    before = module.register_forward_pre_hook(lambda _, args, kwargs: ((2 * args[0],), kwargs), with_kwargs=True)
    after = module.register_forward_hook(lambda _, args, out: 0.5 * out.sin())
    loss = model(IDS, labels=IDS).loss
    before.remove()
    after.remove()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_hooks_of_the_forward_pass_count(use_reentrant: bool) -> None:
    want, got = gradients(False), gradients(True, use_reentrant)
    assert want.keys() == got.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, msg=name)


def test_the_hooks_of_now_are_put_back() -> None:
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    loss = model(IDS, labels=IDS).loss
    calls: list[int] = []
    module = model.get_submodule("model.layers.1.mlp")
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    loss.backward()
    assert calls == [] and len(module._forward_hooks) == 1
    model(IDS)
    assert calls == [1]
    handle.remove()
