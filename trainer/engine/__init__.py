"""DeepSpeed ZeRO around a model: backward, step, optimizers, learning rate, fragments of the state.

In: a model and an objective's sums. Out: updated weights and the gradient norm. Start with `engine.py`,
which also chooses the optimizer by `optim.kind`.
"""
