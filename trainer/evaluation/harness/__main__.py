"""`python -m trainer.evaluation.harness`: lm-evaluation-harness's own command line, which knows our models."""

from __future__ import annotations

import sys
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from conf.errors import UserError
from trainer.config.inference import Number
from trainer.distributed.mesh import single_rank_mesh
from trainer.distributed.world import read_world
from trainer.evaluation.encoder import Encoder
from trainer.evaluation.harness.model import model_class
from trainer.evaluation.journal import Journal
from trainer.evaluation.scoring import Scoring
from trainer.evaluation.subject import Subject

BASE: Any = model_class()


class Gradus(BASE):
    """A checkpoint on this process alone."""

    def __init__(
        self,
        checkpoint: str,
        tokenizer: str | None = None,
        precision: str = "fp32",
        batch_size: int = 16,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        """`max_batch_size` and `device` are the harness's: ours takes this process's device."""
        subject = Subject.find(checkpoint, tokenizer, Number(precision))
        model, decode = subject.on(single_rank_mesh(read_world())), subject.tokenizer.decode
        super().__init__(Scoring(model, Journal(None, 0), int(batch_size), decode), Encoder(subject.tokenizer))


if __name__ == "__main__":
    register_model("gradus")(Gradus)
    try:
        cli_evaluate()
    except UserError as e:
        sys.exit(f"error: {e}")
