"""Weights that a run needs and never changes, such as DPO's reference: `RUN/reference/`.

    weights-*.safetensors index.json state.json tokenizer.json   as in the checkpoint that the run starts from
    manifest.json                                                bytes and sha256 of each

The first start copies them into `.reference.gen-N.tmp`, N its number, and renames that. Every start loads from there,
so that the checkpoint may then be deleted, or its run may go on.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch

from conf.errors import UserError
from data_pipeline.files import fsync_folder
from data_pipeline.manifest import TOKENIZER
from trainer.checkpoint.files import CHUNK, write_file
from trainer.checkpoint.find import find_checkpoint
from trainer.checkpoint.load import start_from
from trainer.checkpoint.verify import FORMAT, INDEX, MANIFEST, check_files
from trainer.checkpoint.write import as_json
from trainer.config.model import ModelConfig
from trainer.distributed.collective import all_ranks
from trainer.distributed.mesh import Mesh
from trainer.engine.engine import Engine
from trainer.engine.fragments import owned
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.run.folder import STATE, WEIGHTS, RunFolder

REFERENCE = "reference"
_UNFINISHED = re.compile(rf"\.{REFERENCE}\.gen-\d{{4,}}\.tmp")  # the names that a killed start leaves


def keep_reference(run: RunFolder, mesh: Mesh, init_from: str, *, resumed: bool) -> Path:
    """The folder of the reference, which rank 0 makes where a new run has none. Collective.

    Raises:
        UserError: on every rank: the copy cannot be made, or a run that goes on has lost its own.
    """
    folder = run.root / REFERENCE

    def make() -> bool:
        if folder.exists() or not mesh.world.is_main:
            return False
        if resumed:
            raise UserError(
                f"{run.root} has checkpoints and no {REFERENCE}/, the weights that the model is compared with: restore "
                "it, or give another run.name"
            )
        _copy(find_checkpoint(init_from, "init_from"), run)
        return True

    [made, *_] = all_ranks(f"{folder} cannot be used", make)
    if made and mesh.world.is_main:
        print(f"the reference: the weights of init_from={init_from} are copied to {folder}", flush=True)
    return folder


def load_reference(folder: Path, cfg: ModelConfig, mesh: Mesh, *, seed: int, sequence_parallel: bool) -> GPT:
    """A frozen model with the weights that a new run of this seed starts from. Collective.

    It has no dropout, and each rank of a tp group holds its whole part, whatever the ZeRO stage.
    """
    model = GPT(cfg, mesh, sequence_parallel=sequence_parallel).to(mesh.device)
    initialise(model, cfg, seed)  # the rows of special tokens that the checkpoint's vocabulary lacks
    start_from(folder, model, mesh)
    return model.requires_grad_(False).eval()


def check_start(engine: Engine, reference: GPT, init_from: str, folder: Path) -> None:
    """Compare the weights that a new run starts from with its reference, in the reference's dtype. Collective.

    Raises:
        UserError: on every rank, if they differ: `init_from` is not what it was when the copy was made.
    """
    weights = {name: p.detach().reshape(-1) for name, p in reference.named_parameters()}

    def compare() -> None:
        for f in owned(engine.module, engine.adam):
            own = f.views["master"]
            kept = weights[f.name][f.start : f.start + f.length].to(own.device)
            if not torch.equal(own.to(kept.dtype), kept):
                raise UserError(
                    f"{folder} holds other weights than init_from={init_from} has now ({f.name}): give the init_from "
                    "that this run began with, or another run.name"
                )

    all_ranks("the reference is not where the run starts", compare)


def _copy(source: Path, run: RunFolder) -> None:
    generation = run.newest_generation()
    for path in run.root.glob(f".{REFERENCE}.*"):
        if _UNFINISHED.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)
    staging = run.root / f".{REFERENCE}.gen-{generation:04d}.tmp"
    staging.mkdir()
    files, there = {}, check_files(source)
    for name in sorted({*there, TOKENIZER}):
        if name.startswith(WEIGHTS) or name in (INDEX, STATE, TOKENIZER):
            with (source / name).open("rb") as f:
                files[name] = write_file(staging / name, iter(lambda: f.read(CHUNK), b""))
            if files[name] != there.get(name, files[name]):
                raise UserError(f"{source / name}: its sha256 is not the manifest's: give another init_from")
    write_file(staging / MANIFEST, [as_json({"format": FORMAT, "files": files})])
    fsync_folder(staging)
    run.fence(generation)
    staging.rename(run.root / REFERENCE)
    fsync_folder(run.root)
