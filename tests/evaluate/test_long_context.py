"""Needles at their place, the loss by position by its definition, and the pictures."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
from bytewise import write_tokenizer
from tiny import tiny_ids, tiny_model

from llama2 import AutoTokenizer
from llama2.errors import InputError
from llama2.evaluate import long_context, picture
from llama2.evaluate.perplexity import window_scores

TEXT = "Nothing is hidden in this text, whatever one reads into it. " * 20


@pytest.mark.parametrize("length", [300, 401])
def test_needles_are_as_long_and_as_deep_as_asked(tmp_path: Path, length: int) -> None:
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    found = long_context.needles(tokenizer, TEXT, [length], [0.0, 0.5, 1.0], 2)
    assert len(found) == 6
    for prompt in found:
        text = tokenizer.decode(prompt.tokens)
        assert len(prompt.tokens) == length and text.count(f"is {prompt.number}") == 1
        room = length - len(text) + len(TEXT)  # tokens are bytes here
        place, question = text.index("\nRemember this"), text.index("\nQuestion")
        before, whole = place, question - len(text[place : text.index(f"{prompt.number}.\n") + 6])
        assert before == round(prompt.depth * whole) and room > 0
    again = long_context.needles(tokenizer, TEXT, [length], [0.0, 0.5, 1.0], 2)
    assert found == again and found != long_context.needles(tokenizer, TEXT, [length], [0.0, 0.5, 1.0], 2, seed=1)


@pytest.mark.parametrize(
    ("lengths", "depths", "trials", "said"),
    [([100], [0.5], 1, "at least"), ([5000], [0.5], 1, "longer --text"), ([300], [1.5], 1, "between 0 and 1"),
     ([300], [0.5], 0, "at least 1")],
)  # fmt: skip
def test_needles_that_cannot_be(
    tmp_path: Path, lengths: list[int], depths: list[float], trials: int, said: str
) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(InputError, match=said):
        long_context.needles(AutoTokenizer.from_pretrained(tmp_path), TEXT, lengths, depths, trials)


def test_rows_of_needles() -> None:
    prompts = [long_context.Needle([], "1", n, d) for n in (100, 200) for d in (0.0, 1.0) for _ in range(2)]
    rows, lengths, depths, cells = long_context.needle_rows("m", prompts, [True, True, False, True] * 2)
    assert (lengths, depths, cells) == ([100, 200], [0.0, 1.0], [[1.0, 1.0], [0.5, 0.5]])
    assert rows[-1].test == "needle found" and rows[-1].value == 75


def test_loss_by_position() -> None:
    model, ids = tiny_model(torch.float32), tiny_ids(tokens=50)[0].tolist()
    found = long_context.loss_by_position(model, ids, 16, "auto", places=5)
    whole = np.stack([s.nll for s in window_scores(model, ids, 16) if len(s.nll) == 15])
    assert whole.shape == (3, 15)
    assert [y for _, y, _ in found] == pytest.approx([whole[:, i : i + 3].mean() for i in range(0, 15, 3)])
    assert [x for x, _, _ in found] == [2.5, 5.5, 8.5, 11.5, 14.5] and all(e is not None for _, _, e in found)
    with pytest.raises(InputError, match="no whole window"):
        long_context.loss_by_position(model, ids[:10], 16, "auto")


def test_names_stand_clear_of_each_other() -> None:
    """Files of one model lie close together: equal speeds, or equal perplexities."""
    for found in (
        {f"SmolLM2-135M-Instruct.Q{i}_K_M.gguf": (28.0 + 0.1 * i, 5.6 + 0.02 * i, 0.9) for i in range(6)},
        {f"SmolLM2-135M-Instruct.Q{i}_K_M.gguf": (5.0 * i, 5.6, 0.9) for i in range(1, 7)},
    ):
        svg = ElementTree.fromstring(picture.points("t", "x", "y", found))
        names = [each for each in svg.iter("{http://www.w3.org/2000/svg}text") if each.text in found]
        boxes = []
        for name in names:
            x, y, width = float(name.get("x", "")), float(name.get("y", "")), 6.5 * len(name.text or "")
            left = x - width if name.get("text-anchor") == "end" else x
            assert left >= 0 and left + width <= picture.WIDTH and 0 <= y <= picture.HEIGHT
            boxes.append((left, y - 10, left + width, y + 3))
        assert len(boxes) == 6
        for i, a in enumerate(boxes):
            assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])


def test_pictures_are_svg() -> None:
    made = [
        picture.lines("t <&>", "x", "y", {"a": [(1, 2.0, 0.1), (2, float("nan"), None), (3, 1.0, None)]}),
        picture.points("t", "x", "y", {"a": (10.0, 30.0, 0.5), "b": (20.0, 31.0, None)}, "a"),
        picture.shares("t", "x", "y", ["1", "2"], ["0%", "100%"], [[0.0, 1.0], [0.5, 0.25]]),
    ]
    for svg in made:
        assert ElementTree.fromstring(svg).tag.endswith("svg") and "nan" not in svg
    assert picture.lines("t", "x", "y", {"a": []}) == "" == picture.points("t", "x", "y", {})
