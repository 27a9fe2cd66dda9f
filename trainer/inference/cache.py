"""Keys and values of a batch of texts of any lengths, so that a model computes each token once.

Legend: B batch (texts), T new tokens of each row, S slots, H heads on this rank, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """The `Cache` of trainer/model/attention.py, with room for `capacity` tokens a row, allocated at the first use.

    The token at position p of a row is in slot p. Rows are filled from the left, so that what a forward pads a shorter
    row with lies after all of the row's tokens: causality hides it, and the row's next tokens overwrite it. A row's
    true length is set in `lengths` after such a forward.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.lengths: list[int] = []  # tokens of each row; empty before the first forward
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._positions_BT = torch.empty(0, 0, dtype=torch.long)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def positions(self, T: int, device: torch.device) -> Tensor:
        if self.longest + T > self.capacity:
            raise ValueError(f"{self.longest} + {T} tokens in a cache of {self.capacity}")
        starts = sorted(set(self.lengths)) or [0]
        start_B1 = torch.tensor(starts if len(starts) == 1 else self.lengths, device=device)[:, None]
        self._positions_BT = start_B1 + torch.arange(T, device=device)
        return self._positions_BT

    def extend(self, layer: int, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        B, H, T, D = k_BHTD.shape
        if layer not in self._layers:
            self._layers[layer] = (k_BHTD.new_zeros(B, H, self.capacity, D), v_BHTD.new_zeros(B, H, self.capacity, D))
        S = self.longest + T
        for held_BHSD, new_BHTD in zip(self._layers[layer], (k_BHTD, v_BHTD), strict=True):
            if len(self._positions_BT) == 1:
                held_BHSD[:, :, S - T : S] = new_BHTD
            else:
                row_B1 = torch.arange(B, device=new_BHTD.device)[:, None]
                held_BHSD[row_B1, :, self._positions_BT] = new_BHTD.transpose(1, 2)
        k_BHSD, v_BHSD = self._layers[layer]
        return k_BHSD[:, :, :S], v_BHSD[:, :, :S]

    def grow(self, rows: int, T: int) -> None:
        self.lengths = [n + T for n in self.lengths or [0] * rows]

    def keep(self, rows: list[int]) -> None:
        """Make these the rows, each as often as it is named, and forget all others."""
        if rows == list(range(len(self.lengths))):
            return
        for layer, held in self._layers.items():
            k_BHSD, v_BHSD = (_rows(x_BHSD, rows, self.longest) for x_BHSD in held)
            self._layers[layer] = k_BHSD, v_BHSD
        self.lengths = [self.lengths[r] for r in rows]


def _rows(x_BHSD: Tensor, rows: list[int], S: int) -> Tensor:
    """Its rows, of which the first S slots hold something: in the same memory, unless that has too few rows."""
    taken_BHSD = x_BHSD[rows, :, :S]
    out_BHSD = x_BHSD[: len(rows)]
    if len(out_BHSD) < len(rows):
        out_BHSD = x_BHSD.new_zeros(len(rows), *x_BHSD.shape[1:])
    out_BHSD[:, :, :S] = taken_BHSD
    return out_BHSD
