"""The solver's Hessian, gathered with the native engine's products where it is there."""

import torch
from torch import Tensor

from llama2.compiled import available, instruction_sets, make_pool, native
from llama2.quantization.gptq_solver import Hessian

_TILE = 512  # rows of H that one product adds to


class Bfloat16Hessian(Hessian):
    """As Hessian, of inputs rounded to bfloat16, with float32 sums, at twice the speed.

    What rounding loses is spread over all directions: it adds about 1e-6 of the mean diagonal to the diagonal, a ten
    thousandth of the damping.
    """

    def add(self, x: Tensor) -> None:
        """As Hessian.add."""
        rows_TK = x.detach().reshape(-1, x.shape[-1])
        engine, pool, isa = native(), make_pool(None), instruction_sets()[0]
        left_KT = rows_TK.mT.to(torch.bfloat16).contiguous()
        bits = left_KT.view(torch.uint16).numpy()
        right_KT = left_KT.float()
        self.tokens += len(rows_TK)
        keep, new = 1 - len(rows_TK) / self.tokens, 2 / self.tokens
        for start in range(0, len(self._upper_KK), _TILE):
            right = right_KT[start : start + _TILE]
            out = torch.empty(len(right), len(left_KT) - start)
            engine.matmul(pool, isa, engine.view(bits[start:], True), right.numpy(), out.numpy(), False)
            self._upper_KK[start : start + _TILE, start:].mul_(keep).add_(out, alpha=new)


def make_hessian(columns: int, bfloat16: bool) -> Hessian:
    """An empty one for inputs of so many columns; bfloat16 where asked for and the native engine is there."""
    return Bfloat16Hessian(columns) if bfloat16 and available() else Hessian(columns)
