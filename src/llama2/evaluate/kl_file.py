"""llama.cpp's file of a base model's log-probabilities (`llama-perplexity --kl-divergence-base`), both ways. No torch.

    "_logits_"                          8 bytes
    context, vocabulary, chunks         int32 each (V for the vocabulary)
    tokens                              int32 (chunks, context)
    rows of the chunks, in order        of each the positions context // 2 ... context - 2:
        scale, least                    float32 each
        codes                           uint16 (V,), and one more where V is odd; log p = scale * code + least

All little-endian. Probabilities more than 16 nats below the likeliest are code 0.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from llama2.errors import CheckpointError
from llama2.files import replacing
from llama2.text_file import opened

MAGIC = b"_logits_"
SPAN = 16.0  # nats between the likeliest token and the least that has a code of its own
_HEADER = np.dtype([("context", "<i4"), ("vocabulary", "<i4"), ("chunks", "<i4")])

Floats = NDArray[np.float32]


class BaseHeader(NamedTuple):
    """Header of a base file: `tokens` int32 (chunks, context)."""

    context: int
    vocabulary: int
    tokens: NDArray[np.int32]

    @property
    def rows(self) -> int:
        """Scored positions of a chunk."""
        return self.context - 1 - self.context // 2

    @property
    def row_bytes(self) -> int:
        """Bytes of one position."""
        return 2 * (4 + 2 * ((self.vocabulary + 1) // 2))


def is_base(path: str | Path) -> bool:
    """Whether a path is a file that begins as a base file."""
    path = Path(path)
    if not path.is_file():
        return False
    with opened(path) as file:
        return file.read(len(MAGIC)) == MAGIC


class BaseReader:
    """A base file, opened: its header, and its chunks one after the other."""

    def __init__(self, path: str | Path) -> None:
        """Raises CheckpointError for a file that is no base file, is cut or has impossible sizes."""
        self.path = Path(path)
        self._file = opened(path)
        try:
            self.header = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> BaseHeader:
        size = os.fstat(self._file.fileno()).st_size
        if self._file.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(f"{self.path} is no base file: it does not begin with {MAGIC.decode()!r}")
        raw = self._file.read(_HEADER.itemsize)
        if len(raw) < _HEADER.itemsize:
            raise CheckpointError(f"{self.path} is cut in its header, after {size} bytes; write it again")
        context, vocabulary, chunks = (int(x) for x in np.frombuffer(raw, _HEADER)[0])
        if context < 2 or vocabulary < 1 or chunks < 1:
            raise CheckpointError(
                f"{self.path} says {chunks} chunks of {context} tokens of a vocabulary of {vocabulary}; each must be "
                "positive, and a context at least 2"
            )
        empty = BaseHeader(context, vocabulary, np.empty((0, context), np.int32))
        wanted = len(MAGIC) + _HEADER.itemsize + chunks * (4 * context + empty.rows * empty.row_bytes)
        if size != wanted:  # before memory is taken for what it says
            raise CheckpointError(
                f"{self.path} has {size} bytes, and {chunks} chunks of {context} tokens need {wanted}: "
                f"{'it is cut; write it again' if size < wanted else 'it is damaged, or another format'}"
            )
        tokens = np.frombuffer(self._file.read(4 * chunks * context), "<i4").reshape(chunks, context)
        if tokens.min() < 0 or tokens.max() >= vocabulary:
            raise CheckpointError(f"{self.path} holds tokens outside its vocabulary of {vocabulary}; it is damaged")
        return BaseHeader(context, vocabulary, tokens.astype(np.int32))

    def chunks(self) -> Iterator[Floats]:
        """Log-probabilities float32 (rows, V) of each chunk."""
        header = self.header
        for _ in range(len(header.tokens)):
            raw = np.frombuffer(self._file.read(header.rows * header.row_bytes), np.uint8)
            rows = raw.reshape(header.rows, header.row_bytes)
            scale_least = np.ascontiguousarray(rows[:, :8]).view("<f4")
            if not np.isfinite(scale_least).all():
                raise CheckpointError(f"{self.path} holds scales that are not finite; it is damaged")
            codes = np.ascontiguousarray(rows[:, 8:]).view("<u2")[:, : header.vocabulary]
            yield scale_least[:, :1] * codes.astype(np.float32) + scale_least[:, 1:]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class BaseWriter:
    """Writes the chunks of a base file in order."""

    def __init__(self, file: IO[bytes], header: BaseHeader) -> None:
        self._file, self._header = file, header
        sizes = np.array([(header.context, header.vocabulary, len(header.tokens))], _HEADER)
        file.write(MAGIC + sizes.tobytes() + header.tokens.astype("<i4").tobytes())

    def put(self, logits_TV: Floats) -> None:
        """Logits float32 (n, V) of the next positions."""
        self._file.write(packed(logits_TV))


@contextmanager
def writing(path: str | Path, header: BaseHeader) -> Iterator[BaseWriter]:
    """A base file that takes the place of `path` when it is whole."""
    with replacing(Path(path)) as file:
        yield BaseWriter(file, header)


def packed(logits_TV: Floats) -> bytes:
    """Rows of a base file from logits float32 (n, V), with llama.cpp's rounding."""
    most = logits_TV.max(-1, keepdims=True)
    least = np.maximum(logits_TV.min(-1, keepdims=True), most - np.float32(SPAN))
    log_sum = np.log(np.exp(logits_TV - most).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    scale = (most - least) / np.float32(65535)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.rint((np.float32(1) / scale) * (logits_TV - least))
    codes = np.where((logits_TV > least) & (scale > 0), codes, 0).clip(0, 65535)
    rows, vocabulary = logits_TV.shape
    made = np.zeros((rows, 4 + 2 * ((vocabulary + 1) // 2)), "<u2")
    made[:, :4] = np.concatenate((scale, least - most - log_sum), 1).astype("<f4").view("<u2")
    made[:, 4 : 4 + vocabulary] = codes
    return made.tobytes()
