"""The model against the float64 reference, and the rungs of the equivalence ladder that need no other module."""

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from tiny import VARIANTS, tiny_config, tiny_ids, tiny_model
from tolerance import BFLOAT16, FLOAT64

from llama2 import (
    DynamicCache,
    InputError,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MissingDependencyError,
    StaticCache,
)
from llama2.attention import Mask, eager, flash_rows
from llama2.model import causal_lm_loss

no_grad = torch.no_grad()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_reference(variant: str, implementation: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    model.set_attn_implementation(implementation)
    ids = tiny_ids(tokens=40)
    truth = reference.forward(model.state_dict(), model.config, ids[0])
    with no_grad:
        logits = model(ids).logits[0]
    assert truth.abs().max() > 1
    assert (logits - truth).abs().max() < FLOAT64


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_pretraining_tp_sums_slices(parts: int) -> None:
    model = tiny_model(pretraining_tp=parts, attention_bias=True, mlp_bias=True)
    ids = tiny_ids()
    calls = []
    original = torch.nn.functional.linear
    with no_grad, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", lambda *a: calls.append(a[1].shape) or original(*a))
        logits = model(ids).logits
    # q, k, v, o, gate, up, down of both layers and the head, each in `parts` products
    assert len(calls) == (7 * 2 + 1) * parts
    truth = reference.forward(model.state_dict(), model.config, ids[0])
    assert (logits[0] - truth).abs().max() < FLOAT64


def test_positions_are_seen() -> None:
    """RoPE is relative: no logit test sees a uniform shift, so the positions that reach the rotation are read here."""
    model = tiny_model()
    seen: list[torch.Tensor] = []
    model.model.rotary_emb.register_forward_hook(lambda _m, args, _o: seen.append(args[1]))
    with no_grad:
        cache = model(tiny_ids(tokens=5)).past_key_values
        model(tiny_ids(tokens=3), past_key_values=cache)
        model(tiny_ids(tokens=2), position_ids=torch.tensor([[7, 9]]))
    assert [s.tolist() for s in seen] == [[[0, 1, 2, 3, 4]], [[5, 6, 7]], [[7, 9]]]


def test_rotation_stays_float32_after_half() -> None:
    model = LlamaModel(tiny_config(max_position_embeddings=4096)).half()
    cos, sin = model.rotary_emb(torch.zeros(1, dtype=torch.float16), torch.tensor([[4001]]))
    exact = torch.tensor([4001.0 * 10000 ** (-2 * i / 16) for i in range(8)], dtype=torch.float64)
    assert cos.dtype == sin.dtype == torch.float32
    assert (cos[0, 0, :8].double() - exact.cos()).abs().max() < 5e-4  # 4001 rad in float32; float16 would be off by 1


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("cache_type", ["dynamic", "static"])
def test_cached_equals_full(implementation: str, cache_type: str) -> None:
    model = tiny_model()
    model.set_attn_implementation(implementation)
    ids = tiny_ids(rows=2, tokens=20)
    static = StaticCache(model.config, batch_size=2, max_cache_len=24, dtype=torch.float64)
    cache = static if cache_type == "static" else DynamicCache()
    with no_grad:
        full = model(ids).logits
        pieces = [model(part, past_key_values=cache).logits for part in ids.split([7, 5, 1, 1, 6], dim=1)]
    assert (torch.cat(pieces, 1) - full).abs().max() < FLOAT64
    assert cache.get_seq_length() == 20


def test_cache_crop_reorder_and_legacy() -> None:
    model = tiny_model()
    ids = tiny_ids(rows=2, tokens=10)
    with no_grad:
        full = model(ids).logits
        cache = model(ids).past_key_values
        cache.crop(6)
        assert (model(ids[:, 6:], past_key_values=cache).logits - full[:, 6:]).abs().max() < FLOAT64
        cache.crop(-4)
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = model(ids.flip(0)[:, 6:], past_key_values=cache).logits
        assert (swapped - full.flip(0)[:, 6:]).abs().max() < FLOAT64
        legacy = model(ids[:, :6]).past_key_values.to_legacy_cache()
        out = model(ids[:, 6:], past_key_values=legacy)
        assert isinstance(out.past_key_values, tuple)
        assert (out.logits - full[:, 6:]).abs().max() < FLOAT64


def test_gradients_flow_through_a_growing_cache() -> None:
    model = tiny_model()
    ids = tiny_ids(tokens=8)
    model(ids).logits[0, -1].square().sum().backward()
    straight = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    cache = DynamicCache()
    for part in ids.split([3, 4, 1], dim=1):
        logits = model(part, past_key_values=cache).logits
    logits[0, -1].square().sum().backward()
    for one, other in zip(straight, (p.grad for p in model.parameters()), strict=True):
        assert (one - other).abs().max() <= 1e-10 * one.abs().max()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_single_rows(implementation: str, side: str) -> None:
    model = tiny_model()
    model.set_attn_implementation(implementation)
    short, long = tiny_ids(tokens=5), tiny_ids(tokens=9, seed=2)
    pad = torch.zeros((1, 4), dtype=torch.long)
    row = torch.cat((pad, short) if side == "left" else (short, pad), 1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0] = (row[0] != 0).long()
    with no_grad:
        single, other = model(short).logits[0], model(long).logits[0]
        for kept in (mask, mask.bool(), mask.double()):
            both = model(torch.cat((row, long)), attention_mask=kept).logits
            assert (both[0][mask[0].bool()] - single).abs().max() < FLOAT64
            assert (both[1] - other).abs().max() < FLOAT64
            assert both.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_see_nothing_are_finite(implementation: str, dtype: torch.dtype) -> None:
    model = tiny_model(dtype)
    model.set_attn_implementation(implementation)
    mask = torch.zeros(2, 6, dtype=torch.long)
    mask[1, 3:] = 1
    with no_grad:
        assert model(tiny_ids(2, 6), attention_mask=mask).logits.isfinite().all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_4d_mask_packs_sequences_that_share_a_prefix(implementation: str) -> None:
    """Prefix a b, then two continuations c d and e f in one row, apart by mask and positions."""
    model = tiny_model()
    model.set_attn_implementation(implementation)
    prefix, one, two = tiny_ids(tokens=2), tiny_ids(tokens=2, seed=3), tiny_ids(tokens=2, seed=4)
    ids = torch.cat((prefix, one, two), 1)
    sees = torch.ones(6, 6).tril().bool()
    sees[4:, 2:4] = False
    positions = torch.tensor([[0, 1, 2, 3, 2, 3]])
    additive = torch.zeros(1, 1, 6, 6, dtype=torch.float64).masked_fill(~sees, torch.finfo(torch.float64).min)
    with no_grad:
        rows = [model(torch.cat((prefix, x), 1)).logits[0, 2:] for x in (one, two)]
        for mask in (sees[None, None], additive):
            packed = model(ids, attention_mask=mask, position_ids=positions).logits[0]
            assert (packed[2:] - torch.cat(rows)).abs().max() < FLOAT64


def test_4d_integer_mask_is_refused() -> None:
    with pytest.raises(InputError, match="ambiguous"):
        tiny_model()(tiny_ids(tokens=4), attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.long))


