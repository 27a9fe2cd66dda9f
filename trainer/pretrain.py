"""Entry: `python -m trainer.pretrain`, alone or under torchrun, deepspeed or Slurm.

Everything that can be refused is refused here, before torch is imported.
"""

from __future__ import annotations

import hashlib

from conf.schema import freeze, run
from data_pipeline.config import UserError
from data_pipeline.manifest import TOKENIZER, Manifest, read_manifest
from trainer.config import PretrainConfig, Resume, check_layout
from trainer.run_folder import RunFolder, check_model, model_of
from trainer.schedule import lr_at
from trainer.tracking import check_tracking
from trainer.world import read_world


def pretrain(cfg: PretrainConfig) -> None:
    world = read_world()
    geometry = check_layout(cfg, world.world_size)
    train, val = (read_manifest(folder) for folder in (cfg.data.train, cfg.data.val))
    check_data(cfg, train, val)
    lr_at(
        cfg.optim.schedule, cfg.optim.lr, step=0, tokens=0, max_steps=cfg.max_steps, tokens_per_step=cfg.tokens_per_step
    )
    check_tracking(cfg.tracking)
    check_resume(cfg, train)
    from trainer.loop import Trainer  # from here on torch, deepspeed and megatron

    with Trainer(cfg, freeze(cfg), world, geometry, train, val) as trainer:
        trainer.train()


def check_data(cfg: PretrainConfig, train: Manifest, val: Manifest) -> None:
    """Raises UserError where the shards do not fit the model."""
    n_ctx = cfg.model.n_ctx
    if train.tokenizer_sha256 != val.tokenizer_sha256:
        raise UserError(f"{train.root} and {val.root} were written with different tokenizers: write both anew")
    for manifest in (train, val):
        tokenizer = manifest.root / TOKENIZER
        if not tokenizer.is_file() or hashlib.sha256(tokenizer.read_bytes()).hexdigest() != manifest.tokenizer_sha256:
            raise UserError(f"{tokenizer} is not the tokenizer that the shards were written with: put it back")
        if manifest.vocab_size != cfg.model.vocab_size:
            raise UserError(
                f"{manifest.root} was written with a vocabulary of {manifest.vocab_size}, model={cfg.model.name} has "
                f"model.vocab_size={cfg.model.vocab_size}: give model.vocab_size={manifest.vocab_size}, "
                "or shards of another tokenizer"
            )
        if not any(shard.windows(n_ctx) for shard in manifest.shards):
            raise UserError(
                f"{manifest.root} holds {manifest.tokens} tokens in {len(manifest.shards)} shards, none with a window "
                f"of model.n_ctx={n_ctx} + 1 tokens: give a smaller model.n_ctx, or more text"
            )
    have = sum(shard.windows(n_ctx) for shard in val.shards)
    if cfg.eval.windows is not None and not 0 < cfg.eval.windows <= have:
        raise UserError(
            f"eval.windows={cfg.eval.windows}, but {val.root} holds {have} windows: give 1 to {have}, or null for all"
        )


def check_resume(cfg: PretrainConfig, train: Manifest) -> None:
    """Raises UserError where the run folder is not what `resume` asks for, or holds another run."""
    folder = RunFolder(cfg.run.dir)
    latest = folder.latest()
    if latest is None:
        if cfg.resume is Resume.must:
            raise UserError(
                f"resume=must, but {cfg.run.dir} holds no checkpoint: give the run's own run.dir, or resume=auto"
            )
        return
    if cfg.resume is Resume.never:
        raise UserError(f"resume=never, but {cfg.run.dir} holds {latest.name}: give another run.name, or resume=auto")
    state = folder.state(latest)
    check_model(latest, model_of(latest, state), cfg.model)
    now = {"seed": cfg.seed, "lanes": cfg.data.lanes, "n_ctx": cfg.model.n_ctx, "sha256": train.sha256}
    knobs = {"seed": "seed", "lanes": "data.lanes", "n_ctx": "model.n_ctx", "sha256": f"data.path={cfg.data.path}"}
    for key, knob in knobs.items():
        then = state.get("data", {}).get(key)
        if then != now[key]:
            raise UserError(
                f"{knob} is {now[key]}, {latest.name} of {cfg.run.dir} was trained with {then}: "
                "the order of the data hangs on it; give the old value, or another run.name"
            )
    if state.get("step", 0) > cfg.max_steps:
        raise UserError(
            f"max_steps={cfg.max_steps}, but {cfg.run.dir} is at step {state['step']}: give more, or another run.name"
        )


if __name__ == "__main__":
    run(("pretrain", pretrain))
