"""Every tolerance of the suite, each with its reason. docs/numerics.md explains the measurements behind them."""

# Two float64 evaluations in different order; measured 4e-15 to 4e-14 on logits of scale 3.
FLOAT64 = 1e-12
# Two float32 evaluations of a two-layer model in different order; measured 2e-6.
FLOAT32 = 2e-5
# One bfloat16 rounding has relative error 2**-9; a tiny model stacks a dozen of them.
BFLOAT16 = 5e-2
FLOAT16 = 6e-3
