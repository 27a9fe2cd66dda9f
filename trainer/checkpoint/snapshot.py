"""A rank's own copy, in host memory, of what it owns: training goes on while the copy is written.

Memory: about 12 bytes x parameters / world_size on each rank (fp32 masters and AdamW's two moments), pinned where there
is a GPU. Muon's matrices have one moment and take 8; and what all tp ranks hold alike, tp rank 0 alone copies, so that
it takes more than the others. The memory is allocated at the start of a run and kept to its end: a machine that lacks
it is refused before the first step and not at the first save, and no save waits for the kernel to find pages.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from conf.errors import UserError
from trainer.engine.fragments import Fragment


class Snapshot:
    """Memory for one copy of these fragments, used again at each `take`."""

    def __init__(self, fragments: Sequence[Fragment], device: torch.device) -> None:
        self._device = device
        size = bytes_of(fragments)
        try:
            self._buffer = torch.empty(size // 4, dtype=torch.float32)
            self._buffer.zero_()  # now the pages are there
        except (RuntimeError, MemoryError) as e:
            raise UserError(_no_room(size, " ".join(str(e).split()))) from None
        if device.type == "cuda" and self._buffer.numel():
            self._unpin = weakref.finalize(self, _pin(self._buffer))

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def take(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """The fragments as they are now, their views in host memory; good until the next `take`.

        Waits for the device once, and only here: what is still to be computed on its stream is in the copy.
        """
        offset, copies = 0, []
        for f in fragments:
            views = {}
            for kind, view in f.views.items():
                views[kind] = self._buffer[offset : offset + f.length].copy_(view, non_blocking=True)
                offset += f.length
            copies.append(replace(f, views=views))
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return copies


def bytes_of(fragments: Sequence[Fragment]) -> int:
    """Bytes of host memory that a snapshot of these takes."""
    return 4 * sum(f.length * len(f.views) for f in fragments)


def check_room(sizes: Sequence[int], meminfo: Path = Path("/proc/meminfo")) -> None:
    """Raises UserError if the snapshots of a node's ranks, `sizes` bytes, need more memory than is available there.

    Call it before any of them is allocated: the kernel promises more than it has, and kills the process that uses it.
    """
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo.read_text(), re.MULTILINE)
    except OSError:  # no Linux
        return
    if match and sum(sizes) > (available := int(match[1]) << 10):
        raise UserError(_no_room(sum(sizes), f"{len(sizes)} ranks of this node, {available:,} bytes are available"))


def _no_room(size: int, why: str) -> str:
    return (
        f"{size:,} bytes of host memory for the snapshot of a checkpoint are not to be had ({why}): give "
        "checkpoint.background=false, or more memory"
    )


def _pin(buffer: torch.Tensor) -> Callable[[], None]:
    """Lock the pages of `buffer` for copies by the GPU; returns the function that unlocks them before it is freed.

    Registered, not allocated pinned: torch's pinned allocator rounds up to a power of two, for GPT-2 XL on one GPU from
    18.7 GB to 32 GB.
    """
    cudart, pointer = torch.cuda.cudart(), buffer.data_ptr()
    if cudart.cudaHostRegister(pointer, buffer.nbytes, 0) != cudart.cudaError.success:
        raise UserError(
            f"{buffer.nbytes:,} bytes of host memory for the snapshot of a checkpoint cannot be pinned: raise "
            "`ulimit -l`, or give checkpoint.background=false"
        )
    return lambda: cudart.cudaHostUnregister(pointer)
