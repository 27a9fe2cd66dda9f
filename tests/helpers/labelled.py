"""Random labelled examples of each task, and L2 and L1 in plain torch: an example at a time, without pads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.examples.examples_config import Task
from data_pipeline.examples.labelled import Labelled
from trainer.model.gpt import GPT
from trainer.objective.heads import WithHead

CLASSES = 3


def outputs(task: Task) -> int:
    """The outputs of the head of a task."""
    return CLASSES if task is Task.classification else 1


def random_examples(task: Task, rng: random.Random, n: int, vocab_size: int, longest: int) -> list[Labelled]:
    """Examples of texts of random ids; the last three ids are start, delimiter and extract."""
    start, delimiter, extract = range(vocab_size - 3, vocab_size)

    def text() -> list[int]:
        return [rng.randrange(vocab_size - 3) for _ in range(rng.randint(1, (longest - 3) // 2))]

    def joined(*texts: list[int]) -> np.ndarray:
        ids = [start, *texts[0], *(i for more in texts[1:] for i in (delimiter, *more)), extract]
        return np.array(ids, np.int32)

    examples = []
    for _ in range(n):
        a, b = text(), text()
        if task is Task.classification:
            inputs, label = [joined(a, b)], float(rng.randrange(CLASSES))
        elif task is Task.similarity:
            inputs, label = [joined(a, b), joined(b, a)], rng.uniform(0, 5)
        else:
            inputs = [joined(a, text()) for _ in range(rng.randint(2, 4))]
            label = float(rng.randrange(len(inputs)))
        examples.append(Labelled(tuple(inputs), label))
    return examples


def plain_sums(module: WithHead, examples: Sequence[Labelled], task: Task) -> tuple[Tensor, Tensor, int, int]:
    """The sums of L2 and L1, the label tokens and the examples that the head gets right."""
    label, lm, tokens, right = torch.zeros(()), torch.zeros(()), 0, 0
    for example in examples:
        ends = []
        for ids in example.sequences:
            x, y = torch.from_numpy(ids).long()[None], torch.from_numpy(ids).long()[1:]
            states = module(GPT.hidden, x)[:, 0]
            ends.append(states[-1])
            logits = module.wte(states[:-1], head=True)[:, : module.cfg.vocab_size]
            lm = lm + F.cross_entropy(logits, y, reduction="sum")
            tokens += len(y)
        weight, bias = module.head.weight, module.head.bias
        if task is Task.similarity:
            label = label + ((ends[0] + ends[1]) @ weight[0] + bias[0] - example.label) ** 2
            continue
        scores = weight @ ends[0] + bias if task is Task.classification else torch.stack(ends) @ weight[0] + bias
        label = label - scores.log_softmax(0)[int(example.label)]
        right += int(scores.argmax() == int(example.label))
    return label, lm, tokens, right


def gradients(module: Any, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter, zeros where the loss does not use it."""
    module.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
