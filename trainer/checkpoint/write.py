"""What a checkpoint's threads do, one on each rank: files, and nothing else. trainer/checkpoint/save.py starts them.

    rank r: weights-r, moments-r, fsync -> rank-r.json
    rank 0: the same -> waits for every rank-*.json -> index, state, manifest, fsync -> journal
                     -> fence, rename, `latest` -> prune

A rank's `rank-*.json` is its part of the index, or its error. Training threads that wait look at the folder too: an
empty file `failed` tells them that nothing will come of it.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.files import fsync_folder, read_json
from data_pipeline.manifest import TOKENIZER
from trainer.checkpoint.files import FORMAT, INDEX, MANIFEST, MOMENTS, Source, write_file, write_safetensors
from trainer.config.model import ModelConfig
from trainer.config.pretrain import PretrainConfig
from trainer.distributed.mesh import Mesh
from trainer.engine.fragments import Fragment
from trainer.hf.weights import hf_config, hf_refusal, to_hf
from trainer.model.specs import specs
from trainer.run.folder import DAMAGED, STATE, WEIGHTS, RunFolder

FAILED = "failed"
PACKAGES = ("gradus", "torch", "deepspeed", "megatron-core", "safetensors")


class ElsewhereError(UserError):
    """What another rank's thread has said: its text names that rank."""


@dataclass(frozen=True)
class Save:
    """One checkpoint on its way. `fragments`: what this rank writes; `last` of the run: with Hugging Face's files.

    `back_to`: a checkpoint of so many steps or fewer stays, for the guard to go back to; None: none has to.
    """

    step: int
    aside: Path
    fragments: list[Fragment]
    state: bytes
    last: bool
    started: float  # time.monotonic
    back_to: int | None = None


@dataclass
class Writer:
    """One rank's writing for all of a run. `eot_id`: the end-of-text token, for Hugging Face's config.

    `flush`: called on rank 0 before a checkpoint is published; what it makes durable, a resumed run finds.
    `published`: called on rank 0 with the checkpoint, its step and the seconds since its save began.
    """

    cfg: PretrainConfig
    mesh: Mesh
    run: RunFolder
    generation: int
    config_text: str
    tokenizer: Path | None = None
    eot_id: int | None = None
    flush: Callable[[], None] = lambda: None
    published: Callable[[Path, int, float], None] = lambda *_: None
    abort: threading.Event = field(default_factory=threading.Event)  # another rank has failed: wait for no one
    patience_s: float = math.inf  # how long rank 0's thread waits while nothing happens in the folder

    def write(self, save: Save) -> None:
        """Returns when this rank's part is safe on disk, on rank 0 when the checkpoint is published.

        Raises:
            UserError: this rank could not write, or on rank 0: another one.
        """
        rank = self.mesh.world.rank
        try:
            self._write_part(save, rank)
            if rank == 0:
                self._publish(save, self._collect(save.aside))
        except Exception as e:
            with contextlib.suppress(OSError):
                (save.aside / FAILED).touch()
            if isinstance(e, (UserError, OSError)):
                self.run.fence(self.generation)  # a newer start clears the folder: then it is that, no missing file
            raise

    def watch(self, save: Save, patience_s: float, moved: Callable[[], None] = lambda: None) -> None:
        """Returns when the checkpoint is published or given up, or when for `patience_s` nothing happened to it.

        `moved`: called while it goes on.

        For a rank whose own part is written. No collective: those have a timeout, and a slow disk is no error.
        """
        pulse = FolderActivity(save.aside)
        while not self.run.settled(save.step, self.generation) and not (save.aside / FAILED).exists():
            if pulse.silence_s() > patience_s:
                return
            moved()
            time.sleep(0.05)

    def _write_part(self, save: Save, rank: int) -> None:
        """This rank's files, then its note for rank 0. After an error the files go: they may be what fills the disk."""
        names = {prefix: f"{prefix}-{rank:05d}.safetensors" for prefix in (WEIGHTS, MOMENTS)}
        tensors = {f"{kind}/{f.name}": view for f in save.fragments for kind, view in f.views.items()}
        kinds = {
            WEIGHTS: {name: t for name, t in tensors.items() if name.startswith("master/")},
            MOMENTS: {name: t for name, t in tensors.items() if not name.startswith("master/")},
        }
        try:
            part = {
                "files": {name: write_safetensors(save.aside / name, kinds[prefix]) for prefix, name in names.items()},
                "tp_rank": self.mesh.tp_rank,
                **names,
                "fragments": [[f.name, f.start, f.length] for f in save.fragments],
            }
            _note(save.aside, rank, part)
        except Exception as e:
            with contextlib.suppress(OSError, UserError):  # then rank 0 hears of it from its training thread
                for name in names.values():
                    (save.aside / name).unlink(missing_ok=True)
                _note(save.aside, rank, {"error": str(e) or repr(e)})
            raise

    def _collect(self, aside: Path) -> list[dict[str, Any]]:
        """Every rank's part of the index, when all have written."""
        world_size = self.mesh.world.world_size
        parts: dict[int, dict[str, Any]] = {}
        pulse: FolderActivity | None = None
        while len(parts) < world_size:
            there = {path.name for path in aside.iterdir()}
            for rank in range(world_size):
                if rank not in parts and _note_name(rank) in there:
                    parts[rank] = read_json(aside / _note_name(rank), DAMAGED)
                    if "error" in parts[rank]:
                        raise ElsewhereError(f"{parts[rank]['error']} (rank {rank})")
            if self.patience_s < math.inf:
                pulse = pulse or FolderActivity(aside)  # patience begins when the run ends
                missing = [rank for rank in range(world_size) if rank not in parts]
                if pulse.silence_s() > self.patience_s:
                    raise UserError(f"the run is at its end, and ranks {missing} have not written theirs")
            if len(parts) < world_size and self.abort.wait(0.05):
                raise ElsewhereError("another rank could not write")
        for rank in range(world_size):
            (aside / _note_name(rank)).unlink()
        return [parts[rank] for rank in range(world_size)]

    def _publish(self, save: Save, parts: list[dict[str, Any]]) -> None:
        """The files that are one for all ranks, and the rename that makes a checkpoint of the folder."""
        aside, cfg = save.aside, self.cfg
        files = {name: info for part in parts for name, info in part.pop("files").items()}
        text = {
            INDEX: as_json(_index(cfg.model, self.mesh.tp, parts)),
            STATE: save.state,
            "config.yaml": self.config_text.encode(),
        }
        if self.tokenizer is not None:
            text[TOKENIZER] = self.tokenizer.read_bytes()
        files |= {name: write_file(aside / name, [body]) for name, body in text.items()}
        if save.last and hf_refusal(cfg.model) is None:  # the introduction has said it
            files |= _write_hf(aside, cfg.model, self.eot_id)
        write_file(aside / MANIFEST, [as_json({"format": FORMAT, "files": dict(sorted(files.items()))})])
        fsync_folder(aside)
        self.flush()
        path = self.run.publish(aside, save.step, self.generation)
        _afterwards("its line is not told", lambda: self.published(path, save.step, time.monotonic() - save.started))
        _afterwards("an old one is not removed", lambda: self._prune(save))

    def _prune(self, save: Save) -> None:
        kept, every = self.cfg.checkpoint, self.cfg.checkpoint.every_steps
        also = None if save.back_to is None else self.run.before(save.back_to, every)
        self.run.prune(kept.keep, kept.keep_best, also)


