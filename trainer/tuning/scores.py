"""Scores on the held-out examples of a fine-tuning while the model trains: an implementation of `task.Scores`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch
import torch.distributed as dist

from data_pipeline.examples.examples_config import LabelledConfig, Task
from data_pipeline.examples.labelled import Labelled
from trainer.data.example_feed import Collate
from trainer.engine.engine import to_device
from trainer.model.gpt import GPT
from trainer.objective.labelled import LabelledTask
from trainer.tuning.confusion import confusion, draw_confusion
from trainer.tuning.figures import figures


@dataclass(frozen=True)
class HeldOutScores:
    """The figures of a task on held-out examples, and for classes a picture of the confusion matrix.

    about: the task and its classes. batch_size: examples that each data-parallel rank computes at a time.
    every: steps between two times; 0 = only at the end. picture: its path.
    """

    objective: LabelledTask
    about: LabelledConfig
    examples: Sequence[Labelled]
    collate: Collate
    batch_size: int
    every: int
    picture: Path

    def find(self, model: GPT, loss: float, on_progress: Callable[[], None]) -> tuple[dict[str, float], str]:
        """The metrics `task/held_out/FIGURE`, and a line of them. Collective.

        `loss`: the newest, the same on all ranks; where it is not finite, the line says so, and there are no metrics.
        `on_progress` is called at each batch.
        """
        if not math.isfinite(loss):
            return {}, f"no scores on held-out examples: the loss is {loss}"
        began = monotonic()
        found = predict(self.objective, model, len(self.examples), self.collate, self.batch_size, on_progress)
        if not all(map(math.isfinite, found)):
            return {}, "no scores on held-out examples: a prediction is not finite"
        correct = [example.label for example in self.examples]
        values = figures(self.about.task, len(self.about.classes), correct, found)
        row = {f"task/held_out/{key}": x for key, x in {"n": float(len(found)), **values}.items()}
        drawn = self._draw(correct, found) if model.mesh.world.is_main else ""
        told = ", ".join(f"{name} {x:.4f}" for name, x in values.items())
        return row, f"held out: {told} ({monotonic() - began:.0f} s){drawn}"

    def _draw(self, correct: Sequence[float], found: Sequence[float]) -> str:
        """Draw the confusion matrix; returns the reason for having none, for no picture ends a run."""
        if self.about.task is not Task.classification:
            return ""
        try:
            draw_confusion(self.picture, self.about.classes, confusion(len(self.about.classes), correct, found))
        except (ImportError, OSError) as e:
            return f"; no picture: {e}"
        return ""


def predict(
    objective: LabelledTask, model: GPT, n: int, collate: Collate, batch_size: int, on_progress: Callable[[], None]
) -> list[float]:
    """The prediction for each of the `n` examples of `collate`, on all ranks, whatever their number. Collective."""
    mesh, training = model.mesh, model.training
    found = torch.zeros(n, dtype=torch.float64, device=mesh.device)
    model.eval()
    try:
        with torch.no_grad():  # not inference_mode: ZeRO-3 allocates weights inside that training uses afterwards
            for start in range(0, n, mesh.dp * batch_size):
                first = start + mesh.dp_rank * batch_size
                own = range(n)[first : first + batch_size]
                rows = [[i] for i in own] + [[]] * (batch_size - len(own))
                batch = to_device(collate(rows), mesh.device)
                found[first : first + len(own)] = model(objective.predictions, batch)[: len(own)].double()
                on_progress()
    finally:
        model.train(training)
    dist.all_reduce(found, group=mesh.dp_group)
    dist.broadcast(found, src=0)
    values: list[float] = found.tolist()
    return values
