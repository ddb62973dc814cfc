"""The layers of other packages and papers, each written as its own users would run it.

In:   a `bench.layers.problem.Problem`.
Out:  a `bench.layers.layer.Layer`: a forward, the tensors it trains, and their gradients under the truth's names.
Who:  `bench.layers.providers`, which lists them. `alora_kernels.baselines.formulas` has those that the demo needs too.
"""
