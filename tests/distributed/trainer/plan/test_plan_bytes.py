"""The plan's bytes are those that the real engine holds: every storage counted on a CPU, without a device's own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.tiny_run import config
from tests.helpers.ranks import run_ranks
from trainer.config.parallel import Offload, Recompute
from trainer.plan.layout import Layout
from trainer.plan.memory import activations, tensor_memory, zero_states
from trainer.plan.workload import Workload

MODEL = {"n_layer": 2, "n_head": 3, "n_embd": 192, "n_ctx": 128, "vocab_size": 2000}
RUN = "tests.distributed.allocations:measure"
FEW: list[dict[str, Any]] = [{"zero": 1, "micro": 2}, {"zero": 2, "micro": 16}]
MANY: list[dict[str, Any]] = [
    {"zero": 3, "micro": 2},
    {"zero": 1, "micro": 16},
    {"zero": 1, "micro": 16, "recompute": "full"},
    {"zero": 1, "micro": 16, "recompute": "selective"},
    {"zero": 2, "micro": 2},
    {"zero": 1, "micro": 2, "precision": "fp32"},
]


def planned(case: dict[str, Any], ranks: int) -> tuple[Workload, Layout]:
    tp = case.get("tp", 1)
    cfg = config(precision=case.get("precision", "bf16"), model=MODEL)
    layout = Layout(
        dp=ranks // tp,
        tp=tp,
        sequence_parallel=case.get("sequence_parallel", False),
        zero_stage=case["zero"],
        recompute=Recompute(case.get("recompute", "none")),
        offload=Offload.none,
        micro_batch_size=case["micro"],
    )
    cfg.tokens_per_step = layout.dp * layout.micro_batch_size * cfg.model.n_ctx
    return Workload.of(cfg), layout


def check(ranks: int, cases: list[dict[str, Any]]) -> None:
    measured = run_ranks(ranks, RUN, timeout_s=600, cases=[{**case, "model": MODEL} for case in cases])
    for rank in measured:
        for case, found in zip(cases, rank, strict=True):
            work, layout = planned(case, ranks)
            peak = max(found["forward"], found["backward"], found["step"])
            total = tensor_memory(work, layout).total
            assert total == pytest.approx(peak, rel=0.10), f"{case} on {ranks} ranks: {total / peak:.3f} of {found}"
            tokens = layout.micro_batch_size * work.model.n_ctx
            logits = work.element_bytes * tokens * (2048 // layout.tp)  # of the padded vocabulary
            kept = activations(work, layout) + logits
            if layout.recompute is Recompute.none and layout.zero_stage < 3:  # 3: gathered weights are saved too
                assert kept == pytest.approx(found["saved"], rel=0.05), (
                    f"{case}: {kept / found['saved']:.3f} of {found}"
                )


@pytest.mark.slow
@pytest.mark.long
def test_zero_1_and_2_hold_the_planned_bytes_on_two_ranks() -> None:
    check(2, FEW)


@pytest.mark.long
@pytest.mark.slow
def test_every_wrapper_holds_the_planned_bytes_alone() -> None:
    check(1, [*FEW, *MANY])


@pytest.mark.long
@pytest.mark.slow
def test_every_layout_of_two_ranks_holds_the_planned_bytes() -> None:
    tp = [{"zero": 1, "tp": 2, "micro": 16, "sequence_parallel": split} for split in (False, True)]
    check(2, [*MANY, *tp])


def test_bf16_takes_16_bytes_a_parameter_and_the_weights() -> None:
    """Between steps: fp32 masters, two moments and the sum of gradients."""
    work, layout = planned({"zero": 1, "micro": 2}, 1)
    states = zero_states(1000, layout, work.element_bytes, False)
    assert (states.weights, states.gradients, states.optimizer) == (2000, 4000, 12000)
