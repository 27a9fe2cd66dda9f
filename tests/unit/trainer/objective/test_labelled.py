"""GPT-1's fine-tuning on one rank: the loss is plain torch's, and orders, pads and dropout do what the paper says."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.config import IGNORE
from data_pipeline.examples.examples_config import Task
from data_pipeline.examples.labelled import Labelled
from tests.helpers.labelled import CLASSES, gradients, outputs, plain_sums, random_examples
from tests.helpers.seeds import seeded
from trainer.config.model import ModelConfig
from trainer.data.collate import row_tokens
from trainer.data.labelled import labelled
from trainer.distributed.mesh import Mesh
from trainer.model.init import initialise
from trainer.objective.heads import WithHead
from trainer.objective.labelled import LabelledBatch, LabelledTask

CFG = ModelConfig("t", n_layer=2, n_head=2, n_embd=32, n_ctx=96, vocab_size=70, init_std=0.1)
TASKS = pytest.mark.parametrize("task", Task, ids=lambda task: task.value)


def model(mesh: Mesh, task: Task, seed: int) -> WithHead:
    module = WithHead(CFG, mesh, n_out=outputs(task), std=0.5)
    initialise(module, CFG, seed)
    torch.nn.init.normal_(module.head.bias)
    return module


def whole(examples: list[Labelled], multiple: int = 64, fill: int = 0) -> LabelledBatch:
    batch = labelled(examples, CFG.n_ctx, multiple)([*([i] for i in range(len(examples))), *[[]] * fill])
    assert isinstance(batch, LabelledBatch)
    return batch


def named(objective: LabelledTask, module: WithHead, batch: LabelledBatch) -> dict[str, Tensor]:
    return dict(zip(objective.terms, module(objective.sums, batch), strict=True))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """The gradients that are not equal, each with its largest difference as a share of its largest element.

    Where all elements are rounding, such as those of the bias of a choice's head, they count as a part of the whole.
    """
    least = 0.05 * max(float(grad.abs().max()) for grad in theirs.values())
    errors = {n: float((ours[n] - x).abs().max()) / max(float(x.abs().max()), least) for n, x in theirs.items()}
    return {name: error for name, error in errors.items() if not error <= 2e-5}


def prepared(mesh: Mesh, task: Task, n: int = 5, longest: int = 60) -> tuple[WithHead, list[Labelled], random.Random]:
    seed = seeded()
    rng = random.Random(seed)
    torch.manual_seed(seed)
    return model(mesh, task, seed), random_examples(task, rng, n, CFG.vocab_size, longest), rng


@TASKS
def test_terms_and_gradient_are_those_of_plain_torch(task: Task, mesh: Mesh) -> None:
    """An example without a row adds nothing to them."""
    module, examples, _ = prepared(mesh, task)
    objective = LabelledTask(task, 0.5, 0.0)
    label, lm, tokens, right = plain_sums(module, examples, task)
    theirs = gradients(module, label / len(examples) + 0.5 * lm / tokens)
    for fill in (0, 2):
        batch = whole(examples, fill=fill)
        got = named(objective, module, batch)
        counts = dict(zip(objective.terms, objective.counts(batch), strict=True))
        assert counts == {"label": 5, "lm": tokens, **({"acc": 5} if task is not Task.similarity else {})}
        assert got["label"].item() == pytest.approx(label.item(), rel=1e-5)
        assert got["lm"].item() == pytest.approx(lm.item(), rel=1e-5)
        assert task is Task.similarity or got["acc"].item() == right
        sums = torch.stack(list(got.values()))
        means = sums * torch.tensor(objective.weights) / torch.tensor(list(counts.values()))
        assert differing(gradients(module, means.sum()), theirs) == {}


@TASKS
def test_lambda_0_gives_the_gradient_of_the_task_alone(task: Task, mesh: Mesh) -> None:
    module, examples, _ = prepared(mesh, task)
    objective = LabelledTask(task, 0.0, 0.0)
    assert "lm" not in objective.terms and objective.weights[0] == 1.0 and not any(objective.weights[1:])
    label, *_ = plain_sums(module, examples, task)
    theirs = gradients(module, label)
    ours = gradients(module, named(objective, module, whole(examples))["label"])
    assert differing(ours, theirs) == {}


@TASKS
def test_pads_change_nothing(task: Task, mesh: Mesh) -> None:
    """Neither their number nor the ids that stand there."""
    module, examples, rng = prepared(mesh, task)
    objective = LabelledTask(task, 0.5, 0.0)
    narrow, wide = whole(examples, multiple=1), whole(examples, multiple=96)
    assert narrow.tokens.shape[1] == max(len(ids) for e in examples for ids in e.sequences) < wide.tokens.shape[1] == 96
    behind = torch.arange(96) > wide.ends[:, None]
    other = wide._replace(tokens=torch.where(behind, rng.randrange(CFG.vocab_size), wide.tokens))
    torch.testing.assert_close(
        torch.stack([module(objective.sums, batch) for batch in (narrow, other)]),
        module(objective.sums, wide).expand(2, -1),
        rtol=1e-5,
        atol=1e-6,
    )


def test_a_similarity_has_the_same_bits_in_either_order(mesh: Mesh) -> None:
    """With the dropout of the head too, of which both orders have one mask."""
    module, examples, _ = prepared(mesh, Task.similarity)
    swapped = [example._replace(sequences=example.sequences[::-1]) for example in examples]
    assert not np.array_equal(*examples[0].sequences)
    for training in (False, True):
        module.train(training)
        objective = LabelledTask(Task.similarity, 0.5, 0.4)
        found = []
        for some in (examples, swapped):
            torch.manual_seed(3)
            found.append(module(objective.predictions, whole(some)))
        assert torch.equal(*found) and len(set(found[0].tolist())) == len(examples)


def test_a_choice_follows_the_order_of_its_answers(mesh: Mesh) -> None:
    """Each answer keeps its probability: the loss for each as the right one, and the answer that is chosen."""
    module, examples, rng = prepared(mesh, Task.choice)
    orders = [rng.sample(range(n), n) for n in (len(example.sequences) for example in examples)]
    turned = [
        Labelled(tuple(e.sequences[i] for i in order), order.index(int(e.label)))
        for e, order in zip(examples, orders, strict=True)
    ]
    objective = LabelledTask(Task.choice, 0.0, 0.0)
    for one, other, order in zip(examples, turned, orders, strict=True):
        losses = [
            named(objective, module, whole([e]))["label"].item()
            for k in range(len(order))
            for e in (one._replace(label=float(order[k])), other._replace(label=float(k)))
        ]
        assert losses[0::2] == pytest.approx(losses[1::2], rel=1e-4, abs=1e-6)
        assert sum(math.exp(-x) for x in losses[0::2]) == pytest.approx(1)
    chosen = [module(objective.predictions, whole(some)).int().tolist() for some in (examples, turned)]
    assert chosen[0] == [order[k] for order, k in zip(orders, chosen[1], strict=True)]


def test_a_head_of_zeros_has_the_loss_of_guessing(mesh: Mesh) -> None:
    for task in (Task.classification, Task.choice):
        module, examples, _ = prepared(mesh, task)
        torch.nn.init.zeros_(module.head.weight)
        torch.nn.init.zeros_(module.head.bias)
        got = named(LabelledTask(task, 0.5, 0.1), module, whole(examples))
        ways = [CLASSES if task is Task.classification else len(example.sequences) for example in examples]
        assert got["label"].item() == pytest.approx(sum(map(math.log, ways)), rel=1e-6)


def test_one_mask_drops_the_states_of_all_answers(mesh: Mesh) -> None:
    """Equal answers stay equal, whatever is dropped; equal examples get masks of their own."""
    module, examples, _ = prepared(mesh, Task.choice)
    same = [example._replace(sequences=example.sequences[:1] * 3, label=2.0) for example in examples]
    objective = LabelledTask(Task.choice, 0.0, 0.5)
    got = named(objective, module.train(), whole(same))
    assert got["label"].item() == pytest.approx(len(same) * math.log(3), rel=1e-6)
    similar, pairs, _ = prepared(mesh, Task.similarity)
    twice = similar.train()(LabelledTask(Task.similarity, 0.0, 0.5).predictions, whole([pairs[0]] * 2))
    assert twice[0] != twice[1]


@TASKS
def test_a_batch_without_examples_counts_nothing(task: Task, mesh: Mesh) -> None:
    """Its sums are 0 and its gradient is finite, so that a rank may have one where others have examples."""
    module, examples, _ = prepared(mesh, task)
    objective = LabelledTask(task, 0.5, 0.1)
    batch = labelled(examples, CFG.n_ctx)([[], []])
    assert objective.counts(batch) == [0.0] * len(objective.terms)
    got = module(objective.sums, batch)
    assert got.tolist() == [0.0] * len(objective.terms)
    assert all(float(grad.abs().max()) == 0 for grad in gradients(module, got.sum()).values())


def test_a_row_has_next_tokens_as_labels_and_pads_behind() -> None:
    ids = [np.array(x, np.int32) for x in ([7, 1, 2, 9], [7, 3, 9], [7, 4, 9])]
    examples = [Labelled((ids[0], ids[1]), 1.0), Labelled((ids[1], ids[2], ids[0]), 2.0)]
    batch: Any = labelled(examples, 96, 5)([[1], [], [0]])
    none = [IGNORE] * 5
    first, second = [1, 2, 9, IGNORE, IGNORE], [3, 9, IGNORE, IGNORE, IGNORE]
    assert batch.labels.tolist() == [second, [4, *second[1:]], first, none, none, first, second]
    assert batch.tokens.tolist()[2] == [7, 1, 2, 9, 0] and batch.tokens.tolist()[3] == [0] * 5
    assert (batch.ends.tolist(), batch.owner.tolist()) == ([2, 2, 3, 0, 0, 3, 2], [0, 0, 0, 1, 1, 2, 2])
    assert batch.target[[0, 2]].tolist() == [2.0, 1.0] and batch.target[1].isnan()
    assert [row_tokens(n, 96) for n in (1, 64, 65, 96)] == [16, 64, 80, 96]


@pytest.mark.parametrize("broken", ["not", "labels shuffled", "sign flipped"])
def test_a_planted_task_is_learnt_unless_the_loss_is_broken(broken: str, mesh: Mesh) -> None:
    """The class is that of the marks among random ids."""
    module, examples, rng = prepared(mesh, Task.classification, 240, 16)
    for example in examples:
        [ids] = example.sequences
        ids[rng.sample(range(1, len(ids) - 1), len(ids) // 3)] = 10 + int(example.label)
    labels = [example.label for example in examples]
    if broken == "labels shuffled":
        rng.shuffle(labels)
    train = [example._replace(label=label) for example, label in zip(examples[:200], labels, strict=False)]
    objective, collate = LabelledTask(Task.classification, 0.5, 0.1), labelled(train, CFG.n_ctx, 16)
    adam = torch.optim.AdamW(module.parameters(), lr=3e-3)
    for step in range(40):
        batch: Any = collate([[i % 200] for i in range(step * 16, step * 16 + 16)])
        means = module.train()(objective.sums, batch) / torch.tensor(objective.counts(batch))
        loss = (means * torch.tensor(objective.weights)).sum() * (-1 if broken == "sign flipped" else 1)
        module.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        adam.step()
    held_out = whole(examples[200:], 16)
    found = module.eval()(objective.predictions, held_out)
    accuracy = float((found == held_out.target).float().mean())
    assert accuracy >= 0.9 if broken == "not" else accuracy <= 0.7, accuracy
