"""Masks of attention as a bias on its scores, and the positions of tokens in their segments.

`Pattern.sees` defines the tokens that a token sees. Attention takes it in two forms: a bias that is added to the
scores (any device; the reference), or FlexAttention's block mask (flex.py), whose kernel skips blocks in which no token
sees another.

Legend: B batch, T time, S time with what a cache holds (S >= T; the T queries are the last of the S positions).
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config.attention import DENSE, Pattern
from trainer.config.model import ModelConfig


def patterns(cfg: ModelConfig, n: int) -> dict[str, Pattern]:
    """The pattern of each letter of a model in a text of `n` tokens; DENSE if it sees all of the past there."""
    named = {kind: cfg.pattern(kind) for kind in sorted(set(cfg.attention))}
    return {kind: DENSE if pattern.sees_all(n) else pattern for kind, pattern in named.items()}


def attention_bias(
    T: int,
    S: int,
    like: Tensor,
    segment_ids_BT: Tensor | None = None,
    pattern: Pattern = DENSE,
    positions_BT: Tensor | None = None,
) -> Tensor | None:
    """The bias on attention's scores: 0 where a token sees another, else -inf; built once for a pattern's layers.

    A token looks at what `pattern` says, with `segment_ids_BT` at its own segment only, where the pattern starts again
    (then T = S). The queries are the last T of the S positions, or with `positions_BT` those of each row. With both,
    segments are branches: a token looks at segment 0 too, which its own goes on from at the positions given.
    [T, S], with segments [B, 1, T, T], with positions [B, 1, T, S], in the dtype and on the device of `like`:
    attention would make the same of a bool mask, but in each layer again, and keep each for its backward. None where
    attention needs no bias: causal attention over a square says it all, and a last token sees everything.
    """
    if segment_ids_BT is not None:
        place_BT = segment_positions(segment_ids_BT) if positions_BT is None else positions_BT
        sees = pattern.sees(place_BT[:, None, :, None], place_BT[:, None, None, :])
        in_reach = segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]
        if positions_BT is not None:
            in_reach |= segment_ids_BT[:, None, None, :] == 0
        sees = sees & in_reach
    elif positions_BT is not None:
        sees = pattern.sees(positions_BT[:, None, :, None], torch.arange(S, device=like.device))
    else:
        if pattern == DENSE and T in (1, S):
            return None
        positions = torch.arange(S, device=like.device)
        sees = pattern.sees(positions[S - T :, None], positions)
    return torch.zeros(sees.shape, dtype=like.dtype, device=like.device).masked_fill_(~sees, -torch.inf)


def segment_positions(segment_ids_BT: Tensor) -> Tensor:
    """Each token's place in its segment, from 0: [B, T] int64. Segment ids never fall along a row."""
    first_BT = torch.searchsorted(segment_ids_BT.contiguous(), segment_ids_BT.contiguous())
    return torch.arange(segment_ids_BT.shape[1], device=segment_ids_BT.device) - first_BT
