"""One checkpoint format for every layout: written in fragments by whoever owns them, read by any (dp, tp, ZeRO stage).

    weights-00000.safetensors   what rank 0 owns of the fp32 masters: tensors `master/<parameter>`, 1-D
    moments-00000.safetensors   and of the optimizer's moments: AdamW's `exp_avg/<parameter>` and
                                `exp_avg_sq/<parameter>`, Muon's `momentum_buffer/<parameter>`
    index.json                  parameters (true shape, padded shape, tp dimension) and, for each rank, its fragments:
                                [parameter, start, length] in the flattened parameter as it lay on that tp rank
    state.json                  step, tokens, data state, validation loss, model, layout, versions
    config.yaml tokenizer.json  the run's config and tokenizer
    model.safetensors config.json   the weights under Hugging Face's names, in the last checkpoint of a run
    manifest.json               bytes and sha256 of every other file

Saving gathers nothing: all ranks write at once, and only names, sizes and errors are exchanged (save.py). This module
reads checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from conf.errors import UserError
from trainer.checkpoint.files import MOMENTS, SavedWeights
from trainer.checkpoint.find import check_model
from trainer.checkpoint.verify import check_files, verify
from trainer.config.model import ModelConfig
from trainer.distributed.collective import all_ranks
from trainer.distributed.mesh import Mesh
from trainer.engine.fragments import owned, set_optimizer_step
from trainer.model.gpt import GPT
from trainer.model.specs import ParamSpec
from trainer.run.folder import RunFolder

if TYPE_CHECKING:
    from trainer.engine.engine import Engine  # imports DeepSpeed, which whoever only reads weights does not need

TOKENS = "wte.weight"


def assemble(path: Path) -> SavedWeights:
    """The weights of a checkpoint by parameter name, fp32, in their true shapes; each is read when it is asked for."""
    files = check_files(path)
    verify(path, files, [f for f in files if not f.startswith(MOMENTS)])
    return SavedWeights(path)


def load_weights(path: Path, model: GPT, mesh: Mesh, *, verified: bool = False) -> None:
    """Put the masters into a plain module, before DeepSpeed gets it. Collective.

    Parameters that the module lacks, such as a head's, are left in the file. `verified`: this process has compared the
    files with the manifest.

    Raises:
        UserError: on every rank: a damaged file, or a checkpoint of another model or of fewer parts.
    """
    if not verified:
        _verify(path, mesh, lambda name: not name.startswith(MOMENTS))
    source, specs = _open(path, model.cfg), model.specs()
    _check_parameters(path, source, specs)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(source.part("master", name, specs[name], mesh.tp_rank, mesh.tp, 0, p.numel()).view_as(p))


def start_from(path: Path, model: GPT, mesh: Mesh) -> None:
    """Put the masters of another kind of run into a plain module whose parameters have their first values. Collective.

    Heads that the checkpoint lacks keep theirs, and so do the rows of ids that its vocabulary lacks.

    Raises:
        UserError: on every rank: a damaged file, or a trunk of another shape.
    """
    _verify(path, mesh, lambda name: not name.startswith(MOMENTS))
    source, specs = SavedWeights(path), model.specs()
    rows = min(source.cfg.vocab_size, model.cfg.vocab_size)
    check_model(path, replace(source.cfg, vocab_size=rows), replace(model.cfg, vocab_size=rows))
    own = {name: spec for name, spec in specs.items() if name in source.specs}
    _check_parameters(path, source, {name: spec for name, spec in own.items() if name != TOKENS})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == TOKENS:
                first = mesh.tp_rank * len(p)  # of the ids that this tp rank holds
                known = source[name][:rows][first : first + len(p)]
                p[: len(known)].copy_(known)
            elif name in own:
                p.copy_(source.part("master", name, specs[name], mesh.tp_rank, mesh.tp, 0, p.numel()).view_as(p))


def restore(path: Path, engine: Engine, *, verified: bool = False) -> None:
    """Put masters, moments and the optimizer's step into a live engine whose module has these weights. Collective.

    `verified`: as in `load_weights`.
    """
    mesh = engine.mesh
    if not verified:
        _verify(path, mesh, lambda name: True)
    source, specs = _open(path, engine.module.cfg), engine.specs
    _check_parameters(path, source, specs, {name for name in source if name not in specs})
    with torch.no_grad():
        for f in owned(engine.module, engine.adam):
            for kind, view in f.views.items():
                view.copy_(source.part(kind, f.name, specs[f.name], mesh.tp_rank, mesh.tp, f.start, f.length))
    set_optimizer_step(engine.adam, int(RunFolder.state(path)["optimizer_step"]))


def _check_parameters(
    path: Path, source: SavedWeights, specs: Mapping[str, ParamSpec], left_over: Iterable[str] = ()
) -> None:
    """Raises UserError naming parameters that the checkpoint lacks, has in another shape, or has `left_over`."""
    wrong = [f"no {name}" for name in specs if name not in source.specs]
    wrong += [f"{name}, which this run has not" for name in sorted(left_over)]
    pairs = {name: (source.specs[name].shape, spec.shape) for name, spec in specs.items() if name in source.specs}
    wrong += [f"{name} of {list(theirs)}, not {list(ours)}" for name, (theirs, ours) in pairs.items() if theirs != ours]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{path} has {', '.join(wrong[:3])}{more}: it is of another kind of run, give one of this kind")


def _verify(path: Path, mesh: Mesh, wanted: Callable[[str], bool]) -> None:
    """Compare files with the manifest, each on one rank. Collective."""

    def check() -> None:
        files = check_files(path)
        verify(path, files, sorted(filter(wanted, files))[mesh.world.rank :: mesh.world.world_size])

    all_ranks(f"{path} cannot be loaded", check)


def _open(path: Path, cfg: ModelConfig) -> SavedWeights:
    source = SavedWeights(path)
    check_model(path, source.cfg, cfg)
    return source
