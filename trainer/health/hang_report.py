"""The report of a hang: each rank writes its place in the code and its stacks, one writes the report.

    hangs/gen-0001/rank-00003.txt   a rank's place in one line, then the stacks of all its threads
    hangs/gen-0001/report.txt       first line: the ranks that the others wait for; then the ranks at each place

The folder itself makes the other ranks write theirs at the same moment.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import traceback
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.run.stack_location import COLLECTIVE

_SPOT = re.compile(r"rank (\d+) on (.+?): (\d+) steps done, (\w+) for (\d+) s, in (.+)")


@dataclass(frozen=True)
class Spot:
    """The place of a rank. `seconds`: since its step, or phase, began; `code`: see `stack_location.place`."""

    rank: int
    host: str
    step: int
    phase: str
    seconds: float
    code: str

    def line(self) -> str:
        return (
            f"rank {self.rank} on {self.host}: {self.step} steps done, {self.phase} for {self.seconds:.0f} s, "
            f"in {self.code}"
        )


def write_stacks(folder: Path, spot: Spot) -> None:
    """Write this rank's file, whole or not at all. Makes `folder` if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank-{spot.rank:05d}.txt"
    half = path.with_name(f".{path.name}.tmp")
    with half.open("w", encoding="utf-8") as f:
        f.write(f"{spot.line()}\n\n")
        f.writelines(_stacks())
        f.write(_flight_recorder())
    half.replace(path)


def _stacks() -> Iterator[str]:
    """The stacks of all threads, the main thread's first, the most recent call first.

    faulthandler would begin with the newest thread and stop after a hundred: the main thread would be missing.
    """
    frames, main = sys._current_frames(), threading.main_thread().ident
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident in sorted(frames, key=lambda ident: ident != main):
        yield f"Thread {ident:#x} ({names.get(ident, 'not of Python')}), most recent call first:\n"
        for frame, line in traceback.walk_stack(frames[ident]):
            yield f'  File "{frame.f_code.co_filename}", line {line} in {frame.f_code.co_name}\n'
        yield "\n"


def read_spots(folder: Path) -> list[Spot]:
    """The places of the ranks that have written theirs, in order."""
    spots = []
    for path in sorted(folder.glob("rank-*.txt")):
        with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as f:
            if match := _SPOT.fullmatch(f.readline(4096).rstrip("\n")):
                rank, host, step, phase, seconds, code = match.groups()
                spots.append(Spot(int(rank), host, int(step), phase, float(seconds), code))
    return spots


def report(spots: list[Spot], silent: dict[int, str], limit_s: float) -> str:
    """The ranks that the others wait for, in the first line; then each place with its ranks.

    `silent`: the hosts of ranks that wrote nothing. The others wait in the collective that most ranks are in; if no
    rank is in one, at the place of most ranks: NCCL only queues a collective, and a rank waits when it first reads the
    result.
    """
    groups: dict[str, list[Spot]] = defaultdict(list)
    for spot in spots:
        groups[spot.code].append(spot)
    majority = [code for code, group in groups.items() if 1 < len(group) > len(spots) / 2]
    collectives = [code for code in groups if code.startswith(COLLECTIVE)]
    waiting = max(collectives or majority, key=lambda code: len(groups[code]), default="")
    late = [spot for code, group in groups.items() if code != waiting for spot in group]
    if silent:
        who = "; ".join(f"rank {rank} on {host} does not answer" for rank, host in silent.items())
    elif not waiting:
        who = "no rank waits for another; " + "; ".join(f"{_them(group)} in {code}" for code, group in groups.items())
    elif late:
        who = "waiting for " + "; ".join(f"rank {s.rank} on {s.host}, which is in {s.code}" for s in late[:8])
    else:
        who = f"all ranks are in {waiting}: the network between them, or a device"
    longest = max((spot.seconds for spot in spots), default=limit_s)
    step = min((spot.step for spot in spots), default=0)
    lines = [f"hang: {longest:.0f} s after step {step} without another (limit {limit_s:.0f} s): {who}"]
    lines += [f"  {_them(group)}: {code}" for code, group in groups.items()]
    return "\n".join(lines)


def _them(group: list[Spot]) -> str:
    ranks = [f"{spot.rank} on {spot.host}" for spot in group]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:16])}{f' and {len(ranks) - 16} more' * (len(ranks) > 16)}"


def publish_report(folder: Path, rank: int, text: str) -> bool:
    """Publish this rank's report unless another rank has published one; returns True if it did."""
    own = folder / f".report.rank-{rank:05d}.tmp"
    own.write_text(text + "\n", encoding="utf-8")
    try:
        os.link(own, folder / "report.txt")  # whole, and only once
    except FileExistsError:
        return False
    finally:
        own.unlink(missing_ok=True)
    return True


def _flight_recorder() -> str:
    """NCCL's own record of its last 2000 collectives (torch's default, TORCH_FR_BUFFER_SIZE), JSON."""
    c10d = getattr(getattr(sys.modules.get("torch"), "_C", None), "_distributed_c10d", None)
    dump = getattr(c10d, "_dump_nccl_trace_json", None)
    if dump is None:
        return ""
    try:
        return f"\nNCCL's flight recorder: {dump().decode(errors='replace')}\n"
    except Exception as e:  # of a private function, in a process that is being given up
        return f"\nNCCL's flight recorder cannot be read: {e!r}\n"
