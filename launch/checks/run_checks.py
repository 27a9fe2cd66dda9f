"""The check of a run: every refusal of its ranks, on as many of them as the cluster has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conf.errors import UserError
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.model import ModelConfig
from trainer.diagnostics.check_result import CheckResult, fail, ok
from trainer.model.arithmetic import param_count

CHECKPOINT_BYTES = 12  # a parameter: fp32 weights and two moments


def trainable(preflight: Callable[[], tuple[Any, list[str]]]) -> CheckResult:
    """The lines of a run's preflight, or its refusal."""
    try:
        _, lines = preflight()
    except (UserError, OSError) as e:
        return fail("run", str(e), "change what it names, behind the --")
    return ok("run", "; ".join(line.strip() for line in lines))


def checkpoint_bytes(model: ModelConfig, checkpoint: CheckpointConfig) -> int:
    """Bytes of all checkpoints that exist at once: those kept, the best, and the one that is being written."""
    return CHECKPOINT_BYTES * param_count(model) * (checkpoint.keep + checkpoint.keep_best + 1)
