"""Direct preference optimisation on several ranks is that of one plain process, and so is its frozen reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.examples.pairs import Pair
from data_pipeline.manifest import TOKENIZER
from tests.distributed import tiny_run as run
from tests.helpers.ranks import run_ranks
from tests.helpers.seeds import seeded
from trainer.config.pretrain import PretrainConfig
from trainer.distributed.mesh import Mesh
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.objective.preference import Pairs, Preference

BETA, PAIRS, ROWS, STEPS = 0.5, 6, 8, 10  # a step has two rows without a pair
TOLERANCE = 1e-5


def micro_batches(seed: int, step: int, cfg: PretrainConfig, dp: int, dp_rank: int) -> list[Pairs]:
    """A rank's pairs of a step, of random lengths."""
    from trainer.data.collate import row_multiple
    from trainer.data.pairs import pairs

    rng = np.random.default_rng([seed, step])
    lengths = rng.integers(1, run.N_CTX // 2, (PAIRS, 3))
    ids = [[rng.integers(0, cfg.model.vocab_size, n).astype(np.int32) for n in three] for three in lengths]
    collate = pairs([Pair(*three) for three in ids], run.N_CTX, row_multiple(cfg.parallel.tp))
    rows = [[i] if i < PAIRS else [] for i in range(ROWS)]
    share, size = ROWS // dp, int(cfg.micro_batch_size)
    made: list[Any] = [collate(rows[at : at + size]) for at in range(dp_rank * share, (dp_rank + 1) * share, size)]
    return made


def gpt(cfg: PretrainConfig, mesh: Mesh) -> GPT:
    model = GPT(cfg.model, mesh, sequence_parallel=cfg.parallel.sequence_parallel)
    initialise(model, cfg.model, 7)
    return model


def curve(cfg: PretrainConfig, mesh: Mesh, seed: int) -> list[list[float]]:
    """The means of the terms, and the gradient norm, of each step of the engine."""
    objective = Preference(BETA, gpt(cfg, mesh).requires_grad_(False).eval())
    engine = run.TinyEngine(gpt(cfg, mesh), cfg, mesh, objective)
    count = run.counts(*[PAIRS] * 5)
    out = []
    for step in range(STEPS):
        batches = micro_batches(seed, step, cfg, mesh.dp, mesh.dp_rank)
        sums = torch.stack([engine.backward(b, count, last=b is batches[-1]) for b in batches]).sum(0)
        dist.all_reduce(sums, group=mesh.dp_group)
        out.append([*(sums / PAIRS).tolist(), engine.step(run.lr(step))])
    engine.close()
    return out


def plain(seed: int) -> list[list[float]]:
    """The same by torch's own optimizer, one process."""
    with run.layout() as mesh:
        cfg = run.config(micro_batch_size=ROWS, optim=run.STEADY)
        policy, objective = gpt(cfg, mesh), Preference(BETA, gpt(cfg, mesh).requires_grad_(False).eval())
        adam = run.plain_adamw(policy.parameters(), cfg.optim)
        out = []
        for step in range(STEPS):
            [batch] = micro_batches(seed, step, cfg, 1, 0)
            terms: Tensor = policy(objective.sums, batch) / PAIRS
            terms[0].backward()
            out.append([*terms.tolist(), run.plain_step(adam, step, cfg.optim.grad_clip)])
        return out


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2 zero1": {"zero": 1},
    "dp2 zero3": {"zero": 3},
    "tp2 sequence parallel zero1": {"tp": 2, "sequence_parallel": True},
    "tp2 sequence parallel zero3": {"tp": 2, "sequence_parallel": True, "zero": 3},
}


def on_two_ranks(seed: int) -> dict[str, list[list[float]]]:
    out = {}
    for tp in (1, 2):
        with run.layout(tp=tp) as mesh:
            for name, how in LAYOUTS.items():
                if how.get("tp", 1) == tp:
                    out[name] = curve(run.config(**how, optim=run.STEADY), mesh, seed)
    return out


@pytest.fixture(scope="module")
def curves() -> dict[str, list[list[float]]]:
    seed = seeded()
    one = run_ranks(1, "tests.distributed.trainer.objective.test_preference:plain", seed=seed)[0]
    ranks = run_ranks(2, "tests.distributed.trainer.objective.test_preference:on_two_ranks", seed=seed)
    assert ranks[0] == ranks[1]
    return {**ranks[0], "plain": one}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_one_plain_process(layout: str, curves: dict[str, list[list[float]]]) -> None:
    """Losses within 1e-5 over ten steps; log-probabilities of whole answers within as much of their size."""
    first = curves[layout][0]
    assert first[0] == pytest.approx(np.log(2), abs=TOLERANCE) and first[4] == pytest.approx(0, abs=TOLERANCE)
    for step, (ours, theirs) in enumerate(zip(curves[layout], curves["plain"], strict=True)):
        assert ours[0] == pytest.approx(theirs[0], abs=TOLERANCE), step
        assert ours[2:4] == pytest.approx(theirs[2:4], rel=TOLERANCE), step
        assert ours[4] == pytest.approx(theirs[4], abs=10 * TOLERANCE), step
        assert ours[5] == pytest.approx(theirs[5], rel=1e-3), step
    assert curves[layout][-1][0] != pytest.approx(np.log(2), abs=1e-2)


def frozen(root: str) -> dict[str, list[str]]:
    """Of each layout the errors of a run whose reference is its start, and of one that starts from an older step."""
    out = {}
    for tp, zero in ((1, 1), (1, 3), (2, 1)):
        with run.layout(tp=tp) as mesh:
            out[f"tp{tp} zero{zero}"] = compared(Path(root) / f"{tp}{zero}", run.config(tp=tp, zero=zero), mesh)
    return out


def compared(root: Path, cfg: PretrainConfig, mesh: Mesh) -> list[str]:
    from conf.errors import UserError
    from trainer.checkpoint.frozen import check_start, keep_reference, load_reference
    from trainer.checkpoint.load import start_from
    from trainer.run.folder import RunFolder

    base, own = RunFolder(root / "base"), RunFolder(root / "run")
    first = run.build(cfg, mesh)
    saver = run.saver(first, base.root)
    for step in (1, 2):
        run.one_step(first, step)
        saver.save(step, {}, last=False)
        saver.wait()
    first.close()
    older, later = base.published()
    if mesh.world.is_main:
        (later / TOKENIZER).write_bytes(b"{}")
        own.take_generation()
    dist.barrier()
    cfg.model.vocab_size += 3  # of special tokens
    folder = keep_reference(own, mesh, str(later), resumed=False)
    reference = load_reference(folder, cfg.model, mesh, seed=cfg.seed, sequence_parallel=False)
    said = []
    for checkpoint in (later, older):
        model = GPT(cfg.model, mesh)
        initialise(model, cfg.model, cfg.seed)
        start_from(checkpoint, model, mesh)
        engine = run.TinyEngine(model, cfg, mesh)
        try:
            check_start(engine, reference, str(checkpoint), folder)
            said.append("same")
        except UserError as e:
            said.append(str(e))
        engine.close()
    return said


@pytest.mark.slow
def test_the_reference_is_the_start_or_refused(tmp_path: Path) -> None:
    """On every rank, also with the rows that special tokens add."""
    for rank in run_ranks(2, "tests.distributed.trainer.objective.test_preference:frozen", root=str(tmp_path)):
        assert len(rank) == 3
        for layout, (same, other) in rank.items():
            assert same == "same", layout
            assert "holds other weights than init_from=" in other, layout
            assert "give the init_from that this run began with" in other, layout
