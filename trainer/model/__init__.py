"""The GPT decoder: plain torch at tp = 1, on megatron-core's layers at tp > 1. Activations are time-first: x_TBC.

In: a ModelConfig, a Mesh and tokens. Out: hidden states, logits, the sum of the loss. Start with `gpt.py`.
"""
