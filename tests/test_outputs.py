"""Outputs are dicts, tuples and pytrees of the fields that are there, as libraries take those of transformers apart."""

import copy
import pickle

import pytest
import torch
import torch.utils._pytree as pytree

from llama2.outputs import CausalLMOutputWithPast

LOSS, LOGITS = torch.tensor(1.5), torch.arange(6.0).view(1, 2, 3)


def output() -> CausalLMOutputWithPast:
    return CausalLMOutputWithPast(loss=LOSS, logits=LOGITS)


def test_a_dict_and_a_tuple() -> None:
    out = output()
    assert isinstance(out, dict) and list(out) == ["loss", "logits"] and len(out) == 2
    assert out["logits"] is out.logits is out[1] and out[1:][0] is LOGITS and out.to_tuple()[0] is LOSS
    assert "attentions" not in out and out.get("attentions") is None and out.attentions is None
    with pytest.raises(KeyError):
        out["attentions"]
    # transformers' Trainer: predictions are what is neither the loss nor past_key_values
    assert [value for name, value in out.items() if name not in ("loss", "past_key_values")] == [LOGITS]


def test_the_order_is_that_of_the_fields() -> None:
    full = CausalLMOutputWithPast(LOSS, LOGITS, "cache", (LOGITS,), (LOSS,))
    assert list(full) == ["loss", "logits", "past_key_values", "hidden_states", "attentions"] and full[2] == "cache"


def test_fields_that_are_set_later_keep_their_place() -> None:
    out = CausalLMOutputWithPast(logits=LOGITS)
    out.loss = LOSS
    assert list(out) == ["loss", "logits"] and out[0] is LOSS
    out["attentions"] = (LOGITS,)
    out.loss = None
    assert list(out) == ["logits", "attentions"] and out["attentions"] is out.attentions
    with pytest.raises(TypeError, match="set to None"):
        del out["logits"]


@pytest.mark.parametrize("again", [lambda o: dict(o), lambda o: ((k, v) for k, v in o.items())])
def test_built_again_from_a_mapping_or_pairs(again: object) -> None:
    """accelerate: type(out)({name: convert(value), ...}); DataParallel: type(out)((name, value) for ...)."""
    made = CausalLMOutputWithPast(again(output()))  # type: ignore[operator]
    assert made.loss is LOSS and made.logits is LOGITS and list(made) == ["loss", "logits"]


def test_a_tuple_as_the_first_field_stays_one() -> None:
    assert CausalLMOutputWithPast((LOSS, LOGITS)).loss == (LOSS, LOGITS)  # type: ignore[arg-type]


def test_pytree_copies_and_pickle() -> None:
    leaves, spec = pytree.tree_flatten(output())
    assert leaves[0] is LOSS and leaves[1] is LOGITS
    doubled = pytree.tree_unflatten([2 * leaf for leaf in leaves], spec)
    assert type(doubled) is CausalLMOutputWithPast and doubled.loss == 3 and list(doubled) == ["loss", "logits"]
    for same in (copy.deepcopy(output()), copy.copy(output()), pickle.loads(pickle.dumps(output()))):
        assert type(same) is CausalLMOutputWithPast and list(same) == ["loss", "logits"]
        assert torch.equal(same.logits, LOGITS)
