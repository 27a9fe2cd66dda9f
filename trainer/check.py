"""What can be refused of a run before torch is imported: on its ranks, and on a login node before it is sent."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, NamedTuple

from conf.errors import UserError
from data_pipeline.order.geometry import Geometry
from trainer.checkpoint.find import check_model, model_of
from trainer.config.optim import Kind
from trainer.config.pretrain import PretrainConfig
from trainer.config.tracking import check_tracking
from trainer.config.train import Resume
from trainer.data.sources import Sources, check_cache, check_past, check_sources, open_sources, plan_run
from trainer.distributed.world import World
from trainer.engine.schedule import lr_at
from trainer.init_from import check_init_from
from trainer.plan.choose import resumed, settle
from trainer.plan.layout_rules import check_layout
from trainer.run.folder import RunFolder
from trainer.run.redact import refuse_secrets


class Checked(NamedTuple):
    """A run that may start: its config with nothing left open, and what was found on the way."""

    cfg: PretrainConfig
    geometry: Geometry
    sources: Sources
    state: dict[str, Any]  # of the checkpoint that it goes on from, {} for a new run
    chosen: str  # what the plan chose, in words; "" where nothing was open


def check(cfg: PretrainConfig, world: World) -> Checked:
    """Raises UserError for a run that cannot be: its layout, its data, its tracker, its past or its length."""
    cfg, chosen = settle(cfg, world)
    geometry = check_layout(cfg, world.world_size)
    sources = open_sources(cfg.data)
    check_sources(cfg, sources)
    check_cache(cfg, sources, world)
    check_tracking(cfg.tracking)
    check_shown(cfg)
    state = check_resume(cfg, sources)
    if chosen:
        chosen += resumed(state.get("layout", {}))
    sources = sources._replace(past=state.get("data", {}).get("sources", {}))
    plan = plan_run(cfg, sources, state)
    tokens = plan.ledger.tokens(cfg.max_steps)
    lr_at(cfg.optim.schedule, cfg.optim.lr, step=0, max_steps=cfg.max_steps, tokens=0, step_tokens=0, end_tokens=tokens)
    return Checked(cfg, geometry, sources, state, chosen)


def check_shown(cfg: PretrainConfig) -> None:
    """Raises UserError for a config that cannot be shown, and for a model that a registry cannot hold."""
    refuse_secrets(asdict(cfg))
    if cfg.tracking.register is not None and cfg.model.sparse_layers:
        raise UserError(
            f"tracking.register={cfg.tracking.register}, but a model of model.attention={cfg.model.attention} has no "
            "Hugging Face files to register: give tracking.register=null"
        )


def check_resume(cfg: PretrainConfig, sources: Sources) -> dict[str, Any]:
    """The state to resume from, {} for a new run.

    Raises:
        UserError: the run folder is not what `resume` asks for, or holds another run.
    """
    folder = RunFolder(cfg.run.dir)
    latest = folder.latest()
    if latest is None:
        if cfg.resume is Resume.must:
            raise UserError(
                f"resume=must, but {cfg.run.dir} holds no checkpoint: give the run's own run.dir, or resume=auto"
            )
        check_init_from(cfg, sources)
        return {}
    if cfg.resume is Resume.never:
        raise UserError(f"resume=never, but {cfg.run.dir} holds {latest.name}: give another run.name, or resume=auto")
    state = folder.state(latest)
    check_model(latest, model_of(latest, state), cfg.model)
    if (then := state.get("optimizer", Kind.adamw.value)) != cfg.optim.kind.value:  # older ones do not say: all AdamW
        raise UserError(
            f"optim.kind={cfg.optim.kind.value}, but {latest.name} of {cfg.run.dir} has the moments of {then}: "
            "give the old kind, or another run.name"
        )
    check_past(cfg, sources, latest.name, state)
    if state.get("step", 0) > cfg.max_steps:
        raise UserError(
            f"max_steps={cfg.max_steps}, but {cfg.run.dir} is at step {state['step']}: give more, or another run.name"
        )
    return state
