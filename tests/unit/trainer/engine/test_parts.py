"""A module declares its parameters and parts; the engine refuses one whose declaration is wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed import tiny_run
from tests.distributed.two_trunks import Both, Pair, Policy, PolicyAndValue, Value, micro_batches
from trainer.distributed.mesh import Mesh
from trainer.engine.engine import check_specs
from trainer.engine.muon import is_matrix
from trainer.engine.parts import part_name, parts_of, touch_unused
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.objective.objective import weighted_loss


def pair(mesh: Mesh) -> Pair:
    cfg = tiny_run.model_config(vocab_size=50)
    module = Pair(cfg, mesh)
    initialise(module, cfg, 1)
    return module


def test_specs_of_trunks_and_heads(mesh: Mesh) -> None:
    """A second trunk and a head are declared under their prefix, and the first trunk without one."""
    module = pair(mesh)
    check_specs(module, module.specs(), 1)
    trunk = GPT(module.cfg, mesh).specs()
    assert set(module.specs()) == {*trunk, *(f"value.{n}" for n in trunk), "head.weight", "head.bias"}


def test_a_wrong_declaration_is_refused(mesh: Mesh) -> None:
    """One error names every parameter that is missing, undeclared or of another shape."""
    module = pair(mesh)
    del module.ln_f
    module.ln_f = nn.LayerNorm(7, bias=False)
    module.extra = nn.Linear(2, 2, bias=False)
    with pytest.raises(ValueError, match=r"^Pair's parameters differ from its specs") as error:
        check_specs(module, module.specs(), 1)
    assert str(error.value).partition(": ")[2].split("; ") == [
        "extra.weight is not declared",
        "ln_f.bias is declared and missing",
        "ln_f.weight is (7,), declared (42,)",
    ]


def test_parts_and_their_parameters(mesh: Mesh) -> None:
    parts = parts_of(pair(mesh))
    assert list(parts) == ["", "value", "head"]
    owners = {"wte.weight": "", "h.0.ln_1.bias": "", "value.wte.weight": "value", "head.bias": "head", "header.x": ""}
    assert {name: part_name(name, parts) for name in owners} == owners
    assert is_matrix("value.h.1.mlp.c_fc.weight", (2, 2)) and not is_matrix("head.weight", (2, 2))


@pytest.mark.parametrize(("kind", "touched"), [(Policy, {"value", "head"}), (Value, {"wte"}), (Both, set())])
def test_a_part_left_out_gets_a_zero_gradient(kind: type, touched: set[str], mesh: Mesh) -> None:
    """And what is used gets the gradient that it has alone, bit for bit."""
    module = pair(mesh)
    [batch] = micro_batches(0, [kind], 50, 1, 0)

    def gradients(touch: bool) -> dict[str, Any]:
        module.zero_grad()
        sums = module(PolicyAndValue().sums, batch)
        (touch_unused(module, sums) if touch else sums).sum().backward()
        return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}

    without, grads = gradients(False), gradients(True)
    left_out = {name for name, grad in without.items() if grad is None}
    assert touched <= {name.partition(".")[0] for name in left_out} and bool(left_out) == bool(touched)
    for name, grad in grads.items():
        assert grad is not None and torch.equal(grad, torch.zeros_like(grad) if name in left_out else without[name])


def test_weighted_loss_skips_terms_that_count_nothing() -> None:
    objective = PolicyAndValue()
    assert weighted_loss(objective, [3.0, 5.0], [2.0, 10.0]) == 1.5 + 0.7 * 0.5
    assert weighted_loss(objective, [3.0, 0.0], [2.0, 0.0]) == 1.5
    assert math.isnan(weighted_loss(objective, [0.0, 0.0], [0.0, 0.0]))
