"""Few-shot prompts: demonstrations that depend on (seed, task, document) alone, as GPT-3's from the training set."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from conf.errors import UserError
from trainer.distributed.seeds import stable_seed
from trainer.evaluation.tasks.description import TaskConfig
from trainer.evaluation.tasks.templates import Document


class Prompts:
    """The texts before each question of one task.

    `demonstration(document)`: a question with its right answer. `fits(prompt)` is asked with ever fewer demonstrations
    until the model has room.
    """

    def __init__(
        self,
        name: str,
        task: TaskConfig,
        pool: Sequence[Document],
        demonstration: Callable[[Document], str],
        shots: int,
        seed: int,
    ) -> None:
        available = len(pool) - (task.demonstrations is None)
        if shots > available:
            raise UserError(f"shots={shots}: task {name} has {available} documents to show: give at most {available}")
        self.shots = shots
        self.reduced = 0  # questions before which fewer stand
        self._name, self._task, self._seed = name, task, seed
        self._pool, self._demonstration = pool, demonstration
        self._own_documents = task.demonstrations is None

    def before(self, number: int, fits: Callable[[str], bool]) -> str:
        """The instruction and the demonstrations before document `number` of the file, up to where the question
        begins; the document itself is never one of them."""
        texts = [self._demonstration(self._pool[i]) for i in self._drawn(number)]
        for n in range(len(texts), -1, -1):
            prompt = "".join(text + self._task.separator for text in (*self._head(), *texts[:n]))
            if n == 0 or fits(prompt):
                self.reduced += n < len(texts)
                return prompt
        raise AssertionError("n = 0 always returns")

    def _head(self) -> tuple[str, ...]:
        return (self._task.instruction,) if self._task.instruction else ()

    def _drawn(self, number: int) -> list[int]:
        draws = random.Random(stable_seed("shots", self._seed, self._name, number))
        drawn: dict[int, None] = {}
        while len(drawn) < self.shots:
            i = int(draws.random() * len(self._pool))  # `random` alone is the same in every version of Python
            if not (self._own_documents and i == number):
                drawn[i] = None
        return list(drawn)
