"""The exponential numbers of torch's CPU generator at some places, and the generator's state behind them."""

import numpy as np
import pytest
import torch

from llama2 import noise
from llama2.compiled import available, kernels
from llama2.generation.sampler import Sampler

needs_kernels = pytest.mark.skipif(not available() or not noise.is_known(), reason="torch draws by other means here")


@needs_kernels
@pytest.mark.parametrize("total", [1, 2, 311, 312, 313, 624, 5000])
@pytest.mark.parametrize("before", [0, 1, 2, 311, 312, 500])
def test_the_numbers_and_the_state_are_torchs(before: int, total: int) -> None:
    ours, theirs = (torch.Generator().manual_seed(7) for _ in range(2))
    for generator in (ours, theirs):
        if before:  # begins within the 624 words of a state, and for odd numbers of words within a number
            torch.empty(before).exponential_(generator=generator)
            torch.randint(5, (before,), generator=generator, dtype=torch.int32)
    want = torch.empty(total).exponential_(generator=theirs).tolist()
    places = sorted({0, total // 2, total - 1, *range(0, total, 97)})
    found, undo = noise.some_of(ours, places, total)
    assert found == [want[place] for place in places]
    assert torch.equal(ours.get_state(), theirs.get_state())
    undo()
    assert torch.empty(total).exponential_(generator=ours).tolist() == want


@needs_kernels
def test_no_place_moves_the_generator_on_as_well() -> None:
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    assert noise.some_of(ours, [], 400)[0] == []
    torch.empty(400).exponential_(generator=theirs)
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize("margin", [1e-6, 1.0])
def test_a_draw_among_some_is_multinomials(margin: float) -> None:
    """With a margin of 1 every race is unsure: `draw` then uses the same numbers."""
    p = torch.zeros(2, 3000)
    ids = [[5, 17, 1200, 2999], [3, 4, 2000]]
    for row, chosen in zip(p, ids, strict=True):
        row[chosen] = torch.arange(1.0, len(chosen) + 1) / sum(range(1, len(chosen) + 1))
    ours, theirs = (torch.Generator().manual_seed(11) for _ in range(2))
    sampler = Sampler(True, ours)
    for _ in range(20):
        rows = [(chosen, row[chosen].tolist()) for row, chosen in zip(p, ids, strict=True)]
        found = sampler.among(rows, 3000, margin)
        assert (found is None) == (margin == 1.0)
        found = sampler.draw(p).tolist() if found is None else found
        assert found == torch.multinomial(p, 1, generator=theirs).squeeze(1).tolist()
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.skipif(not available(), reason="the native engine is not built")
def test_what_cannot_be_is_refused() -> None:
    state = torch.Generator().get_state().numpy()
    places = np.array([1, 1])
    for wrong, total, at, message in (
        (state[:100].copy(), 5, places[:1], "state of torch"),
        (np.full_like(state, 255), 5, places[:1], "state of torch"),
        (state.copy(), 5, places, "places ascend"),
        (state.copy(), 1, places[:1], "places ascend"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels().exponentials(wrong, total, at)
