"""megatron-core's tensor-parallel layers as this model uses them, for tp > 1. `linear.py` imports this file where
tp > 1; at tp = 1 megatron-core is not loaded.

Legend: T time (under sequence parallelism: this rank's part of it), B batch, C n_embd, V vocabulary on this rank.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from trainer.distributed.mesh import Mesh
from trainer.model.arithmetic import padded_vocab_size
from trainer.model.plain_linear import Reduce, in_chunks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import ModelParallelConfig, tensor_parallel
    from megatron.core.tensor_parallel import linear_with_grad_accumulation_and_async_allreduce as parallel_linear


def _config(mesh: Mesh, sequence_parallel: bool) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=mesh.tp,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,  # allocate on torch's current default device, not on "cuda"
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )


def _split(param: nn.Parameter, dim: int) -> None:
    """Mark a parameter of which each tp rank holds a part: DeepSpeed's norm then counts every part."""
    param.tensor_model_parallel = True  # type: ignore[attr-defined]
    param.partition_dim = dim  # type: ignore[attr-defined]


class _Plain(nn.Module):
    """Takes back the `_extra_state: None` that megatron-core's layers put into a state dict for Transformer Engine."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._load_state_dict_pre_hooks.clear()


class ColumnLinear(_Plain, tensor_parallel.ColumnParallelLinear):
    """y = x Aᵀ + b, A [out, in]: each rank holds out / tp outputs. [T, B, in] -> [T, B, out / tp], T whole again."""

    weight: nn.Parameter
    sequence_parallel: bool

    def __init__(self, n_in: int, n_out: int, mesh: Mesh, sequence_parallel: bool) -> None:
        config = _config(mesh, sequence_parallel)
        super().__init__(n_in, n_out, config=config, init_method=None, bias=True, tp_group=mesh.tp_group)
        _split(self.weight, 0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)[0]
        return y


class RowLinear(_Plain, tensor_parallel.RowParallelLinear):
    """y = x Aᵀ + b, A [out, in]: each rank holds in / tp inputs. [T, B, in / tp] -> [T, B, out], summed over them."""

    weight: nn.Parameter
    sequence_parallel: bool

    def __init__(self, n_in: int, n_out: int, mesh: Mesh, sequence_parallel: bool) -> None:
        super().__init__(
            n_in,
            n_out,
            config=_config(mesh, sequence_parallel),
            init_method=None,
            bias=True,
            input_is_parallel=True,
            skip_bias_add=False,
            tp_group=mesh.tp_group,
        )
        _split(self.weight, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)[0]
        return y


class TiedEmbedding(_Plain, tensor_parallel.VocabParallelEmbedding):
    """`plain_linear.TiedEmbedding` with V / tp rows on each rank."""

    weight: nn.Parameter
    vocab_start_index: int
    num_embeddings_per_partition: int
    reduce_scatter_embeddings: bool

    def __init__(self, vocab_size: int, n_embd: int, mesh: Mesh, sequence_parallel: bool) -> None:
        super().__init__(
            padded_vocab_size(vocab_size, mesh.tp),
            n_embd,
            init_method=None,
            reduce_scatter_embeddings=sequence_parallel,
            config=_config(mesh, sequence_parallel),
            tp_group=mesh.tp_group,
        )
        self.n_true = min(max(vocab_size - self.vocab_start_index, 0), self.num_embeddings_per_partition)
        _split(self.weight, 0)

    def forward(self, x: Tensor, head: bool = False, reduce: Reduce | None = None) -> Tensor:
        """Tokens [B, T] -> x_TBC; with `head` x_TBC -> this rank's logits_TBV; with `reduce` see `in_chunks`."""
        if reduce is not None:
            return in_chunks(x, self._logits, reduce, len(self.weight), self.n_true)
        if head:
            return self._logits(x)
        # under sequence parallelism megatron-core transposes by itself
        return super().forward(x if self.reduce_scatter_embeddings else x.t())

    def _logits(self, x: Tensor) -> Tensor:
        split = self.reduce_scatter_embeddings
        return parallel_linear(
            x, self.weight, None, False, allreduce_dgrad=not split, sequence_parallel=split, tp_group=self.tp_group
        )


def split_sequence(model: nn.Module, split: bool) -> None:
    """Set whether each tp rank holds a part of the sequence, or all of it, between the linears of `model`."""
    for module in model.modules():
        if isinstance(module, (ColumnLinear, RowLinear)):
            module.sequence_parallel = split
        elif isinstance(module, TiedEmbedding):
            module.reduce_scatter_embeddings = split


def gather_vocab(logits_TBV: Tensor, mesh: Mesh) -> Tensor:
    """The parts of all tp ranks side by side, in vocabulary order."""
    return tensor_parallel.gather_from_tensor_model_parallel_region(logits_TBV, group=mesh.tp_group)
