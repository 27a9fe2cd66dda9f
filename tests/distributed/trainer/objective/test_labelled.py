"""GPT-1's fine-tuning on two ranks: losses over ten steps, dropout and predictions are those of one plain process."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data_pipeline.examples.examples_config import Task
from data_pipeline.examples.labelled import Labelled
from tests.distributed import tiny_run as run
from tests.helpers.labelled import outputs, random_examples
from tests.helpers.ranks import run_ranks
from tests.helpers.seeds import seeded
from trainer.config.pretrain import PretrainConfig
from trainer.data.labelled import labelled
from trainer.distributed.mesh import Mesh
from trainer.distributed.randomness import seed_dropout
from trainer.model.init import initialise
from trainer.objective.heads import WithHead
from trainer.objective.labelled import LabelledTask

STEPS, EXAMPLES = 10, 8  # of a step
LAYOUTS = {
    "dp2 zero1": {},
    "dp2 zero3": {"zero": 3},
    "tp2 zero1": {"tp": 2},
    "tp2 split zero1": {"tp": 2, "sequence_parallel": True},
    "tp2 split zero3": {"tp": 2, "sequence_parallel": True, "zero": 3},
}
QUICK = [("dp2 zero1", "choice"), ("dp2 zero3", "similarity"), ("tp2 split zero1", "choice")]
REST = [(layout, task.value) for layout in LAYOUTS for task in Task if (layout, task.value) not in QUICK]


def examples_of(task: Task, seed: int, vocab_size: int) -> list[Labelled]:
    return random_examples(task, random.Random(seed), STEPS * EXAMPLES, vocab_size, run.N_CTX)


def built(cfg: PretrainConfig, mesh: Mesh, task: Task, frozen: int = 0) -> WithHead:
    split = cfg.parallel.sequence_parallel
    module = WithHead(cfg.model, mesh, n_out=outputs(task), std=0.2, frozen=frozen, sequence_parallel=split)
    initialise(module, cfg.model, 7)
    return module


def on_two_ranks(seed: int, cases: list[tuple[str, str]], frozen: int = 0) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for tp in (1, 2):
        with run.layout(tp=tp) as mesh:
            for task in sorted({task for _, task in cases}) if tp == 1 else ():
                out[f"plain {task}"] = in_one_process(Task(task), mesh, seed, frozen)
            for layout, task in cases:
                if LAYOUTS[layout].get("tp", 1) == tp:
                    cfg = run.config(**LAYOUTS[layout], optim=run.STEADY)
                    out[f"{layout} {task}"] = engine_run(cfg, mesh, Task(task), seed, frozen)
    return out


def in_one_process(task: Task, mesh: Mesh, seed: int, frozen: int) -> dict[str, Any]:
    """Autograd, clipping and AdamW of torch's own, on all examples of a step at once; none of it for frozen blocks."""
    cfg = run.config(optim=run.STEADY)
    module, objective, examples = (
        built(cfg, mesh, task),
        LabelledTask(task, 0.5, 0.0),
        examples_of(task, seed, cfg.model.vocab_size),
    )
    collate, weights = labelled(examples, run.N_CTX), torch.tensor(objective.weights)
    found = module(objective.predictions, collate([[i] for i in range(7)]))
    module.h[:frozen].requires_grad_(False)
    adam = run.plain_adamw((p for p in module.parameters() if p.requires_grad), cfg.optim)
    dropped = dropout_sums(task, mesh, module, collate)
    losses, norms = [], []
    for step in range(STEPS):
        batch: Any = collate([[i] for i in range(step * EXAMPLES, (step + 1) * EXAMPLES)])
        loss = (module(objective.sums, batch) * weights / torch.tensor(objective.counts(batch))).sum()
        loss.backward()
        norms.append(run.plain_step(adam, step, cfg.optim.grad_clip))
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "found": found.tolist(), "dropped": dropped}


def dropout_sums(task: Task, mesh: Mesh, module: WithHead, collate: Any) -> list[float]:
    """The sums of the first examples under a dropout of the head alone."""
    seed_dropout(replace(mesh, dp_rank=0), 1, 2, 0)
    with torch.no_grad():
        sums: list[float] = module.train()(LabelledTask(task, 0.0, 0.5).sums, collate([[0], [1], [2]])).tolist()
    return sums