def test_flash_rows_unpads_like_eager() -> None:
    """The padding logic around a flash kernel, with the eager oracle as the kernel."""

    def kernel(q, k, v, causal, scale, dropout):
        return eager(q, k, v, Mask(None, causal), scale, dropout)[0]

    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, 6, 16, dtype=torch.float64) for heads in (4, 2, 2))
    padding = torch.ones(3, 6, dtype=torch.bool)
    padding[0, :2], padding[1, 4:] = False, False
    allowed = torch.ones(6, 6).tril().bool()[None, None] & padding[:, None, None, :]
    truth = eager(q, k, v, Mask(allowed, True), 0.25)[0]
    out = flash_rows(kernel, q, k, v, Mask(None, True, padding), 0.25)
    real = padding[:, None, :, None].expand_as(out)
    assert (out[real] - truth[real]).abs().max() < FLOAT64
    last = flash_rows(kernel, q[:, :, -1:], k, v, Mask(None, False, padding), 0.25)
    assert (last[0] - truth[0, :, -1:]).abs().max() < FLOAT64


def test_flash_attention_2_without_a_gpu_names_the_remedy() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(MissingDependencyError, match="attn_implementation='sdpa'"):
        tiny_model().set_attn_implementation("flash_attention_2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_near_float64(dtype: torch.dtype) -> None:
    ids = tiny_ids()
    with no_grad:
        truth = tiny_model()(ids).logits
        low = tiny_model(dtype)(ids).logits
    assert low.dtype == dtype
    assert (low.double() - truth).norm() / truth.norm() < BFLOAT16


def test_hidden_states_and_attentions() -> None:
    model = tiny_model()
    ids = tiny_ids(2, 7)
    with no_grad:
        out = model(ids, output_hidden_states=True, output_attentions=True)
        plain = model(ids)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    assert (model.lm_head(out.hidden_states[-1]) - plain.logits).abs().max() < FLOAT64
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 7, 7)] * 2
    assert (out.attentions[0].sum(-1) - 1).abs().max() < FLOAT64
    assert list(plain.keys()) == ["logits", "past_key_values"]
    as_tuple = model(ids, return_dict=False)
    assert torch.equal(as_tuple[0], plain[0])


