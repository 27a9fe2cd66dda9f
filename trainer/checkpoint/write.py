"""The threads that write a checkpoint, one on each rank: files alone, no collective. save.py starts them.

    rank r: weights-r, moments-r, fsync -> rank-r.json
    rank 0: the same -> waits for every rank-*.json -> index, state, manifest, fsync -> journal
                     -> fence, rename, `latest` -> prune

A rank's `rank-*.json` is its part of the index, or its error. Training threads that wait read the folder too: an empty
file `failed` says that the checkpoint is given up.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from conf.errors import UserError
from data_pipeline.files import fsync_folder, read_json
from data_pipeline.manifest import TOKENIZER
from trainer.checkpoint.files import MOMENTS, SavedWeights, index_of, write_file, write_safetensors
from trainer.checkpoint.ranking import best
from trainer.checkpoint.verify import FORMAT, INDEX, MANIFEST
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.model import ModelConfig
from trainer.config.optim import OptimConfig
from trainer.config.parallel import ParallelConfig, Precision
from trainer.distributed.mesh import Mesh
from trainer.engine.fragments import Fragment
from trainer.hf.settings import hf_refusal
from trainer.hf.weights import hf_config, to_hf
from trainer.model.specs import ParamSpec
from trainer.run.folder import DAMAGED, STATE, WEIGHTS, RunFolder

FAILED = "failed"
PACKAGES = ("gradus", "torch", "deepspeed", "megatron-core", "safetensors")


class ElsewhereError(UserError):
    """An error of another rank's thread; its text names that rank."""


@dataclass(frozen=True)
class Save:
    """One checkpoint in flight. `fragments`: those that this rank writes; `last` of the run: with Hugging Face's files.

    `back_to`: a checkpoint of so many steps or fewer is kept, for the guard to roll back to; None: none has to be.
    """

    step: int
    staging: Path  # the folder that gets the checkpoint's name when it is complete
    fragments: list[Fragment]
    state: bytes
    last: bool
    started: float  # time.monotonic
    back_to: int | None = None