def engine_run(cfg: PretrainConfig, mesh: Mesh, task: Task, seed: int, frozen: int) -> dict[str, Any]:
    """Through the engine, two examples in each micro batch; `kept`: the blocks whose weights are as before."""
    from trainer.tuning.scores import predict

    objective, examples = LabelledTask(task, 0.5, 0.0), examples_of(task, seed, cfg.model.vocab_size)
    engine = run.TinyEngine(built(cfg, mesh, task, frozen), cfg, mesh, objective)
    collate = labelled(examples, run.N_CTX)
    found = predict(objective, engine.module, 7, labelled(examples[:7], run.N_CTX), 2, lambda: None)
    dropped = dropout_sums(task, mesh, engine.module, collate)  # type: ignore[arg-type]
    losses, norms, share, before = [], [], EXAMPLES // mesh.dp, blocks(engine)
    for step in range(STEPS):
        first = step * EXAMPLES + mesh.dp_rank * share
        batches: list[Any] = [collate([[i], [i + 1]]) for i in range(first, first + share, 2)]
        counts = torch.tensor([objective.counts(batch) for batch in batches], dtype=torch.float64).sum(0)
        dist.all_reduce(counts, group=mesh.dp_group)
        sums = torch.stack([engine.backward(b, counts, last=b is batches[-1]) for b in batches]).sum(0).double()
        dist.all_reduce(sums, group=mesh.dp_group)
        losses.append(float((sums / counts * torch.tensor(objective.weights)).sum()))
        norms.append(engine.step(run.lr(step)))
    kept = [a == b for a, b in zip(before, blocks(engine), strict=True)]
    engine.close()
    return {"losses": losses, "norms": norms, "found": found, "dropped": dropped, "kept": kept}


def blocks(engine: run.TinyEngine) -> list[list[list[float]]]:
    """The weights of each block, as far as this rank's tensor parallel part of them goes."""
    from trainer.engine.deepspeed_api import deepspeed

    found = []
    for block in engine.module.h:
        with deepspeed.zero.GatheredParameters(list(block.parameters())):
            found.append([p.flatten().tolist() for p in block.parameters()])
    return found


@pytest.fixture(scope="module")
def quick() -> list[dict[str, Any]]:
    return compared(QUICK)


@pytest.fixture(scope="module")
def rest() -> list[dict[str, Any]]:
    return compared(REST)


def compared(cases: Sequence[tuple[str, str]], frozen: int = 0) -> list[dict[str, Any]]:
    target = "tests.distributed.trainer.objective.test_labelled:on_two_ranks"
    return run_ranks(2, target, seed=seeded(), cases=cases, frozen=frozen)


def check(ranks: list[dict[str, Any]], layout: str, task: str) -> None:
    """The last of the ranks that predict has fewer examples; the head's dropout draws what all tp ranks share."""
    plain = ranks[0][f"plain {task}"]
    assert plain["losses"][0] != pytest.approx(plain["losses"][1], rel=1e-3)
    for rank in ranks:
        got = rank[f"{layout} {task}"]
        assert got["losses"] == pytest.approx(plain["losses"], rel=1e-5)
        assert got["found"] == pytest.approx(plain["found"], rel=1e-4, abs=1e-5)
        assert got["dropped"] == pytest.approx(plain["dropped"], rel=1e-5)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("layout", "task"), QUICK)
def test_a_layout_trains_as_one_process_does(layout: str, task: str, quick: list[dict[str, Any]]) -> None:
    check(quick, layout, task)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("layout", "task"), REST)
def test_every_layout_trains_every_task(layout: str, task: str, rest: list[dict[str, Any]]) -> None:
    check(rest, layout, task)


@pytest.mark.timeout(600)
def test_frozen_blocks_keep_their_weights() -> None:
    """Bit for bit; all else is trained as by torch, where these blocks have no gradient and no part in its norm."""
    cases = [("dp2 zero1", "choice"), ("dp2 zero3", "choice"), ("tp2 split zero1", "choice")]
    ranks = compared(cases, frozen=1)
    for layout, task in cases:
        check(ranks, layout, task)
        for rank in ranks:
            got = rank[f"{layout} {task}"]
            assert got["kept"] == [True, False], layout
            assert got["norms"] == pytest.approx(rank[f"plain {task}"]["norms"], rel=1e-4), layout
