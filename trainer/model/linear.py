"""The model's linears and its tied embedding: plain torch at tp = 1, megatron-core's layers at tp > 1.

Legend: T time (under sequence parallelism: this rank's part of it), B batch, V vocabulary on this rank.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.distributed.mesh import Mesh
from trainer.model.plain_linear import Linear, TiedEmbedding


def column_linear(n_in: int, n_out: int, mesh: Mesh, sequence_parallel: bool) -> nn.Module:
    """A linear whose outputs are split over the tp ranks: [T, B, in] -> [T, B, out / tp], T whole again."""
    if mesh.tp == 1:
        return Linear(n_in, n_out)
    from trainer.model.tensor_parallel import ColumnLinear

    return ColumnLinear(n_in, n_out, mesh, sequence_parallel)


def row_linear(n_in: int, n_out: int, mesh: Mesh, sequence_parallel: bool) -> nn.Module:
    """A linear whose inputs are split over the tp ranks: [T, B, in / tp] -> [T, B, out], summed over them."""
    if mesh.tp == 1:
        return Linear(n_in, n_out)
    from trainer.model.tensor_parallel import RowLinear

    return RowLinear(n_in, n_out, mesh, sequence_parallel)


def tied_embedding(vocab_size: int, n_embd: int, mesh: Mesh, sequence_parallel: bool) -> TiedEmbedding:
    """The token embedding and head, whose rows are split over the tp ranks."""
    if mesh.tp == 1:
        return TiedEmbedding(vocab_size, n_embd)
    from trainer.model.tensor_parallel import TiedEmbedding as ParallelEmbedding

    return ParallelEmbedding(vocab_size, n_embd, mesh, sequence_parallel)


def split_sequence(model: nn.Module, split: bool) -> None:
    """Set whether each tp rank holds a part of the sequence, or all of it, between the linears of `model` (tp > 1)."""
    from trainer.model import tensor_parallel

    tensor_parallel.split_sequence(model, split)


def gather_vocab(logits_TBV: Tensor, mesh: Mesh) -> Tensor:
    """The parts of all tp ranks side by side, in vocabulary order."""
    if mesh.tp == 1:
        return logits_TBV
    from trainer.model import tensor_parallel

    return tensor_parallel.gather_vocab(logits_TBV, mesh)