@dataclass
class Writer:
    """Writes one rank's part of every checkpoint of a run.

    Args:
        specs: every parameter of the module, by name.
        facts: the part of state.json that all checkpoints share (`run_facts`).
        eot_id: the end-of-text token, for Hugging Face's config.
        flush: called on rank 0 before a checkpoint is published; a resumed run finds what it makes durable.
        published: called on rank 0 with the checkpoint, its step and the seconds since its save began.
        abort: set when no rank is to wait for another any more, for one has failed or is gone.
    """

    model: ModelConfig
    specs: Mapping[str, ParamSpec]
    config: CheckpointConfig
    mesh: Mesh
    run: RunFolder
    generation: int
    config_text: str
    facts: dict[str, Any] = field(default_factory=dict)
    tokenizer: bytes | None = None  # of its tokenizer.json
    eot_id: int | None = None
    flush: Callable[[], None] = lambda: None
    published: Callable[[Path, int, float], None] = lambda *_: None
    abort: threading.Event = field(default_factory=threading.Event)

    def write(self, save: Save) -> None:
        """Returns when this rank's part is safe on disk, on rank 0 when the checkpoint is published.

        Raises:
            UserError: this rank could not write, or on rank 0: another one.
        """
        rank = self.mesh.world.rank
        try:
            self._write_part(save, rank)
            if rank == 0:
                self._publish(save, self._collect(save.staging))
        except Exception as e:
            with contextlib.suppress(OSError):
                (save.staging / FAILED).touch()
            if isinstance(e, (UserError, OSError)):
                self.run.fence(self.generation)  # a newer start clears the folder: then it is that, no missing file
            raise

    def is_settled(self, save: Save) -> bool:
        """Return True if the checkpoint is published or given up, as far as the folder shows."""
        return self.run.settled(save.step, self.generation) or (save.staging / FAILED).exists()

    def _write_part(self, save: Save, rank: int) -> None:
        """Write this rank's files, then its note for rank 0. After an error, delete the files: the disk may be full."""
        names = {prefix: f"{prefix}-{rank:05d}.safetensors" for prefix in (WEIGHTS, MOMENTS)}
        tensors = {f"{kind}/{f.name}": view for f in save.fragments for kind, view in f.views.items()}
        kinds = {
            WEIGHTS: {name: t for name, t in tensors.items() if name.startswith("master/")},
            MOMENTS: {name: t for name, t in tensors.items() if not name.startswith("master/")},
        }
        try:
            part = {
                "files": {
                    name: write_safetensors(save.staging / name, kinds[prefix]) for prefix, name in names.items()
                },
                "tp_rank": self.mesh.tp_rank,
                **names,
                "fragments": [[f.name, f.start, f.length] for f in save.fragments],
            }
            _note(save.staging, rank, part)
        except Exception as e:
            with contextlib.suppress(OSError, UserError):  # then rank 0 hears of it from its training thread
                for name in names.values():
                    (save.staging / name).unlink(missing_ok=True)
                _note(save.staging, rank, {"error": str(e) or repr(e)})
            raise

    def _collect(self, staging: Path) -> list[dict[str, Any]]:
        """Every rank's part of the index, when all have written."""
        world_size = self.mesh.world.world_size
        parts: dict[int, dict[str, Any]] = {}
        while True:
            names = {path.name for path in staging.iterdir()}
            for rank in range(world_size):
                if rank not in parts and _note_name(rank) in names:
                    parts[rank] = read_json(staging / _note_name(rank), DAMAGED)
                    if "error" in parts[rank]:
                        raise ElsewhereError(f"{parts[rank]['error']} (rank {rank})")
            missing = [rank for rank in range(world_size) if rank not in parts]
            if not missing:
                break
            if self.abort.wait(0.05):
                raise ElsewhereError(f"ranks {missing} have not written theirs, and nobody waits for them any more")
        for rank in range(world_size):
            (staging / _note_name(rank)).unlink()
        return [parts[rank] for rank in range(world_size)]

    def _publish(self, save: Save, parts: list[dict[str, Any]]) -> None:
        """Write the files that all ranks share, and rename the folder to the checkpoint."""
        staging = save.staging
        files = {name: info for part in parts for name, info in part.pop("files").items()}
        text = {
            INDEX: as_json(index_of(self.specs, self.mesh.tp, parts)),
            STATE: save.state,
            "config.yaml": self.config_text.encode(),
        }
        if self.tokenizer is not None:
            text[TOKENIZER] = self.tokenizer
        files |= {name: write_file(staging / name, [body]) for name, body in text.items()}
        if save.last and hf_refusal(self.model) is None:  # the run's summary has said it
            files |= _write_hf(staging, self.model, self.eot_id)
        write_file(staging / MANIFEST, [as_json({"format": FORMAT, "files": dict(sorted(files.items()))})])
        fsync_folder(staging)
        self.flush()
        path = self.run.publish(staging, save.step, self.generation)
        _afterwards("its line is not printed", lambda: self.published(path, save.step, time.monotonic() - save.started))
        _afterwards("an old one is not removed", lambda: self._prune(save))

    def _prune(self, save: Save) -> None:
        every, generation, line = self.config.every_steps, self.generation, self.run.lineage(self.generation)
        also = None if save.back_to is None else self.run.before(save.back_to, every, generation)
        ranked = best((p, self.run.state(p)) for p in line) if self.config.keep_best else None
        self.run.prune(self.config.keep, generation, also, ranked)


class FolderActivity:
    """Measures for how long a folder that others write into has not changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._since = time.monotonic()
        self._looked = self._since
        self._state = self._look()

    def silence_s(self) -> float:
        """Seconds since it was last seen to change. Looks at most once a second: each look asks for every file."""
        now = time.monotonic()
        if now - self._looked >= 1.0:
            self._looked = now
            state = self._look()
            if state != self._state:
                self._state = state
                self._since = now
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
    """Run what follows a published checkpoint, which stays whatever this raises."""
    try:
        function()
    except (UserError, OSError) as e:
        with contextlib.suppress(OSError):
            print(f"checkpoint: {what}: {e}", file=sys.stderr, flush=True)


def run_facts(
    optim: OptimConfig, model: ModelConfig, parallel: ParallelConfig, precision: Precision, mesh: Mesh
) -> dict[str, Any]:
    """The part of state.json that all checkpoints of a start share."""
    return {
        "format": FORMAT,
        "optimizer": optim.kind.value,
        "model": model.as_json(),
        "layout": {"dp": mesh.dp, "tp": mesh.tp, "zero_stage": parallel.zero_stage, "precision": precision.value},
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _note_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _note(staging: Path, rank: int, body: dict[str, Any]) -> None:
    """Write the note whole or not at all: rank 0 may read it at any moment."""
    half = staging / f".{_note_name(rank)}"
    write_file(half, [as_json(body)])
    half.rename(staging / _note_name(rank))


def _write_hf(folder: Path, cfg: ModelConfig, eot_id: int | None) -> dict[str, dict[str, Any]]:
    """Hugging Face's two files, from the fragments that all ranks have just written."""
    weights = to_hf(dict(SavedWeights(folder)), cfg)
    return {
        "model.safetensors": write_safetensors(folder / "model.safetensors", weights),
        "config.json": write_file(folder / "config.json", [as_json(hf_config(cfg, eot_id))]),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return None


def as_json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode()
