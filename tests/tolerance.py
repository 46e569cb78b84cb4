"""Every tolerance of the suite, each with its reason. docs/numerics.md explains the measurements behind them."""

# Two float64 evaluations in different order; measured 4e-15 to 4e-14 on logits of scale 3.
FLOAT64 = 1e-12
# Two float32 evaluations of a two-layer model in different order; measured 2e-6.
FLOAT32 = 2e-5
# Logits with an adapter beside peft's, of the largest. In float32 most have the same bits, the worst differs by 6e-7;
# in float64 2.4e-6, because transformers' norms and rotations stay in float32. Either float32 is 7e-6 from float64.
ADAPTERS = 1e-5
# Losses of 20 training steps beside TRL's in float32. DPO's are differences of differences of sums.
STEPS_FLOAT32, STEPS_BFLOAT16 = 1e-5, {"sft": 1e-3, "dpo": 2e-2}
# One bfloat16 rounding has relative error 2**-9; a tiny model stacks a dozen of them.
BFLOAT16 = 5e-2
FLOAT16 = 6e-3
