"""Packed rows: no document sees another, however the caller tells where they begin."""

import pytest
import torch
from tiny import tiny_model

from llama2.attention import Mask, eager, flash_rows, make_mask
from llama2.documents import by_lengths, by_positions, positions_within
from llama2.errors import InputError

LENGTHS = (5, 1, 7, 3)
TOKENS = sum(LENGTHS)
BEGINS = torch.tensor([0, 5, 6, 13, 16], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
NUMBERS = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))[None]
IDS = torch.arange(3, 3 + TOKENS)[None]
TOLD = {
    "cu_seq_lens_q": {"cu_seq_lens_q": BEGINS, "cu_seq_lens_k": BEGINS, "max_length_q": 7, "max_length_k": 7},
    "cu_seq_lens_k alone": {"cu_seq_lens_k": BEGINS},
    "seq_idx": {"seq_idx": NUMBERS},
    "position_ids": {"position_ids": POSITIONS},
    "all three": {"cu_seq_lens_q": BEGINS.tolist(), "seq_idx": NUMBERS, "position_ids": POSITIONS},
    "beside a 2D mask": {"cu_seq_lens_q": BEGINS, "attention_mask": torch.ones(1, TOKENS)},
}


def apart(model: torch.nn.Module) -> torch.Tensor:
    """The logits of the documents, each run by itself."""
    return torch.cat([model(ids).logits for ids in IDS.split(LENGTHS, 1)], 1)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD)
def test_a_packed_row_is_its_documents(told: dict[str, object], implementation: str) -> None:
    model = tiny_model(torch.float64).eval()
    model.set_attn_implementation(implementation)
    packed = model(IDS, **told).logits
    torch.testing.assert_close(packed, apart(model), rtol=0, atol=1e-12)
    assert (packed - model(IDS).logits).abs().max() > 1e-3  # one document is another thing


@pytest.mark.parametrize("kind", ["LlamaModel", "LlamaForTokenClassification"])
def test_other_classes_take_the_same(kind: str) -> None:
    import llama2

    torch.manual_seed(0)
    model = getattr(llama2, kind)(tiny_model(torch.float64).config).double().eval()
    packed = model(IDS, position_ids=POSITIONS)[0]
    alone = torch.cat([model(ids)[0] for ids in IDS.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-12)


def test_rows_of_a_batch_are_packed_each_in_its_way() -> None:
    model = tiny_model(torch.float64).eval()
    ids, positions = IDS.expand(2, -1), torch.stack((POSITIONS[0], torch.arange(TOKENS)))
    found = model(ids, position_ids=positions).logits
    torch.testing.assert_close(found[:1], apart(model), rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1:], model(IDS).logits, rtol=0, atol=1e-12)


def test_gradients_stay_within_a_document() -> None:
    model = tiny_model(torch.float64)
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, position_ids=POSITIONS, use_cache=False).logits
    logits[0, 6:13].sum().backward()
    moved = embedded.grad[0].abs().sum(-1) > 0
    assert moved.tolist() == [False] * 6 + [True] * 7 + [False] * 3


@pytest.mark.parametrize(
    "positions",
    [
        list(range(9)),  # one document
        list(range(4, 13)),  # begins later
        [0, 1, 2, 5, 6, 7, 8, 9, 10],  # a gap
        [1, 1, 1, 0, 1, 2, 3, 4, 5],  # padding on the left
        [0] * 9,  # everything at one place
        [0, 1, 2, 3, 4, 1, 1, 1, 1],  # padding on the right
        [3, 0, 4, 1, 5, 2, 6, 7, 8],
    ],
)
def test_positions_that_are_no_documents(positions: list[int]) -> None:
    assert by_positions(torch.tensor([positions]), traced=False) is None
    assert (by_positions(torch.tensor([positions]), traced=True) == 0).all()


