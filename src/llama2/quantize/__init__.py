"""Quantisation as a job: `quant/` holds the formats and their mathematics, this family makes checkpoints of them.

quantize(source, target, method)   the call, which `llama2.quantize` is too
options      what is asked for          calibration   text -> token windows
layer        one layer in stages        hessian       what calibration knows of a linear's inputs
states       activations in a file      methods       a weight -> the tensors of a format, and its errors
job          the loop over the layers   journal       what an interrupted job goes on from
view         the result as a checkpoint measure, report   before and after
"""
