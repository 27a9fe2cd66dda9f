"""One checkpoint format for every layout: written in fragments by whoever owns them, read by any (dp, tp, ZeRO stage).

    weights-00000.safetensors   what rank 0 owns of the fp32 masters: tensors `master/<parameter>`, 1-D
    moments-00000.safetensors   and of Adam's moments: `exp_avg/<parameter>`, `exp_avg_sq/<parameter>`
    index.json                  parameters (true shape, padded shape, tp dimension) and, for each rank, its fragments:
                                [parameter, start, length] in the flattened parameter as it lay on that tp rank
    state.json                  step, tokens, data state, validation loss, model, layout, versions
    config.yaml tokenizer.json  the run's config and tokenizer
    model.safetensors config.json   the weights under Hugging Face's names, in the last checkpoint of a run
    manifest.json               bytes and sha256 of every other file

Saving gathers nothing: ranks write side by side, and only names, sizes and errors are exchanged.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_pipeline.config import UserError
from data_pipeline.manifest import TOKENIZER
from trainer.config import CheckpointConfig, ModelConfig
from trainer.engine import Engine
from trainer.fragments import get_optimizer_step, owned, set_optimizer_step
from trainer.model.gpt import GPT
from trainer.model.hf import hf_config, to_hf
from trainer.model.layout import specs
from trainer.parallel import Mesh
from trainer.run_folder import STATE, WEIGHTS, RunFolder, check_model, fsync_folder, model_of
from trainer.weights import (
    FORMAT,
    INDEX,
    MANIFEST,
    MOMENTS,
    Source,
    check_files,
    verify,
    write_file,
    write_safetensors,
)

T = TypeVar("T")
PACKAGES = ("gradus", "torch", "deepspeed", "megatron-core", "safetensors")


def save(
    engine: Engine,
    run: RunFolder,
    *,
    step: int,
    state: dict[str, Any],
    generation: int,
    config_text: str,
    tokenizer: Path | None,
    hf: bool = False,
    eot_id: int | None = None,
) -> Path:
    """Write and publish the checkpoint of `step`, then prune. Collective.

    `state`: what the loop wants back, JSON; `val_loss` in it ranks checkpoints. `hf`: add Hugging Face's files,
    in which `eot_id` is the end-of-text token.

    Raises:
        UserError: on every rank, when any could not write; the checkpoints published before stand.
    """
    aside, is_main = run.aside(step, generation), engine.mesh.world.is_main
    what = f"the checkpoint of step {step} is not written, the one before it stands"

    def complete(parts: list[dict[str, Any]]) -> None:
        files = {name: info for part in parts for name, info in part.pop("files").items()}
        text = {
            INDEX: _json(_index(engine, parts)),
            STATE: _json(_state(engine, step, state)),
            "config.yaml": config_text.encode(),
        }
        if tokenizer is not None:
            text[TOKENIZER] = tokenizer.read_bytes()
        files |= {name: write_file(aside / name, [body]) for name, body in text.items()}
        if hf:
            files |= _write_hf(aside, engine.cfg.model, eot_id)
        write_file(aside / MANIFEST, [_json({"format": FORMAT, "files": dict(sorted(files.items()))})])
        fsync_folder(aside)
        run.publish(aside, step, generation)

    try:
        together(what, lambda: aside.mkdir(parents=True) if is_main else None)
        parts = together(what, lambda: _write_fragments(engine, aside))
        together(what, lambda: complete(parts) if is_main else None)
    except Exception:
        if is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if is_main:
        _prune(run, engine.cfg.checkpoint)
    return run.checkpoint(step, generation)


def _prune(run: RunFolder, cfg: CheckpointConfig) -> None:
    try:
        run.prune(cfg.keep, cfg.keep_best)
    except (UserError, OSError) as e:  # the checkpoint stands; what is left over costs room, not the run
        print(f"checkpoint: an old one is not removed: {e}", file=sys.stderr, flush=True)


def read_state(path: Path) -> dict[str, Any]:
    """state.json, once the manifest's files are all there with their sizes; `model` holds ModelConfig's arguments.

    Raises:
        UserError: a file that is missing, of another size or damaged, by name.
    """
    verify(path, check_files(path), [STATE])
    state = RunFolder.state(path)
    if state.get("format") != FORMAT:
        raise UserError(f"{path / STATE}: not a checkpoint of format {FORMAT}")
    return {**state, "model": vars(model_of(path, state))}


def assemble(path: Path) -> Source:
    """The weights of a checkpoint by parameter name, fp32, in their true shapes; each is read when it is asked for."""
    files = check_files(path)
    verify(path, files, [f for f in files if not f.startswith(MOMENTS)])
    return Source(path)


def load_weights(path: Path, model: GPT, mesh: Mesh) -> None:
    """Put the masters into a plain module, before DeepSpeed gets it. Collective.

    Raises:
        UserError: on every rank: a damaged file, or a checkpoint of another model.
    """
    source = _open(path, model.cfg, lambda name: not name.startswith(MOMENTS))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(source.part("master", name, mesh.tp_rank, mesh.tp, 0, p.numel()).view_as(p))


def restore(path: Path, engine: Engine) -> None:
    """Put masters, moments and the optimizer's step into a live engine whose module has these weights. Collective."""
    source = _open(path, engine.cfg.model, lambda name: True)
    mesh = engine.mesh
    with torch.no_grad():
        for f in owned(engine.module, engine.adam):
            for kind, view in f.views.items():
                view.copy_(source.part(kind, f.name, mesh.tp_rank, mesh.tp, f.start, f.length))
    set_optimizer_step(engine.adam, int(RunFolder.state(path)["optimizer_step"]))


