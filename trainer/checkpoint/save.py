"""Saving: each rank copies the fragments it owns and trains on while a thread writes them; rank 0's thread publishes.

No collective runs in a thread: NCCL and gloo want one order of collectives on all ranks, and training has its own. The
threads meet in the folder that they write (trainer/checkpoint/write.py).

An error is known to one rank alone until the training threads exchange it, on three occasions: at the next step, whose
vote carries `failed`, so that all ranks refuse that step and call `check`; at the next save; and at the end of the run.
So it stops all of them with one UserError, and a run never ends well with a checkpoint that is not published.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from conf.errors import TransientError, UserError, may_pass, of_nature
from trainer.checkpoint.snapshot import Snapshot, bytes_of, check_room
from trainer.checkpoint.write import ElsewhereError, FolderActivity, Save, Writer, as_json
from trainer.distributed.collective import all_ranks
from trainer.engine.engine import Engine
from trainer.engine.fragments import Fragment, get_optimizer_step, owned

SILENCE_S = 10.0  # a folder that has not changed for so long is no longer waited for
DRAIN_S = 30.0  # at most, when the process is given up


class Saver:
    """Writes a run's checkpoints, one at a time. `save`, `wait` and `check` are collective, and so is making a Saver.

    With checkpoint.background, `save` returns once its fragments are copied into host memory, about 12 bytes x
    parameters / world_size on each rank (snapshot.py); without, and at the end of the run, the same thread
    reads the live weights and `save` waits. `on_progress` is called while `save` or `wait` waits and the folder
    changes.

    Raises:
        UserError: on every rank, if one has no memory for its copy.
    """

    def __init__(self, engine: Engine, writer: Writer, on_progress: Callable[[], None] = lambda: None) -> None:
        self.engine = engine
        self.writer = writer
        self._on_progress = on_progress
        self._snapshot: Snapshot | None = None
        if writer.config.background:
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

        `state`: JSON that the loop reads back; `val_loss` in it ranks checkpoints. `last` of the run: adds Hugging
        Face's files, and returns when it is published. `back_to`: see `Save`.

        Raises:
            UserError: on every rank, if any could not write this one or the one before; those published stay.
        """
        self.wait()
        engine, writer, started = self.engine, self.writer, time.monotonic()
        staging = writer.run.staging(step, writer.generation)
        all_ranks(_failed(step), lambda: _make(staging) if writer.mesh.world.is_main else None)
        fragments = self._fragments()
        if self._snapshot and not last:
            fragments = self._snapshot.take(fragments)
        facts = {"step": step, "optimizer_step": get_optimizer_step(engine.adam), **writer.facts}
        save = Save(step, staging, fragments, as_json({**state, **facts}), last, started, back_to)
        writer.abort.clear()
        thread = threading.Thread(target=self._run, args=(save,), name="checkpoint", daemon=True)
        thread.start()
        self._save = save  # from here on there is something to wait for
        self._thread = thread
        if last or not writer.config.background:
            self.wait()

    def wait(self) -> None:
        """Returns when the save in flight is published; at once if there is none. Collective.

        While the folder changes, no rank waits in a collective, whose timeout would end the run.

        Raises:
            UserError: on every rank, if any could not write; TransientError, if only disks are to blame.
        """
        if self._save is not None:
            self._await(self._save)
            self._finish(self._save)

    def check(self) -> None:
        """Raises UserError on every rank if a save has failed on any. Collective; waits for no save that has not."""
        if self._save is not None and any(self._failures()):
            self._finish(self._save)

    def close(self) -> None:
        """End after an error of the run, which all ranks may know or which may have killed some: no collective.

        The save in flight is complete and may be worth hours: it is still published if all ranks write on. So no rank
        leaves before: if one does, torchrun ends the others, and rank 0 has still to publish.
        """
        if (save := self._save) is not None:
            self._await(save)
            self.writer.abort.set()
            self._thread.join()
            if error := self._take_error(save):
                print(f"{_failed(save.step)}: {error}", file=sys.stderr, flush=True)

    def drain(self) -> None:
        """Give the save in flight at most DRAIN_S while its folder changes, for a thread that then ends the process.

        Files only. No rank leaves before, for a launcher then ends the others.
        """

        def wait(save: Save) -> None:
            with contextlib.suppress(OSError):
                self._await(save, DRAIN_S)

        if (save := self._save) is not None:
            waiting = threading.Thread(target=wait, args=(save,), daemon=True)  # a dead file server holds it, not us
            waiting.start()
            waiting.join(DRAIN_S)

    def release(self) -> None:
        """Drop the engine and the memory for its copies, once nothing is in flight and nothing will be."""
        del self.engine
        self._snapshot = None

    def _await(self, save: Save, limit_s: float = math.inf) -> None:
        """The one wait for a save: until it is settled or its folder is silent, and at most `limit_s`.

        Settled means on rank 0 that its thread has ended, on others that this rank's thread has, and that the folder
        shows the checkpoint published or given up.
        """
        activity, deadline = FolderActivity(save.staging), time.monotonic() + limit_s
        is_main = self.writer.mesh.world.is_main
        while time.monotonic() < deadline and activity.silence_s() <= SILENCE_S:
            if not self._thread.is_alive() and (is_main or self.failed or self.writer.is_settled(save)):
                return
            self._on_progress()
            time.sleep(0.05)

    def _finish(self, save: Save) -> None:
        """Exchange the errors of a save that is at its end or has failed on some rank. Collective."""
        if not self.writer.mesh.world.is_main:
            self._thread.join()
        failures = self._failures()
        if any(failures):
            self.writer.abort.set()
        self._thread.join()
        failures += self._failures()  # rank 0 may fail after all have written
        error = self._take_error(save)
        if error is not None and not isinstance(error, (UserError, OSError)):
            raise error  # a defect of the program keeps its traceback
        if reasons := [failure for failure in failures if failure]:
            transient = [t for _, t in reasons if t is not None]
            kind = TransientError if transient and all(transient) else UserError
            raise kind(f"{_failed(save.step)}: {reasons[0][0]}") from error

    def _take_error(self, save: Save) -> Exception | None:
        """The reason why the save in flight failed here, if it did. Nothing is in flight any more."""
        error = self._error
        self._save = None
        self._error = None
        if self.writer.mesh.world.is_main:
            shutil.rmtree(save.staging, ignore_errors=True)  # no longer there if it is published
        return error

    def _failures(self) -> list[tuple[str, bool | None] | None]:
        """For each rank that has failed by now: the reason, and whether it is transient; None: another rank knows."""
        e = self._error
        failure: tuple[str, bool | None] | None = None
        if isinstance(e, ElsewhereError):
            failure = (str(e), None)
        elif e is not None:
            text = str(e) if isinstance(e, (UserError, OSError)) else repr(e)
            failure = (f"{text} (rank {self.writer.mesh.world.rank})", may_pass(e))
        answers: list[tuple[str, bool | None] | None] = [None] * self.writer.mesh.world.world_size
        dist.all_gather_object(answers, failure)
        return answers

    def _take_memory(self) -> None:
        """Allocate this rank's copy, once all copies of its node are known to fit."""
        what, world = "the run cannot save in the background", self.writer.mesh.world
        sizes = all_ranks(what, lambda: bytes_of(self._fragments()))
        if world.local_world_size is not None:  # torchrun's order: a node's ranks are neighbours
            sizes = sizes[world.rank - world.local_rank :][: world.local_world_size]
        all_ranks(what, lambda: check_room(sizes))

        def take() -> None:
            self._snapshot = Snapshot(self._fragments(), self.engine.mesh.device)

        all_ranks(what, take)

    def _fragments(self) -> list[Fragment]:
        """The fragments that this rank writes. Replicated parameters are written by tp rank 0."""
        engine = self.engine
        fragments = owned(engine.module, engine.adam)
        return [f for f in fragments if engine.mesh.tp_rank == 0 or engine.specs[f.name].tp_dim is not None]

    def _run(self, save: Save) -> None:
        try:
            self.writer.write(save)
        except Exception as e:
            self._error = e


def _make(staging: Path) -> None:
    try:
        staging.mkdir(parents=True)
    except OSError as e:
        raise of_nature(e, str(e)) from None


def _failed(step: int) -> str:
    return f"the checkpoint of step {step} is not written, the one before it stands"
