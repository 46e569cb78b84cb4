"""How good a model is: measures that read a model and change nothing."""
