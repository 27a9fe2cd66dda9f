"""Every combination of parallel settings is trained by a test, two settings at a time, or refused by name."""

from __future__ import annotations

import pytest
import torch

from conf.errors import UserError
from conf.schema import load
from tests.distributed import tiny_run
from tests.distributed.layout_cases import Case, every_case, pairs, refusal, trained
from trainer.config.optim import Kind
from trainer.config.pretrain import PretrainConfig
from trainer.model.specs import from_local, specs, to_local
from trainer.plan.layout_rules import check_layout

SIZES = ("gpt2_small", "gpt2_medium", "gpt2_large", "gpt2_xl", "gpt1")


def check(case: Case) -> None:
    muon = {"kind": Kind.muon, "muon_lr": 0.02, "momentum": 0.95} if case.kind == "muon" else {}
    cfg = tiny_run.config(
        tp=case.tp,
        sequence_parallel=case.sequence_parallel,
        zero=case.zero,
        recompute=case.recompute,
        offload=case.offload,
        optim=muon,
        micro_batch_size=1 if case.accumulate else 8 * case.tp // 4,
        model={"n_head": 4, "n_embd": 40},
    )
    check_layout(cfg, 4)


def test_every_combination_is_accepted_or_refused_by_name() -> None:
    for case in every_case():
        said = refusal(case)
        if said is None:
            check(case)
        else:
            with pytest.raises(UserError, match=said):
                check(case)


def test_every_two_settings_accepted_together_train_together() -> None:
    accepted = set().union(*(pairs(case) for case in every_case() if refusal(case) is None))
    covered = set().union(*(pairs(case) for case in trained()))
    assert sorted(accepted - covered, key=str) == []
    assert [case for case in trained() if refusal(case)] == []


@pytest.mark.parametrize("size", SIZES)
def test_every_size_lies_on_one_to_eight_ranks(size: str) -> None:
    """Shapes on every rank, and the way back to the true ones; what does not divide is refused with what does."""
    cfg = load(PretrainConfig, [f"model={size}", "data.path=x", "max_steps=1", "data.lanes=1"])
    for tp in range(1, 9):
        cfg.parallel.tp = tp
        if 4 * cfg.model.n_embd % tp:
            with pytest.raises(UserError, match=f"not a multiple of parallel.tp={tp}: give parallel.tp of 1, 2"):
                check_layout(cfg, tp)
        else:
            lies_on(cfg, tp)


def lies_on(cfg: PretrainConfig, tp: int) -> None:
    assert check_layout(cfg, tp).dp == 1
    heads = -(-cfg.model.n_head // tp)
    for name, spec in specs(cfg.model, tp).items():
        if name.startswith("h.") and not name.startswith("h.0."):
            continue  # like the first
        parts = [to_local(torch.empty(spec.shape, device="meta"), spec, rank, tp) for rank in range(tp)]
        assert len({p.shape for p in parts}) == 1
        assert from_local(parts, spec).shape == spec.shape
        if name == "h.0.attn.c_attn.weight":
            assert parts[0].shape == (3 * heads * cfg.model.head_dim, cfg.model.n_embd)
        if name == "wte.weight":
            assert parts[0].shape[0] % 64 == 0


def test_gpt2_xl_is_padded_on_eight_ranks() -> None:
    """To 32 heads and a vocabulary of 50,688."""
    layout = specs(load(PretrainConfig, ["model=gpt2_xl", "data.path=x", "max_steps=1"]).model, 8)
    assert layout["h.0.attn.c_proj.weight"].padded == (1600, 32 * 64)
    assert layout["wte.weight"].padded == (50688, 1600)
