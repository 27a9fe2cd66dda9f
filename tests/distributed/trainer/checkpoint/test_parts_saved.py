"""Checkpoints of a module of several parts: each parameter and moment is saved, reshaped and loaded by its own name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conf.errors import UserError
from tests.distributed import tiny_run as run
from tests.distributed import two_trunks
from tests.distributed.two_trunks import Both, Policy, PolicyAndValue, Value
from tests.helpers.ranks import run_ranks
from trainer.checkpoint import load
from trainer.checkpoint.files import SavedWeights
from trainer.hf.weights import to_hf
from trainer.model.gpt import GPT

HERE = "tests.distributed.trainer.checkpoint.test_parts_saved"
STEPS: list[list[type]] = [[Policy, Value], [Both, Both]]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2 zero1": {"tp": 2, "sequence_parallel": True},
    "dp2 zero3": {"zero": 3},
    "dp2 zero2": {"zero": 2},
}
pytestmark = pytest.mark.slow
KINDS = ("master", "exp_avg", "exp_avg_sq")


def build(how: dict[str, Any], mesh: Any, checkpoint: str | None = None) -> run.TinyEngine:
    cfg = run.config(**how)
    pair = two_trunks.build(cfg, mesh)
    if checkpoint:
        with torch.no_grad():
            for p in pair.parameters():
                p.fill_(torch.nan)
        load.load_weights(Path(checkpoint), pair, mesh)
    engine = run.TinyEngine(pair, cfg, mesh, PolicyAndValue())
    if checkpoint:
        load.restore(Path(checkpoint), engine)
    return engine


def save(engine: run.TinyEngine, folder: Path) -> str:
    saver = run.saver(engine, folder)
    saver.save(2, {}, last=True)
    return str(saver.writer.run.checkpoint(2, 1))


def go_on(engine: run.TinyEngine) -> list[Any]:
    return [two_trunks.engine_step(engine, 2 + i, kinds) for i, kinds in enumerate(STEPS)]


def train(folder: str) -> dict[str, Any]:
    """Two steps and a checkpoint on one layout; it is loaded on the others, saved again and trained further."""
    out: dict[str, Any] = {}
    with run.layout(tp=2) as mesh:
        engine = build(LAYOUTS["tp2 zero1"], mesh)
        for step, kinds in enumerate(STEPS):
            two_trunks.engine_step(engine, step, kinds)
        whole = {kind: two_trunks.whole(engine, kind) for kind in KINDS}
        first = save(engine, Path(folder) / "first")
        torch.save(whole, Path(folder) / f"whole-{mesh.world.rank}.pt")
        out["first"] = {"path": first, "then": go_on(engine)}
        engine.close()
    for name, how in LAYOUTS.items():
        with run.layout(tp=how.get("tp", 1)) as mesh:
            engine = build(how, mesh, first)
            out[name] = {"path": save(engine, Path(folder) / name), "then": go_on(engine)}
            engine.close()
    with run.layout() as mesh:
        trunk = run.TinyEngine(GPT(run.model_config(), mesh), run.config(), mesh)
        alone = save(trunk, Path(folder) / "trunk")
        trunk.close()
        for name, checkpoint in {"a trunk alone": alone, "the whole": first}.items():
            try:
                build({}, mesh, checkpoint).close()
            except UserError as e:
                out[name] = str(e)
        policy = GPT(run.model_config(), mesh)
        load.load_weights(Path(first), policy, mesh)
        out["policy"] = {name: p.detach().sum().item() for name, p in policy.named_parameters()}
        engine = run.TinyEngine(policy, run.config(), mesh)
        with pytest.raises(UserError, match=r"head\.bias"):
            load.restore(Path(first), engine)
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parts")
    [got, _] = run_ranks(2, f"{HERE}:train", timeout_s=300, folder=str(folder))
    return {**got, "whole": torch.load(folder / "whole-0.pt", weights_only=True)}


def test_every_part_is_saved_with_its_moments(trained: dict[str, Any]) -> None:
    """The checkpoint of each layout holds the masters and moments that the first one gathered, bit for bit."""
    whole = trained["whole"]
    assert {"head.weight", "value.wte.weight", "wte.weight"} <= whole["master"].keys()
    for name in ("first", *LAYOUTS):
        saved = SavedWeights(Path(trained[name]["path"]))
        assert set(saved) == whole["master"].keys(), name
        for kind in KINDS:
            for parameter, value in whole[kind].items():
                assert torch.equal(saved.full(kind, parameter), value), (name, kind, parameter)


@pytest.mark.parametrize(("name", "like"), [("tp2 zero1", "first"), ("dp2 zero3", "dp2 zero2")])
def test_training_goes_on_the_same(trained: dict[str, Any], name: str, like: str) -> None:
    """As the run that was not interrupted; two other layouts, which have twice its rows, as each other."""
    for (sums, norm), (want, want_norm) in zip(trained[name]["then"], trained[like]["then"], strict=True):
        assert sums == pytest.approx(want, rel=1e-5)
        assert norm == pytest.approx(want_norm, rel=1e-5)


def test_a_trunk_alone_is_no_checkpoint_of_the_pair(trained: dict[str, Any]) -> None:
    assert "the whole" not in trained
    assert "has no value.wte.weight, no value.wpe.weight, " in trained["a trunk alone"]
    assert "another kind of run" in trained["a trunk alone"]


def test_the_policy_loads_and_exports_without_the_rest(trained: dict[str, Any]) -> None:
    path = Path(trained["first"]["path"])
    saved = SavedWeights(path)
    for name, total in trained["policy"].items():
        assert total == pytest.approx(saved[name].sum().item(), abs=1e-4), name
    exported = to_hf(saved, saved.cfg)
    assert len(exported) == len(trained["policy"])
    assert (path / "model.safetensors").stat().st_size > 4 * sum(t.numel() for t in exported.values())
