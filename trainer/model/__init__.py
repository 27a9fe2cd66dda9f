"""The GPT decoder on megatron-core's tensor-parallel layers. Activations are time-first: x_TBC."""