def test_logits_to_keep() -> None:
    model = tiny_model()
    ids = tiny_ids(2, 7)
    with no_grad:
        full = model(ids).logits
        assert (model(ids, logits_to_keep=2).logits - full[:, -2:]).abs().max() < FLOAT64
        assert (model(ids, num_logits_to_keep=1).logits - full[:, -1:]).abs().max() < FLOAT64
        picked = torch.tensor([1, 4])
        assert (model(ids, logits_to_keep=picked).logits - full[:, picked]).abs().max() < FLOAT64


def test_loss_semantics() -> None:
    model = tiny_model()
    ids = tiny_ids(2, 6)
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(ids, labels=labels)
    log_probs = out.logits.log_softmax(-1)
    targets = [(0, 3), (0, 4), *((1, t) for t in range(5))]
    by_hand = torch.stack([-log_probs[b, t, ids[b, t + 1]] for b, t in targets])
    assert (out.loss - by_hand.mean()).abs() < FLOAT64
    assert (model(ids, labels=labels, num_items_in_batch=10).loss - by_hand.sum() / 10).abs() < FLOAT64
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(ids, shift_labels=shifted).loss, out.loss)
    empty = model(ids, labels=torch.full_like(ids, -100)).loss
    assert empty == 0.0
    assert causal_lm_loss(out.logits.bfloat16(), labels).dtype == torch.float32
    with pytest.raises(InputError, match="one entry per input token"):
        model(ids, labels=labels, logits_to_keep=1)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = tiny_model().train()
    ids = tiny_ids(2, 6)
    model(ids, labels=ids).loss.backward()
    straight = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    out = model(ids, labels=ids)
    assert out.past_key_values is None
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, straight[name]), name


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([5, 6, 7, 8, 9, 0, 0], 4),
        ([0, 0, 5, 6, 7, 8, 9], 6),
        ([5, 6, 7, 8, 9, 4, 3], 6),
        ([5, 6, 7, 0, 9, 4, 3], 6),
        ([0] * 7, 0),
    ],
)
def test_classifier_pools_the_last_real_token(rows: list[int], expected: int) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(pad_token_id=0, num_labels=3)).double().eval()
    ids = torch.tensor([rows, [5] * 7])
    with no_grad:
        states = model.model(ids).last_hidden_state
        logits = model(ids).logits
    assert logits.shape == (2, 3)
    assert (logits[0] - model.score(states[0, expected])).abs().max() < FLOAT64


def test_classifier_prefers_the_mask_and_needs_one_of_both() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(num_labels=3)).double().eval()
    ids, mask = tiny_ids(2, 6), torch.ones(2, 6)
    mask[0, 4:] = 0
    with no_grad:
        states = model.model(ids, attention_mask=mask).last_hidden_state
        logits = model(ids, attention_mask=mask).logits
    assert (logits[0] - model.score(states[0, 3])).abs().max() < FLOAT64
    with pytest.raises(InputError, match="no padding token is defined"):
        model(ids)