def test_numbers_from_positions_and_back() -> None:
    assert torch.equal(by_positions(POSITIONS, traced=False), NUMBERS)
    assert torch.equal(by_positions(POSITIONS, traced=True), NUMBERS)
    assert torch.equal(positions_within(NUMBERS), POSITIONS)
    assert positions_within(torch.tensor([[7, 7, 7], [2, 9, 9]])).tolist() == [[0, 1, 2], [0, 0, 1]]
    late = torch.tensor([[3, 4, 0, 1]])  # a document whose beginning lies in another row
    assert by_positions(late, traced=False).tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    "kwargs, what",
    [
        ({"cu_seq_lens_q": [0, 5, 6]}, "up from 0 to 16"),
        ({"cu_seq_lens_q": [1, 16]}, "up from 0"),
        ({"cu_seq_lens_q": [0, 9, 4, 16]}, r"\[0, 9, 4, 16\]"),
        ({"cu_seq_lens_q": torch.zeros(2, 2)}, r"shape \(2, 2\)"),
        ({"cu_seq_lens_q": [0, 16], "cu_seq_lens_k": [0, 20]}, "cu_seq_lens_k differs"),
        ({"seq_idx": torch.zeros(1, 3)}, r"seq_idx has shape \(1, 3\)"),
        ({"seq_idx": NUMBERS, "attention_mask": torch.ones(1, 1, TOKENS, TOKENS).bool()}, "4D attention_mask"),
    ],
)
def test_what_does_not_cut_the_row_is_refused(kwargs: dict[str, object], what: str) -> None:
    with pytest.raises(InputError, match=what):
        tiny_model(torch.float32)(IDS, **kwargs)


def test_rows_and_cached_tokens_are_refused() -> None:
    model = tiny_model(torch.float32)
    with pytest.raises(InputError, match="for 2 rows"):
        by_lengths({"cu_seq_lens_q": BEGINS}, 2, TOKENS, torch.device("cpu"))
    cache = model(IDS[:, :4]).past_key_values
    with pytest.raises(InputError, match="empty cache"):
        model(IDS, past_key_values=cache, cu_seq_lens_q=BEGINS)


def test_generate_takes_one_prompt_a_row() -> None:
    model = tiny_model(torch.float32).eval()
    with pytest.warns(UserWarning, match="cu_seq_lens_q has no effect here: generate"):
        model.generate(IDS, max_new_tokens=1, do_sample=False, cu_seq_lens_q=BEGINS)


def test_generate_reads_a_prompt_as_one_document_with_and_without_a_cache() -> None:
    model = tiny_model(torch.float32).eval()
    settings = {
        "max_new_tokens": 2,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
        "runner": "torch",
    }
    cached, without = (model.generate(IDS, position_ids=POSITIONS, use_cache=use, **settings) for use in (True, False))
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(without.logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_a_flash_kernel_gets_each_document(padded: bool) -> None:
    """The kernel itself is CUDA's; here it is `eager` without a mask, which must be called with one document a time."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, TOKENS, 8, dtype=torch.float64)
    keep = torch.ones(2, TOKENS, dtype=torch.bool)
    if padded:
        keep[1, :2] = False
    numbers = torch.stack((NUMBERS[0], (torch.arange(TOKENS) > 8).long()))
    given = keep if padded else None
    flash = make_mask(given, TOKENS, 0, TOKENS, q.device, None, "flash_attention_2", numbers)
    dense = make_mask(given, TOKENS, 0, TOKENS, q.device, None, "eager", numbers)
    assert flash.allowed is None

    def kernel(q, k, v, causal, scale, dropout):
        return eager(q, k, v, Mask(None, causal), scale, dropout)[0]

    found = flash_rows(kernel, q, k, v, flash, 0.3)
    wanted = eager(q, k, v, dense, 0.3)[0] * keep[:, None, :, None]
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_compiled_and_exported_rows_are_packed_too() -> None:
    model = tiny_model(torch.float64).eval()
    model.config.use_cache = False

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return self.model(ids, position_ids=positions).logits

    with torch.no_grad():
        exported = torch.export.export(Logits(), (IDS, torch.arange(TOKENS)[None]), strict=False).module()
        torch.testing.assert_close(exported(IDS, POSITIONS), apart(model), rtol=0, atol=1e-12)
        torch.testing.assert_close(exported(IDS, torch.arange(TOKENS)[None]), model(IDS).logits, rtol=0, atol=1e-12)
