"""Text -> windows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llama2.errors import InputError
from llama2.quantize.calibration import calibrate


def test_windows_are_seeded_disjoint_and_before_what_is_held_out(letters: Any, text: str) -> None:
    found = calibrate([text], letters, 100, 50, 3)
    ids = torch.tensor(letters(text)["input_ids"])
    assert found.windows.shape == (27, 50)  # nine tenths of 1,500
    assert torch.equal(found.held_out, ids[1350:])
    starts = {tuple(ids[i : i + 50].tolist()) for i in range(0, 1350, 50)}
    assert {tuple(row.tolist()) for row in found.windows} == starts
    assert torch.equal(calibrate([text], letters, 5, 50, 3).windows, found.windows[:5])
    assert not torch.equal(calibrate([text], letters, 100, 50, 4).windows, found.windows)


def test_files(letters: Any, text: str, tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text(text)
    rows: list[Any] = [{"text": text[:700]}, {"messages": [{"role": "user", "content": text[700:]}]}]
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert torch.equal(calibrate(plain, letters, 4, 50, 0).windows, calibrate([text], letters, 4, 50, 0).windows)
    chat = f"{text[:700]}<user>{text[700:]}"
    assert torch.equal(calibrate(lines, letters, 4, 50, 0).held_out, calibrate([chat], letters, 4, 50, 0).held_out)


def test_the_bundled_text_is_enough_for_the_defaults(letters: Any) -> None:
    found = calibrate(None, letters, 128, 512, 0)
    assert len(found.windows) == 128 and "comes with llama2" in found.origin


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (["short"], "too few for a window of 50"),
        ([], "at least one"),
        ([5], "texts, or lists"),
        ("c4", r"no download of data sets here; give the texts themselves, dataset=\[text"),
    ],
)
def test_data_that_cannot_be(data: Any, said: str, letters: Any) -> None:
    with pytest.raises(InputError, match=said):
        calibrate(data, letters, 4, 50, 0)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt", b"  \n", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{', "line 2, is not JSON"),
        ("a.jsonl", b'{"prompt": "a"}', 'neither "text"'),
    ],
)
def test_files_that_cannot_be(name: str, content: bytes, said: str, letters: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=said):
        calibrate(tmp_path / name, letters, 4, 50, 0)
