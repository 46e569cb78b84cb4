"""Training: pure losses in `losses`, rows in `packing`."""