class FolderActivity:
    """Whether a folder that others write into still changes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._since = self._looked = time.monotonic()
        self._state = self._look()

    def silence_s(self) -> float:
        """Seconds since it was last seen to change. Looks at most once a second: each look asks for every file."""
        now = time.monotonic()
        if now - self._looked >= 1.0:
            before, self._state, self._looked = self._state, self._look(), now
            self._since = self._since if self._state == before else now
        return now - self._since

    def _look(self) -> tuple[int, int]:
        """(files, bytes)"""
        files = size = 0
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # it has just got its name, or is removed
            for path in self._folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # a note that has just got its name
                    size += path.stat().st_size
                    files += 1
        return files, size


def _afterwards(what: str, function: Callable[[], object]) -> None:
    """What follows a published checkpoint: it stands, whatever becomes of this."""
    try:
        function()
    except (UserError, OSError) as e:
        with contextlib.suppress(OSError):
            print(f"checkpoint: {what}: {e}", file=sys.stderr, flush=True)


def describe(cfg: PretrainConfig, mesh: Mesh, step: int, optimizer_step: int, state: dict[str, Any]) -> bytes:
    """state.json: what the loop wants back, and what this checkpoint is of."""
    body = {
        **state,
        "format": FORMAT,
        "step": step,
        "optimizer": cfg.optim.kind.value,
        "optimizer_step": optimizer_step,
        "model": {**asdict(cfg.model), "norm": cfg.model.norm.value},
        "layout": {
            "dp": mesh.dp,
            "tp": mesh.tp,
            "zero_stage": cfg.parallel.zero_stage,
            "precision": cfg.precision.value,
        },
        "versions": {name: _version(name) for name in PACKAGES},
    }
    return as_json(body)


def _note_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _note(aside: Path, rank: int, body: dict[str, Any]) -> None:
    """Whole or not at all: rank 0 is looking."""
    half = aside / f".{_note_name(rank)}"
    write_file(half, [as_json(body)])
    half.rename(aside / _note_name(rank))


def _write_hf(folder: Path, cfg: ModelConfig, eot_id: int | None) -> dict[str, dict[str, Any]]:
    """Hugging Face's two files, from the fragments that all ranks have just written."""
    weights = to_hf(dict(Source(folder)), cfg)
    return {
        "model.safetensors": write_safetensors(folder / "model.safetensors", weights),
        "config.json": write_file(folder / "config.json", [as_json(hf_config(cfg, eot_id))]),
    }


def _index(cfg: ModelConfig, tp: int, parts: list[dict[str, Any]]) -> dict[str, Any]:
    parameters = {name: asdict(spec) for name, spec in specs(cfg, tp).items()}
    return {"format": FORMAT, "tp": tp, "parameters": parameters, "ranks": parts}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return None


def as_json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode()
