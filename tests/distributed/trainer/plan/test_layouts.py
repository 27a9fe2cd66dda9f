"""Layouts of four ranks are plain training on one: tensor, sequence and data parallelism, ZeRO, recompute, offload,
accumulation, AdamW and Muon, every two of them together in some case (test_layout_rules.py counts)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import tiny_run as run
from tests.distributed.layout_cases import Case, trained
from tests.distributed.trainer.engine.test_muon import MUON, plain_muon
from tests.distributed.trainer.engine.test_muon import TOLERANCE as MUON_TOLERANCE
from tests.distributed.trainer.engine.test_zero import FEW, TOLERANCE, assert_same_curve, plain_torch
from tests.helpers.ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.long]
# 4 and 5 heads on 4 ranks, the 5 padded to 8; 3 on 2 ranks, padded to 4
SHAPES = {1: {"n_head": 3, "n_embd": 42}, 2: {"n_head": 3, "n_embd": 42}, 4: {"n_head": 5, "n_embd": 40}}
EVEN = {"n_head": 4, "n_embd": 40}


def shape(case: Case) -> dict[str, Any]:
    return EVEN if case.tp == 4 and not case.sequence_parallel else SHAPES[case.tp]


def config(case: Case) -> Any:
    return run.config(
        tp=case.tp,
        sequence_parallel=case.sequence_parallel,
        zero=case.zero,
        recompute=case.recompute,
        offload=case.offload,
        optim=MUON if case.kind == "muon" else None,
        micro_batch_size=1 if case.accumulate else run.WINDOWS * case.tp // 4,
        model=shape(case),
    )


def on_one_rank() -> dict[str, Any]:
    with run.layout() as mesh:
        out = {str(how): plain_torch(run.config(model=how), mesh, 1.0) for how in (*SHAPES.values(), EVEN)}
        return out | {"muon": plain_muon(run.config(optim=MUON), mesh)}


def on_four_ranks() -> dict[str, Any]:
    out = {}
    for tp in (1, 2, 4):
        with run.layout(tp=tp) as mesh:
            for case in trained():
                if case.tp == tp:
                    out[str(case)] = run.curve(run.build(config(case), mesh), FEW)
    return out


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return run_ranks(1, "tests.distributed.trainer.plan.test_layouts:on_one_rank")[0]


@pytest.fixture(scope="module")
def four() -> dict[str, Any]:
    return run_ranks(4, "tests.distributed.trainer.plan.test_layouts:on_four_ranks")[0]


@pytest.mark.parametrize("case", trained(), ids=str)
def test_a_layout_equals_one_plain_process(case: Case, one: dict[str, Any], four: dict[str, Any]) -> None:
    muon = case.kind == "muon"
    want = one["muon" if muon else str(shape(case))]
    assert_same_curve(four[str(case)], want, MUON_TOLERANCE if muon else TOLERANCE)
