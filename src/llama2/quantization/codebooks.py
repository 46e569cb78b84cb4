"""The 16 values of bitsandbytes' two 4-bit types, by code. No torch: the native engine takes them too."""

# Quantiles of a normal distribution, 8 above 0 and 7 below, over the largest (QLoRA, appendix E).
NF4: tuple[float, ...] = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022833234, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Sign, two bits of exponent, one of mantissa, over 12. Both codes of zero mean +0.
_POSITIVE = tuple(v / 12 for v in (0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
FP4: tuple[float, ...] = (0.0, *_POSITIVE, 0.0, *(-v for v in _POSITIVE))
