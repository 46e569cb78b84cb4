"""The comparison of two models: llama.cpp's file byte by byte, its statistics by their definition."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_ids, tiny_model

from llama2.errors import CheckpointError, InputError
from llama2.evaluate import compare, kl_file
from llama2.evaluate.kl_file import BaseHeader
from llama2.evaluate.steps import make_steps


def by_hand(tokens: list[list[int]], rows: list[tuple[float, float, list[int]]], vocabulary: int = 3) -> bytes:
    """A base file: (scale, least, codes) of each row, with a code more where the vocabulary is odd."""
    raw = b"_logits_" + struct.pack("<3i", len(tokens[0]), vocabulary, len(tokens))
    raw += b"".join(struct.pack("<i", token) for row in tokens for token in row)
    for scale, least, codes in rows:
        raw += struct.pack("<2f", scale, least) + struct.pack(f"<{len(codes)}H", *codes) + b"\0\0" * (vocabulary % 2)
    return raw


def test_reads_what_was_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "base.kld"
    path.write_bytes(by_hand([[0, 1, 2, 1]], [(0.5, -3.0, [0, 2, 6])]))  # context 4: only position 2 is scored
    reader = kl_file.BaseReader(path)
    assert kl_file.is_base(path) and reader.header.rows == 1 and reader.header.tokens.tolist() == [[0, 1, 2, 1]]
    assert [chunk.tolist() for chunk in reader.chunks()] == [[[-3.0, -2.0, 0.0]]]
    reader.close()


def test_writes_what_llama_cpp_writes(tmp_path: Path) -> None:
    """Logits 0, 1 and -40: the least that has a code is 16 below the largest, so scale = 16 / 65535."""
    logits = np.array([[0.0, 1.0, -40.0]], np.float32)
    header = BaseHeader(4, 3, np.array([[0, 1, 2, 1]], np.int32))
    with kl_file.writing(tmp_path / "x", header) as writer:
        writer.put(logits)
    log_sum = math.log(math.exp(-1) + 1 + math.exp(-41))
    scale = np.float32(16) / np.float32(65535)
    expected = by_hand(
        [[0, 1, 2, 1]], [(float(scale), -16 - log_sum, [61439, 65535, 0])]
    )  # 15 / 16 of 65535 = 61439.06
    assert (tmp_path / "x").read_bytes() == expected


def test_round_trip_is_within_half_a_code(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (6, 101)).astype(np.float32)
    header = BaseHeader(14, 101, np.arange(14, dtype=np.int32)[None])
    with kl_file.writing(tmp_path / "x", header) as writer:
        writer.put(logits[:4])
        writer.put(logits[4:])
    reader = kl_file.BaseReader(tmp_path / "x")
    (found,) = reader.chunks()
    reader.close()
    exact = compare.log_probabilities(logits)
    kept = exact > exact.max(-1, keepdims=True) - 16
    assert float(np.abs(found - exact)[kept].max()) < 0.51 * 16 / 65535 + 1e-5


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda raw: b"_logitz_" + raw[8:], "begin"),
        (lambda raw: raw[:15], "cut"),
        (lambda raw: raw[:-1], "cut"),
        (lambda raw: raw + b"\0", "damaged"),
        (lambda raw: raw[:8] + struct.pack("<3i", 4, 3, 2**31 - 1) + raw[20:], "cut"),
        (lambda raw: raw[:8] + struct.pack("<3i", 4, -3, 1) + raw[20:], "positive"),
        (lambda raw: raw[:20] + struct.pack("<i", 3) + raw[24:], "outside"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: "object", said: str) -> None:
    path = tmp_path / "x"
    path.write_bytes(damage(by_hand([[0, 1, 2, 1]], [(0.5, -3.0, [0, 2, 6])])))  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=said):
        kl_file.BaseReader(path)


def run_pair(base: object, other: object, ids: list[int], context: int) -> list[object]:
    header = compare.chunks(ids, context, base.config.vocab_size)  # type: ignore[attr-defined]
    streams = [compare.chunk_logits(make_steps(m), header, 1) for m in (base, other)]
    *_, found = compare.run(streams[0], False, {"other": streams[1]}, header)
    return found["other"].rows("other")


def test_statistics_are_their_definition() -> None:
    base, other = tiny_model(), tiny_model(seed=1)
    ids, context = tiny_ids(tokens=60)[0].tolist(), 20
    rows = {row.test: row for row in run_pair(base, other, ids, context)}  # type: ignore[attr-defined]
    kl, base_nll, nll, same, flipped = [], [], [], [], []
    for start in range(0, 60, context):
        tokens = [1, *ids[start + 1 : start + context]]
        with torch.no_grad():
            p, q = (m(torch.tensor([tokens])).logits[0].double().log_softmax(-1) for m in (base, other))
        for i in range(context // 2, context - 1):
            target = ids[start + i + 1]
            kl.append(float((p[i].exp() * (p[i] - q[i])).sum()))
            base_nll.append(-float(p[i, target]))
            nll.append(-float(q[i, target]))
            same.append(bool(p[i].argmax() == q[i].argmax()))
            flipped.append(bool((p[i].argmax() == target) != (q[i].argmax() == target)))
    assert rows["mean KL divergence"].value == pytest.approx(np.mean(kl), rel=1e-4)
    assert rows["99th percentile of KL"].value == pytest.approx(np.percentile(kl, 99), rel=1e-4)
    assert rows["perplexity"].value == pytest.approx(math.exp(np.mean(nll)), rel=1e-5)
    ratio = rows["perplexity ratio"]
    difference = np.array(nll) - np.array(base_nll)
    assert ratio.value == pytest.approx(math.exp(difference.mean()), rel=1e-5)
    # llama.cpp's error of the ratio: of the mean of paired differences, tokens independent
    assert ratio.details["token_error"] == pytest.approx(
        ratio.value * difference.std() / math.sqrt(len(nll) - 1), rel=1e-4
    )
    assert rows["same first choice"].value == pytest.approx(100 * np.mean(same))
    assert rows["flipped tokens"].value == pytest.approx(100 * np.mean(flipped))
    assert rows["mean KL divergence"].error is not None and rows["99th percentile of KL"].error is not None


def test_a_model_beside_itself() -> None:
    model = tiny_model()
    rows = {row.test: row for row in run_pair(model, model, tiny_ids(tokens=60)[0].tolist(), 20)}  # type: ignore[attr-defined]
    assert rows["mean KL divergence"].value == pytest.approx(0, abs=1e-7)
    assert rows["perplexity ratio"].value == 1 and rows["same first choice"].value == 100
    assert rows["flipped tokens"].value == 0


def test_texts_that_are_too_short() -> None:
    with pytest.raises(InputError, match="at least 40"):
        compare.chunks(list(range(39)), 20, 64)
    with pytest.raises(InputError, match="at least 4"):
        compare.chunks(list(range(39)), 3, 64)
