"""What calibration knows of a linear's inputs: H = 2/n sum x x^T, gathered batch by batch.

Only the lower triangle is computed, block row by block row. The products are float32, or, where the native engine and
the CPU have them, of bfloat16 factors with float32 sums: x is then rounded to 8 bits of mantissa, whose error adds about
1e-6 of the diagonal to itself, ten thousand times less than the damping.
"""

import torch
from torch import Tensor

from llama2 import cpu
from llama2.cpu.threads import instruction_sets, make_pool, native

_BLOCKS = 4  # block rows: of 16 blocks 10 are computed
_WIDTH = 128  # the narrowest block row


class Hessian:
    """The running sum for inputs of `width` columns (K)."""

    def __init__(self, width: int, bfloat16: bool = False) -> None:
        self.sum_KK, self.count = torch.zeros(width, width), 0
        self._bfloat16 = bfloat16 and cpu.available()
        step = max(_WIDTH, -(-width // _BLOCKS))
        self._rows = [(start, min(start + step, width)) for start in range(0, width, step)]

    def add(self, x: Tensor) -> None:
        """Takes inputs (..., K) in."""
        x_TK = x.reshape(-1, x.shape[-1])
        self.count += len(x_TK)
        if self._bfloat16:
            self._add_bfloat16(x_TK)
            return
        x_TK = x_TK.float()
        for start, stop in self._rows:
            self.sum_KK[start:stop, :stop].addmm_(x_TK[:, start:stop].T, x_TK[:, :stop])

    def _add_bfloat16(self, x_TK: Tensor) -> None:
        engine, pool, isa = native(), make_pool(None), instruction_sets()[0]
        wide_KT = x_TK.T.to(torch.bfloat16).contiguous()
        left_KT = wide_KT.float()
        bits = wide_KT.view(torch.uint16).numpy()
        for start, stop in self._rows:
            out = torch.empty(stop - start, stop)
            weights = engine.view(bits[:stop], True)
            engine.matmul(pool, isa, weights, left_KT[start:stop].numpy(), out.numpy(), False)
            self.sum_KK[start:stop, :stop] += out

    def diagonal(self) -> Tensor:
        """(K,) 2/n sum x^2: the importance of each column."""
        return self.sum_KK.diagonal() * (2 / max(1, self.count))

    def matrix(self) -> Tensor:
        """H (K, K) float32, in the memory of the sum, to which nothing can be added any more."""
        h_KK = self.sum_KK.mul_(2 / max(1, self.count))
        for start, stop in self._rows:
            h_KK[:start, start:stop] = h_KK[start:stop, :start].T
        return h_KK