def together(what: str, function: Callable[[], T]) -> list[T]:
    """`function` on every rank, and what it returned on each; an error on any rank is a UserError on all."""
    result, mine, message = None, None, None
    try:
        result = function()
    except Exception as e:
        mine, message = e, str(e) if isinstance(e, (UserError, OSError)) else repr(e)
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (message, result))
    if mine is not None and not isinstance(mine, (UserError, OSError)):
        raise mine  # a defect of the program keeps its traceback
    failed = next((f"{m} (rank {rank})" for rank, (m, _) in enumerate(answers) if m is not None), None)
    if failed:
        raise UserError(f"{what}: {failed}") from mine
    return [r for _, r in answers]


def _open(path: Path, cfg: ModelConfig, wanted: Callable[[str], bool]) -> Source:
    """A source whose files are verified, each by one rank."""

    def check() -> None:
        files = check_files(path)
        verify(path, files, sorted(filter(wanted, files))[dist.get_rank() :: dist.get_world_size()])

    together(f"{path} cannot be loaded", check)
    source = Source(path)
    check_model(path, source.cfg, cfg)
    return source


def _write_fragments(engine: Engine, folder: Path) -> dict[str, Any]:
    """This rank's files and what is in them. What is the same on all tp ranks, tp rank 0 writes."""
    mesh, spec = engine.mesh, specs(engine.cfg.model, engine.mesh.tp)
    mine = [f for f in owned(engine.module, engine.adam) if mesh.tp_rank == 0 or spec[f.name].tp_dim is not None]
    names = {prefix: f"{prefix}-{mesh.world.rank:05d}.safetensors" for prefix in (WEIGHTS, MOMENTS)}
    tensors = {
        names[WEIGHTS]: {f"master/{f.name}": f.views["master"] for f in mine},
        names[MOMENTS]: {f"{k}/{f.name}": f.views[k] for f in mine for k in ("exp_avg", "exp_avg_sq")},
    }
    return {
        "files": {name: write_safetensors(folder / name, t) for name, t in tensors.items()},
        "tp_rank": mesh.tp_rank,
        **names,
        "fragments": [[f.name, f.start, f.length] for f in mine],
    }


def _write_hf(folder: Path, cfg: ModelConfig, eot_id: int | None) -> dict[str, dict[str, Any]]:
    """Hugging Face's two files, from the fragments that all ranks have just written."""
    weights = to_hf(dict(Source(folder)), cfg)
    return {
        "model.safetensors": write_safetensors(folder / "model.safetensors", weights),
        "config.json": write_file(folder / "config.json", [_json(hf_config(cfg, eot_id))]),
    }


def _index(engine: Engine, parts: list[dict[str, Any]]) -> dict[str, Any]:
    tp = engine.mesh.tp
    parameters = {name: asdict(spec) for name, spec in specs(engine.cfg.model, tp).items()}
    return {"format": FORMAT, "tp": tp, "parameters": parameters, "ranks": parts}


def _state(engine: Engine, step: int, state: dict[str, Any]) -> dict[str, Any]:
    cfg, mesh = engine.cfg, engine.mesh
    return {
        **state,
        "format": FORMAT,
        "step": step,
        "optimizer_step": get_optimizer_step(engine.adam),
        "model": {**asdict(cfg.model), "norm": cfg.model.norm.value},
        "layout": {
            "dp": mesh.dp,
            "tp": mesh.tp,
            "zero_stage": cfg.parallel.zero_stage,
            "precision": cfg.precision.value,
        },
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return None


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode()
