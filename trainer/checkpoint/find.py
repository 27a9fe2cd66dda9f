"""Choice of the checkpoint to go on from, and the check that its model is the one that is wanted, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from conf.errors import UserError
from trainer.checkpoint.verify import DamagedError, check_files, check_format, verify
from trainer.config.model import ModelConfig
from trainer.config.optim import Kind
from trainer.config.train import Resume, TrainConfig
from trainer.model.arithmetic import param_count
from trainer.run.folder import STATE, WEIGHTS, RunFolder, step_of
from trainer.run.owner import is_repeated

SIZES = ("n_layer", "n_head", "n_embd", "n_ctx", "vocab_size")
SHAPE_FIELDS = (*SIZES, "norm", "gelu", "layer_norm_eps", "attention", "band", "stride", "summary")


def model_of(path: Path, state: dict[str, Any]) -> ModelConfig:
    """The model that a state describes, not bigger than the weights beside it: no claim makes anyone allocate."""
    try:
        cfg = ModelConfig.from_json(state["model"])
        numbers = (cfg.band, cfg.stride, cfg.summary)
        if not isinstance(cfg.attention, str) or not all(isinstance(n, int | None) for n in numbers):
            raise TypeError(f"attention={cfg.attention!r} with {numbers}")
        count, size = param_count(cfg), sum(f.stat().st_size for f in path.glob(f"{WEIGHTS}-*"))
        if not isinstance(count, int) or 4 * count > size:
            raise ValueError(f"{count} parameters, but the weights have {size} bytes")
        return cfg
    except (KeyError, TypeError, ValueError, AttributeError, UserError) as e:
        raise DamagedError(f"{path / STATE}: damaged: no model ({e}): use another checkpoint") from None


def read_state(path: Path) -> dict[str, Any]:
    """state.json, once the manifest's files are all there with their sizes; `model` holds ModelConfig's arguments.

    Raises:
        DamagedError: a file that is missing, of another size or damaged, by name.
        UserError: the checkpoint is of a newer version.
    """
    verify(path, check_files(path), [STATE])
    state = RunFolder.state(path)
    check_format(path / STATE, state.get("format"))
    return {**state, "model": vars(model_of(path, state))}


def damage(path: Path, rank: int, ranks: int) -> str | None:
    """The damage of a checkpoint, in words, as far as it is in this rank's share of the files; None: it is whole."""
    try:
        read_state(path)
        files = check_files(path)
        verify(path, files, sorted(files)[rank::ranks])
    except DamagedError as e:
        return str(e)
    return None


def to_resume(run: RunFolder, resume_step: int | None) -> list[Path]:
    """The checkpoints to go on from, each for the case that those before it are damaged.

    With `resume_step` those of that step, the newest start's first. Once: where the run's last command was the same,
    a supervisor, torchrun or Slurm starts it again, and it goes on from the latest.

    Raises:
        UserError: there is none of that step.
    """
    if resume_step is None or is_repeated(run):
        return run.candidates()
    published = run.published()
    if of_step := [p for p in reversed(published) if step_of(p) == resume_step]:
        return of_step
    steps = ", ".join(map(str, sorted({step_of(p) for p in published})))
    what = f"none of that step, but of steps {steps}: give one of these" if steps else "none: leave resume_step out"
    raise UserError(f"resume_step={resume_step}: of checkpoints {run.root} holds {what}")


def resumable(run: RunFolder, resume_step: int | None) -> tuple[Path | None, dict[str, Any]]:
    """The first checkpoint to resume from whose state and sizes are right, and its state; (None, {}) for a new run.

    Raises:
        UserError: there are checkpoints, and none is whole, or there is none of `resume_step`.
    """
    problem = None
    for checkpoint in to_resume(run, resume_step):
        try:
            return checkpoint, read_state(checkpoint)
        except DamagedError as e:
            problem = problem or str(e)
    if problem is None:
        return None, {}
    raise none_whole(run, problem)


def none_whole(run: RunFolder, problem: str) -> UserError:
    """`problem`: of the first one."""
    return UserError(
        f"run.dir={run.root}: none of its checkpoints is whole ({problem}): restore one, or give another run.name"
    )


def find_checkpoint(path: str, key: str = "checkpoint") -> Path:
    """A checkpoint folder as it is, a run folder's latest otherwise; `key` is what the user gave it as."""
    folder = Path(path)
    if (folder / STATE).is_file():
        return folder
    latest = RunFolder(folder).latest()
    if latest is None:
        raise UserError(f"{key}={path} is neither a checkpoint nor a run folder that holds one")
    return latest


def check_model(path: Path, theirs: ModelConfig, ours: ModelConfig, otherwise: str = "another run.dir") -> None:
    """Raises UserError if weights of one model cannot be the other's."""
    pairs = {f.name: (getattr(theirs, f.name), getattr(ours, f.name)) for f in fields(ModelConfig)}
    layers = range(min(theirs.n_layer, ours.n_layer))
    if all(theirs.kind(i) == ours.kind(i) for i in layers):  # DB and DBDB are the same
        del pairs["attention"]
    differ = [f"model.{k}={_show(a)} (here {_show(b)})" for k, (a, b) in pairs.items() if k in SHAPE_FIELDS and a != b]
    if differ:
        raise UserError(
            f"{path} is a checkpoint of another model: {', '.join(differ)}: give its model=, or {otherwise}"
        )


def check_resume(cfg: TrainConfig, checkpoint: Path | None, state: Mapping[str, Any]) -> None:
    """Raises UserError where the run folder is not of the kind that `resume` asks for, or holds another run.

    `checkpoint`: the one to resume from, None for a new run; `state`: its own.
    """
    run_dir = cfg.run.dir
    if checkpoint is None:
        if cfg.resume is Resume.must:
            raise UserError(
                f"resume=must, but {run_dir} holds no checkpoint: give the run's own run.dir, or resume=auto"
            )
        return
    if cfg.resume is Resume.never:
        raise UserError(f"resume=never, but {run_dir} holds {checkpoint.name}: give another run.name, or resume=auto")
    check_model(checkpoint, ModelConfig(**state["model"]), cfg.model)
    optimizer = state.get("optimizer", Kind.adamw.value)  # older checkpoints do not say: all are AdamW's
    if optimizer != cfg.optim.kind.value:
        raise UserError(
            f"optim.kind={cfg.optim.kind.value}, but {checkpoint.name} of {run_dir} has the moments of {optimizer}: "
            "give the old kind, or another run.name"
        )
    if state.get("step", 0) > cfg.max_steps:
        raise UserError(
            f"max_steps={cfg.max_steps}, but {run_dir} is at step {state['step']}: give more, or another run.name"
        )


def _show(value: Any) -> str:
    return str(value.value if isinstance(value, Enum) else value)
