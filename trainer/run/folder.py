"""The folder of a run: its files, the right to write, and the checkpoints that are published. No torch.

config.yaml                           the frozen config of the last start
metrics.jsonl                         the journal; samples/step-….txt: the texts that it holds, a file for each step
mixture.png                           the data of the run, if it is more than one source that never changes
tracking.json                         how much of it MLflow has; tracking.lock: held by the process that sends
supervise.jsonl                       the starts and ends that launch.supervise has seen, with causes
profile/steps-10-12.gen-0001.json     a trace of these steps, as `profile` asks for it
plots/loss.png                        and others, drawn from the journal now and then
environment/0001.json                 one file for each start: code version, packages, GPUs, command line
generations/0001                      one file for each start, made exclusively: host, pid of rank 0, time; `from` which
                                      checkpoint, or null; `changed`, of its config; `ended`, why before max_steps
submit/0001/                          what launch.submit started: frozen config, code version, job script
heartbeats/rank-00003.json            step and phase of a rank, replaced every few seconds (trainer/run/heartbeat.py)
hangs/gen-0001/report.txt             of a start that stopped making progress: the state of each rank (hang_report.py)
hangs/gen-0001/rank-00003.txt         the stacks of a rank at that moment
evaluations/step-….gen-…-0a1b2c3d/    reports of trainer.evaluate about a checkpoint
checkpoints/latest                    the name of the checkpoint to resume from, or "beginning"
checkpoints/step-00000100.gen-0001/   a published checkpoint
checkpoints/damaged-step-…/           one that was not what had been written, set aside by a start that took another
checkpoints/.step-….tmp/              one that is being written or deleted
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from conf.errors import TransientError, UserError
from data_pipeline.files import fsync_folder, publish, publish_json, read_json

STATE = "state.json"
WEIGHTS = "weights"  # prefix of the files that hold them
DAMAGED = "the checkpoint is damaged, use another one"
BEGINNING = "beginning"  # in the pointer: a rollback went back to where there is no checkpoint
_NAME = re.compile(r"step-(\d{8,})\.gen-(\d{4,})")
_UNFINISHED = re.compile(rf"\.{_NAME.pattern}\.tmp|\.latest\.\d+\.tmp")  # the names that a killed start leaves


class RunFolder:
    """Paths and their rules. Nothing is made on disk before `take_generation`."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.config = self.root / "config.yaml"
        self.metrics = self.root / "metrics.jsonl"
        self.mixture = self.root / "mixture.png"
        self.plots = self.root / "plots"
        self.samples = self.root / "samples"
        self.evaluations = self.root / "evaluations"
        self.environments = self.root / "environment"
        self.checkpoints = self.root / "checkpoints"
        self.generations = self.root / "generations"
        self.submissions = self.root / "submit"
        self.heartbeats = self.root / "heartbeats"
        self.pointer = self.checkpoints / "latest"

    def take_generation(self, **facts: Any) -> int:
        """The number of this start, one more than any before; removes half-written files of interrupted starts.

        `facts`: kept in its file, beside host, pid and time.

        Call `begin` next, with the checkpoint that it goes on from.
        """
        self.generations.mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        generation = self.newest_generation() + 1
        while True:
            try:
                with self._start(generation).open("x", encoding="utf-8") as f:
                    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), **facts}, f)
                break
            except FileExistsError:
                generation += 1
        fsync_folder(self.generations)
        for leftover in [p for p in self.checkpoints.glob(".*.tmp") if _UNFINISHED.fullmatch(p.name)]:
            if leftover.is_dir():
                _remove(leftover)
            else:
                leftover.unlink(missing_ok=True)  # the pointer's: a stranded start may just have moved it
        return generation

    def begin(self, generation: int, checkpoint: Path | None, **facts: Any) -> list[Path]:
        """Record that this start goes on from `checkpoint`, and point to it; returns the checkpoints that it will
        never delete, since it does not descend from them. `facts`: as those of `take_generation`."""
        self.note(generation, **facts, **{"from": checkpoint.name if checkpoint else None})
        if checkpoint is not None and self._pointed() != checkpoint.name:
            self._point_to(checkpoint.name)
        line = self.lineage(generation)
        return [p for p in self.published() if p not in line]

    def note(self, generation: int, **facts: Any) -> None:
        """Add facts to the file of a start."""
        self.fence(generation)
        publish_json(self._start(generation), {**self.facts(generation), **facts})

    def ended(self) -> str | None:
        """The reason for which the newest start ended the run before max_steps; None if it did not."""
        return self.facts(self.newest_generation()).get("ended")

    def set_aside(self, checkpoint: Path, generation: int) -> Path:
        """Rename a checkpoint that is damaged, so that no start tries it again; returns its new path."""
        self.fence(generation)
        return checkpoint.rename(checkpoint.with_name(f"damaged-{checkpoint.name}"))

    def take_submission(self) -> Path:
        """A new folder for the next submission, numbered as `generations` are, made exclusively."""
        self.submissions.mkdir(parents=True, exist_ok=True)
        number = max((int(p.name) for p in self.submissions.glob("*") if p.name.isdecimal()), default=0)
        while True:
            number += 1
            with contextlib.suppress(FileExistsError):
                (folder := self.submissions / f"{number:04d}").mkdir()
                return folder

    def newest_generation(self) -> int:
        """The number of the run's last start, 0 before the first. Its checkpoints tell it too, if they were copied
        without `generations`."""
        starts = [int(p.name) for p in self.generations.glob("*") if p.name.isdecimal()]
        return max([*starts, *(start_of(p) for p in self.published())], default=0)

    def hang(self, generation: int) -> Path:
        """The stacks of a start that hung."""
        return self.root / "hangs" / f"gen-{generation:04d}"

    def hang_report(self, generation: int) -> Path:
        """The report of a hang; its first line names the ranks that are waited for."""
        return self.hang(generation) / "report.txt"

    def fence(self, generation: int) -> None:
        """Raise UserError if a newer start has taken the run over: this one must not write."""
        if (newest := self.newest_generation()) > generation:
            raise UserError(
                f"{self.root}: start {newest} of this run has taken over, start {generation} publishes nothing more: "
                "let one start at a time use a run.dir"
            )

    def taken_over(self, generation: int) -> bool:
        """True if another process has taken the run over: a rollback is a start of the same one."""
        if (newest := self.newest_generation()) <= generation:
            return False
        ours, theirs = ([self.facts(n).get(key) for key in ("host", "pid")] for n in (generation, newest))
        return theirs not in (ours, [None, None])  # None: it is being written

    def checkpoint(self, step: int, generation: int) -> Path:
        """The folder of the checkpoint of `step` once it is published."""
        return self.checkpoints / f"step-{step:08d}.gen-{generation:04d}"

    def staging(self, step: int, generation: int) -> Path:
        """The folder that it is written into before."""
        final = self.checkpoint(step, generation)
        return final.with_name(f".{final.name}.tmp")

    def publish(self, staging: Path, step: int, generation: int) -> Path:
        """Turn a complete, fsynced folder into the run's latest checkpoint: fence, rename, move the pointer."""
        self.fence(generation)
        final = self.checkpoint(step, generation)
        staging.rename(final)
        fsync_folder(self.checkpoints)
        self._point_to(final.name)
        return final

    def go_back(self, to: Path | None, generation: int) -> list[Path]:
        """Make `to` the latest checkpoint, or none with None; delete this start's of later steps, and return them."""
        self.fence(generation)
        self._point_to(to.name if to else BEGINNING)
        return self._delete([p for p in self.lineage(generation) if to is None or step_of(p) > step_of(to)])

    def before(self, step: int, every: int, generation: int) -> Path | None:
        """The newest checkpoint of this start or its ancestors that has made at most `step` steps.

        One of those that are due every `every` steps, if there are any: those by the clock or a signal may come at
        any step, and a run that is repeated must take the same one.
        """
        older = [p for p in self.lineage(generation) if step_of(p) <= step]
        due = [p for p in older if every and step_of(p) % every == 0]
        return max(reversed(due or older), key=step_of, default=None)  # of equal steps the newest start's

    def settled(self, step: int, generation: int) -> bool:
        """Return True if the checkpoint is no longer in flight: removed, or published and the pointer moved to it."""
        if self.staging(step, generation).exists():
            return False
        final = self.checkpoint(step, generation)
        return not final.exists() or self._pointed() == final.name

    def latest(self) -> Path | None:
        """The checkpoint to resume from if it is whole; None if the run has published none, or is to begin anew."""
        return next(iter(self.candidates()), None)

    def candidates(self) -> list[Path]:
        """The checkpoints to resume from, each for the case that those before it are damaged.

        First the one that the pointer names; if it names none that is there, the newest: a lost pointer makes no new
        run. Then those that it descends from, then all others that are not newer; from the newest to the oldest.
        """
        name, published = self._pointed(), self.published()
        if name == BEGINNING:
            return []
        names = [p.name for p in published]
        older = published[: names.index(name) + 1] if name in names else published
        if not older:
            return []
        *older, first = older
        line = [p for p in self.lineage(start_of(first)) if p in older]
        return [first, *reversed(line), *(p for p in reversed(older) if p not in line)]

    def lineage(self, generation: int) -> list[Path]:
        """The checkpoints that a start has made or descends from, in the order of (start, step)."""
        upto: dict[int, float] = {generation: math.inf}  # the last step of each start that belongs to it
        while (facts := self.facts(generation)).get("from") is not None:
            match = _NAME.fullmatch(str(facts["from"]))
            if not match or int(match[2]) >= generation:
                break
            generation = int(match[2])
            upto[generation] = int(match[1])
        if "from" not in facts:  # a start of an older version: one line of starts, as far as is known
            upto |= dict.fromkeys(range(1, generation), upto[generation])
        return [p for p in self.published() if step_of(p) <= upto.get(start_of(p), -1)]

    def pointer_problem(self) -> str | None:
        """The reason in words why the pointer does not say which checkpoint is the latest; None if it does."""
        name = self._pointed()
        if name is None:
            return f"{self.pointer} is missing"
        known = name == BEGINNING or name in [p.name for p in self.published()]
        return None if known else f"{self.pointer} names {name!r}, which is not there"

    def _start(self, generation: int) -> Path:
        return self.generations / f"{generation:04d}"

    def facts(self, generation: int) -> dict[str, Any]:
        """The file of a start; {} if it is not there or damaged. Raises TransientError if it cannot be read now."""
        try:
            return read_json(self._start(generation), "the other starts count")
        except TransientError:
            raise
        except UserError:
            return {}

    def _pointed(self) -> str | None:
        """The name in the pointer; None if there is no pointer."""
        try:
            return self.pointer.read_text(encoding="ascii", errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def published(self) -> list[Path]:
        """All checkpoints, in the order of (start, step): the last is the newest."""
        named = [p for p in self.checkpoints.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
        return sorted(named, key=lambda p: (start_of(p), step_of(p)))

    def prune(self, keep: int, generation: int, *also: Path | None) -> list[Path]:
        """Delete all but the newest `keep`, the latest and `also`.

        Of the checkpoints that start `generation` has made or descends from: others are not its own to delete.
        """
        self.fence(generation)
        line = self.lineage(generation)
        kept = {*line[-keep:], self.latest(), *also}
        return self._delete([p for p in line if p not in kept])

    def _delete(self, checkpoints: list[Path]) -> list[Path]:
        for p in checkpoints:  # renamed first: a half-deleted checkpoint is never listed
            shutil.rmtree(p.rename(p.with_name(f".{p.name}.tmp")))
        return checkpoints

    def _point_to(self, name: str) -> None:
        publish(self.pointer, f"{name}\n".encode())

    @staticmethod
    def state(checkpoint: Path) -> dict[str, Any]:
        """The contents of a checkpoint's state.json: step, tokens, data state, val_loss, model, versions."""
        return read_json(checkpoint / STATE, DAMAGED)


def step_of(checkpoint: Path) -> int:
    """The number of steps that a published checkpoint has made, from its name."""
    return int(checkpoint.name.split(".")[0].removeprefix("step-"))


def start_of(checkpoint: Path) -> int:
    """The number of the start that published a checkpoint, from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as e:  # a stranded start still writes into it, and will publish nothing: left to the next start
        if e.errno not in (errno.ENOTEMPTY, errno.ENOENT):
            raise
