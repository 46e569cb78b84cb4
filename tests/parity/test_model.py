"""Models and configurations beside the newest transformers, through files that one saved and the other loads."""

from pathlib import Path

import pytest
import torch
from tiny import VARIANTS, tiny_config, tiny_ids, tiny_model
from tolerance import FLOAT32

from llama2 import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("variant", VARIANTS)
def test_our_files_load_in_transformers(variant: str, tmp_path: Path) -> None:
    ours = tiny_model(torch.float32, **VARIANTS[variant])
    ours.save_pretrained(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.dtype == torch.float32
    ids = tiny_ids(2, 40)
    with torch.no_grad():
        one, other = ours(ids).logits, theirs(ids).logits
    assert other.abs().max() > 1
    assert (one - other).abs().max() < FLOAT32


@pytest.mark.parametrize("variant", VARIANTS)
def test_their_files_load_here(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig.from_dict({**tiny_config(**VARIANTS[variant]).to_dict(), "initializer_range": 0.3})
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = tiny_ids(2, 40)
    with torch.no_grad():
        one, other = ours(ids).logits, theirs(ids).logits
    assert other.abs().max() > 1
    assert (one - other).abs().max() < FLOAT32


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "pad_token_id": 3, "attention_bias": True}])
def test_the_same_seed_draws_the_same_weights(changes: dict) -> None:
    torch.manual_seed(7)
    ours = LlamaForCausalLM(tiny_config(**changes)).state_dict()
    torch.manual_seed(7)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig.from_dict(tiny_config(**changes).to_dict())
    ).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_forward_outputs() -> None:
    ours = tiny_model(torch.float32)
    config = transformers.LlamaConfig.from_dict(ours.config.to_dict())
    config._attn_implementation = "eager"
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = tiny_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    # Rows that see nothing get zeros here and an average there, so no target stands on the padding.
    labels = ids.masked_fill((ids % 3 == 0) | (mask == 0), -100)
    kwargs = {"attention_mask": mask, "labels": labels, "output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        one, other = ours(ids, **kwargs), theirs(ids, **kwargs)
        assert (ours(ids, labels=labels, num_items_in_batch=5).loss
                - theirs(ids, labels=labels, num_items_in_batch=5).loss).abs() < FLOAT32  # fmt: skip
    # 5.24 calls the field `cache` and still reads it as past_key_values.
    assert list(one.keys()) == ["past_key_values" if name == "cache" else name for name in list(other.keys())]
    assert one.past_key_values.get_seq_length() == other.past_key_values.get_seq_length() == 9
    assert (one.loss - other.loss).abs() < FLOAT32
    real = mask.bool()
    for a, b in zip(one.hidden_states, other.hidden_states, strict=True):
        assert (a - b)[real].abs().max() < FLOAT32
    for a, b in zip(one.attentions, other.attentions, strict=True):
        assert (a - b).transpose(1, 2)[real].abs().max() < FLOAT32


@pytest.mark.parametrize("count", [1, 3])
def test_classifier(count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_config(num_labels=count, pad_token_id=0, initializer_range=0.2)
    ours = LlamaForSequenceClassification(config).eval()
    ours.save_pretrained(tmp_path)
    theirs = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = tiny_ids(3, 8)
    ids[1, 5:] = 0
    labels = torch.tensor([0.5, 1.0, -2.0]) if count == 1 else torch.tensor([0, 2, 1])
    with torch.no_grad():
        one, other = ours(ids, labels=labels), theirs(ids, labels=labels)
    assert (one.logits - other.logits).abs().max() < FLOAT32
    assert (one.loss - other.loss).abs() < FLOAT32
    assert ours.config.problem_type == theirs.config.problem_type


def test_configurations_agree_both_ways(tmp_path: Path) -> None:
    for number, changes in enumerate(VARIANTS.values()):
        ours = tiny_config(**changes, dtype="bfloat16")
        ours.save_pretrained(tmp_path / f"ours{number}")
        theirs = transformers.LlamaConfig.from_pretrained(tmp_path / f"ours{number}")
        assert theirs.rope_parameters == ours.rope_parameters
        assert theirs.dtype == torch.bfloat16
        theirs.save_pretrained(tmp_path / f"theirs{number}")
        again = LlamaConfig.from_pretrained(tmp_path / f"theirs{number}")
        for field in ("hidden_size", "num_key_value_heads", "head_dim", "rope_parameters", "dtype", "rms_norm_eps"):
            assert getattr(again, field) == getattr(ours, field), field
