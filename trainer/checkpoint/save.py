"""Saving: each rank copies what it owns and trains on, while a thread of its own writes; rank 0's thread publishes.

No collective runs in a thread: NCCL and gloo want one order of collectives on all ranks, and training has its own. The
threads meet in the folder that they write (trainer/checkpoint/write.py).

An error is one rank's alone until the training threads speak of it, on three occasions: at the next step, where
`failed` makes the count of its tokens NaN, as data that cannot be read does, so that all ranks refuse that step (with
the one look at the device that they take anyway) and call `check`; at the next save; and at the end of the run. So it
stops all of them with one UserError, and a run never ends well with a checkpoint that is not published.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from conf.errors import TransientError, UserError
from trainer.checkpoint.snapshot import Snapshot, bytes_of, check_room
from trainer.checkpoint.write import ElsewhereError, FolderActivity, Save, Writer, describe
from trainer.distributed.collective import all_ranks
from trainer.engine.engine import Engine
from trainer.engine.fragments import Fragment, get_optimizer_step, owned

LAST_WAIT_S = 10.0  # after an error of the run: for ranks that write nothing any more, and may be dead
LINGER_S = 30.0  # where the process is given up
SILENCE_S = 10.0  # without any news in the folder: then a rank waits in a collective, where errors are told


class Saver:
    """Writes a run's checkpoints, one at a time. `save`, `wait` and `check` are collective, and so is making one.

    With checkpoint.background, `save` returns once what it saves is copied into host memory, about 12 bytes x
    parameters / world_size on each rank (snapshot.py); without, and at the end of the run, the same thread
    reads the live weights and `save` waits. `moved` is called while `save` or `wait` waits and the folder changes.

    Raises:
        UserError: on every rank, where one has no memory for its copy.
    """

    def __init__(self, engine: Engine, writer: Writer, moved: Callable[[], None] = lambda: None) -> None:
        self.engine, self.writer, self._moved = engine, writer, moved
        self.background = writer.cfg.checkpoint.background
        self._snapshot: Snapshot | None = None
        if self.background:
            self._take_memory()
        self._save: Save | None = None  # in flight; on all ranks or on none
        self._thread = threading.Thread()
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """The save in flight has failed, as far as this rank knows."""
        return self._error is not None

    def save(self, step: int, state: dict[str, Any], *, last: bool = False, back_to: int | None = None) -> None:
        """Write the checkpoint of `step`, once the one before it is published.

        `state`: what the loop wants back, JSON; `val_loss` in it ranks checkpoints. `last` of the run: adds Hugging
        Face's files, and returns when it is published. `back_to`: see `Save`.

        Raises:
            UserError: on every rank, when any could not write this one or the one before; those published stand.
        """
        self.wait()
        engine, writer, started = self.engine, self.writer, time.monotonic()
        aside = writer.run.aside(step, writer.generation)
        all_ranks(_failed(step), lambda: _make(aside) if writer.mesh.world.is_main else None)
        fragments = self._mine()
        if self._snapshot and not last:
            fragments = self._snapshot.take(fragments)
        body = describe(writer.cfg, engine.mesh, step, get_optimizer_step(engine.adam), state)
        save = Save(step, aside, fragments, body, last, started, back_to)
        writer.abort.clear()
        thread = threading.Thread(target=self._run, args=(save,), name="checkpoint", daemon=True)
        thread.start()
        self._save, self._thread = save, thread  # now there is something to wait for
        if last or not self.background:
            self.wait()

    def wait(self) -> None:
        """Returns when the save in flight is published; at once where there is none. Collective.

        As long as the folder changes, no rank waits in a collective, whose timeout would end the run.

        Raises:
            UserError: on every rank, when any could not write; TransientError, where only disks are to blame.
        """
        save = self._save
        if save is None:
            return
        is_main, pulse = self.writer.mesh.world.is_main, FolderActivity(save.aside)
        while self._thread.is_alive():
            if pulse.silence_s() <= SILENCE_S:
                self._moved()
            elif is_main:
                break
            self._thread.join(0.05)
        if not is_main and self._error is None:
            self.writer.watch(save, SILENCE_S, self._moved)
        self._finish(save)

    def _finish(self, save: Save) -> None:
        """All ranks speak of the save, which is at its end or has failed on one of them. Collective."""
        if not self.writer.mesh.world.is_main:
            self._thread.join()
        failures = self._failures()
        if any(failures):
            self.writer.abort.set()
        self._thread.join()
        failures += self._failures()  # rank 0 may fail after all have written
        error = self._forget(save)
        if error is not None and not isinstance(error, (UserError, OSError)):
            raise error  # a defect of the program keeps its traceback
        if any(failures):
            found = [failure for failure in failures if failure]
            passing = [p for _, p in found if p is not None]
            kind = TransientError if passing and all(passing) else UserError
            raise kind(f"{_failed(save.step)}: {found[0][0]}") from error

    def check(self) -> None:
        """Raises UserError on every rank where a save has failed on any. Collective, and waits for no save else."""
        if self._save is not None and any(self._failures()):
            self._finish(self._save)

    def close(self) -> None:
        """After an error of the run, of which all ranks may know or some be dead: no collective.

        What is in flight is complete and may be worth hours: it is still published, if all ranks write on. So no rank
        goes before: where one does, torchrun ends the others, and rank 0 has still to publish.
        """
        if (save := self._save) is not None:
            self.writer.patience_s = LAST_WAIT_S
            self._thread.join()
            if self._error is None and not self.writer.mesh.world.is_main:
                self.writer.watch(save, LAST_WAIT_S)
            if error := self._forget(save):
                print(f"{_failed(save.step)}: {error}", file=sys.stderr, flush=True)

    def linger(self) -> None:
        """For a thread that ends the process at once: gives what is in flight LINGER_S, as long as its folder changes.

        Files only. No rank goes before, for a launcher then ends the others.
        """
        if (save := self._save) is not None:
            waiting = threading.Thread(target=self._linger, args=(save,), daemon=True)
            waiting.start()
            waiting.join(LINGER_S)

    def _linger(self, save: Save) -> None:
        with contextlib.suppress(OSError):
            self.writer.watch(save, LAST_WAIT_S)

    def release(self) -> None:
        """Lets go of the engine and of the memory for its copies, once nothing is in flight and nothing will be."""
        del self.engine
        self._snapshot = None

    def _forget(self, save: Save) -> Exception | None:
        """Nothing is in flight any more. Returns why it failed here; then what was written goes."""
        error = self._error
        self._save = self._error = None
        if self.writer.mesh.world.is_main:
            shutil.rmtree(save.aside, ignore_errors=True)  # no longer there where it is published
        return error

    def _failures(self) -> list[tuple[str, bool | None] | None]:
        """For each rank where it has failed by now: why, and whether that may pass; None: another rank will say."""
        e = self._error
        mine: tuple[str, bool | None] | None = None
        if isinstance(e, ElsewhereError):
            mine = (str(e), None)
        elif e is not None:
            text = str(e) if isinstance(e, (UserError, OSError)) else repr(e)
            mine = (f"{text} (rank {self.writer.mesh.world.rank})", isinstance(e, (TransientError, OSError)))
        answers: list[tuple[str, bool | None] | None] = [None] * self.writer.mesh.world.world_size
        dist.all_gather_object(answers, mine)
        return answers

    def _take_memory(self) -> None:
        """Room for this rank's copy, once all of its node's have been found to fit."""
        what, world = "the run cannot save in the background", self.writer.mesh.world
        sizes = all_ranks(what, lambda: bytes_of(self._mine()))
        if world.local_world_size is not None:  # torchrun's order: a node's ranks are neighbours
            sizes = sizes[world.rank - world.local_rank :][: world.local_world_size]
        all_ranks(what, lambda: check_room(sizes))

        def take() -> None:
            self._snapshot = Snapshot(self._mine(), self.engine.mesh.device)

        all_ranks(what, take)

    def _mine(self) -> list[Fragment]:
        """What this rank writes. What is the same on all tp ranks, tp rank 0 writes."""
        mesh = self.engine.mesh
        spec = self.engine.specs
        fragments = owned(self.engine.module, self.engine.adam)
        return [f for f in fragments if mesh.tp_rank == 0 or spec[f.name].tp_dim is not None]

    def _run(self, save: Save) -> None:
        try:
            self.writer.write(save)
        except Exception as e:
            self._error = e


def _make(aside: Path) -> None:
    try:
        aside.mkdir(parents=True)
    except OSError as e:
        raise TransientError(str(e)) from None


def _failed(step: int) -> str:
    return f"the checkpoint of step {step} is not written, the one before it stands"
