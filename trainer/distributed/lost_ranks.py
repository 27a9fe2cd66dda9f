"""One-line errors for ranks that are gone or silent, in place of a traceback of the communication library."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from conf.errors import TransientError
from trainer.distributed.world import World
from trainer.run.stack_location import place_of_error

# Messages of gloo, NCCL and torch's store about other ranks. Other errors (different sizes, CUDA, memory, a used
# port) are this rank's own.
SILENT = re.compile(
    "timed out (waiting|after|connecting)|before timing out|connection timed out|wait timeout|operation timeout",
    re.IGNORECASE,
)


GONE = re.compile(
    r"connection (was likely )?(reset|closed|refused)|closed by (remote )?peer|peer closed the connection|broken pipe|"
    r"remote process exit|timeout caused pair closure|socket has failed to connect|no route to host|"
    r"(host|network) is (down|unreachable)",
    re.IGNORECASE,
)


@contextmanager
def ranks_lost(world: World, timeout_s: float) -> Iterator[None]:
    """Turn torch's errors about ranks that are silent or gone into one line that a user understands.

    Any other error of a collective is a defect and keeps its traceback.

    Raises:
        TransientError: a collective, or the start of the process group, failed because of other ranks.
    """
    try:
        yield
    except RuntimeError as e:  # torch.distributed.DistError is one; gloo raises the bare one
        text = " ".join(str(e).split())
        silent = SILENT.search(text)
        if not silent and not GONE.search(text):
            raise
        me = f"rank {world.rank} of {world.world_size} on {socket.gethostname()}"
        if silent:
            line = (
                f"{me} waited for the other ranks for watch.collective_s={timeout_s:g} s and got no answer: a host or "
                "its network is down, or a rank hangs"
            )
        else:
            line = f"{me} lost the connection to another rank: it or its host has ended, and its own output says why"
        raise TransientError(f"{line}; in {place_of_error(e.__traceback__)} ({text[:300]})") from e