@pytest.mark.parametrize(
    ("labels", "count", "problem"),
    [
        (torch.tensor([0.3, -1.0]), 1, "regression"),
        (torch.tensor([2, 0]), 3, "single_label_classification"),
        (torch.tensor([[1.0, 0, 1], [0, 0, 1]]), 3, "multi_label_classification"),
    ],
)
def test_classifier_losses(labels: torch.Tensor, count: int, problem: str) -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(tiny_config(num_labels=count, pad_token_id=0)).double().eval()
    out = model(tiny_ids(2, 6), labels=labels)
    z, y = out.logits, labels.double()
    by_hand = {
        "regression": lambda: ((z[:, 0] - y) ** 2).mean(),
        "single_label_classification": lambda: -z.log_softmax(-1)[torch.arange(2), labels].mean(),
        "multi_label_classification": lambda: -(y * z.sigmoid().log() + (1 - y) * (-z).sigmoid().log()).mean(),
    }[problem]()
    assert model.config.problem_type == problem
    assert (out.loss - by_hand).abs() < FLOAT64


def test_readable_errors() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match=r"contains 97 but ids run from 0 to 96"):
        model(torch.tensor([[1, 97]]))
    with pytest.raises(InputError, match="exactly one of input_ids or inputs_embeds"):
        model()
    with pytest.raises(InputError, match="covers 3 positions but cache and new tokens together are 5"):
        model(tiny_ids(tokens=5), attention_mask=torch.ones(1, 3))
    with pytest.raises(InputError, match="static cache of 4"):
        model(tiny_ids(tokens=5), past_key_values=StaticCache(model.config, 1, 4, dtype=torch.float64))


class FakeTokenizer:
    pad_token: str | None = None

    @property
    def pad_token_id(self) -> int | None:
        return None if self.pad_token is None else 97

    def add_special_tokens(self, tokens: dict[str, str]) -> int:
        self.pad_token = tokens["pad_token"]
        return 1

    def __len__(self) -> int:
        return 97 if self.pad_token is None else 98


def test_pad_token_recipe_in_one_call() -> None:
    model, tokenizer = tiny_model(), FakeTokenizer()
    before = model.model.embed_tokens.weight.clone()
    assert model.add_pad_token(tokenizer) == 97
    weight = model.model.embed_tokens.weight
    assert torch.equal(weight[:97], before)
    assert weight.shape[0] == model.lm_head.weight.shape[0] == model.config.vocab_size == 98
    assert not weight[97].any()
    assert (
        model.config.pad_token_id == model.generation_config.pad_token_id == model.model.embed_tokens.padding_idx == 97
    )
    model(torch.tensor([[5, 97, 6]]), labels=torch.tensor([[5, 97, 6]])).loss.backward()
    assert not weight.grad[97].any()
    assert weight.grad[5].any()


def test_resize_keeps_rows_and_ties() -> None:
    for tied in (False, True):
        model = tiny_model(tie_word_embeddings=tied)
        old = model.lm_head.weight.clone()
        model.resize_token_embeddings(100, pad_to_multiple_of=64)
        assert model.lm_head.weight.shape[0] == model.config.vocab_size == 128
        assert torch.equal(model.lm_head.weight[:97], old)
        assert torch.allclose(model.lm_head.weight[97:], old.mean(0), atol=1e-6)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        model.resize_token_embeddings(50)
        assert torch.equal(model.lm_head.weight, old[:50])


def test_fresh_weights_follow_the_configuration() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(initializer_range=0.02, pad_token_id=3, mlp_bias=True, vocab_size=1000))
    assert not model.model.embed_tokens.weight[3].any()
    assert abs(model.lm_head.weight.std() - 0.02) < 5e-4
    assert not model.model.layers[0].mlp.gate_proj.bias.any()
    assert model.training


@pytest.mark.parametrize("path", ["layers.1", "layers.1.self_attn"])
@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: (x, None)], ids=["states", "tuple", "pair"])
def test_hooks_return_states_alone_or_in_a_tuple(path: str, form: Callable[[torch.Tensor], Any]) -> None:
    model, ids = tiny_model(), torch.tensor([[1, 5, 9]])
    module = model.model.get_submodule(path)
    with no_grad:
        handle = module.register_forward_hook(lambda _module, _args, out: (out[0] * -3, *out[1:]))
        expected = model(ids).logits
        handle.remove()
        module.register_forward_hook(lambda _module, _args, out: form(out[0] * -3))
        assert torch.equal(model(ids).logits, expected)
