"""The plan of a run: parts against hand arithmetic, what must not grow, what is chosen, one line for each mistake."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from conf.errors import UserError
from conf.frozen import freeze
from conf.schema import load, options
from data_pipeline.files import GIB
from data_pipeline.order.stages import plan_ledger
from launch.config import PlanConfig
from launch.plan import Run, as_json, cluster_of, cut, parts_of, plan
from tests.benchmarks.plan import speed_rows
from tests.helpers.seeds import seeded
from trainer.config.model import ModelConfig
from trainer.config.parallel import Offload, Recompute
from trainer.config.pretrain import PretrainConfig
from trainer.distributed.world import World
from trainer.model.arithmetic import flops_per_token, param_count
from trainer.plan import hardware
from trainer.plan.attention_cost import visited
from trainer.plan.choose import is_open, resumed, rows, settle, way_out
from trainer.plan.course import curves, gpu_counts
from trainer.plan.hardware import GPUS, installed_gpu, recognise
from trainer.plan.layout import Layout, local_params
from trainer.plan.memory import activations, bias_bytes, logit_bytes, memory, tensor_memory, zero_states
from trainer.plan.network import Cluster, all_reduce, gather, tp_rate, tp_seconds
from trainer.plan.speed import step_seconds
from trainer.plan.workload import Workload
from trainer.tracking.plots import check_picture

ROOT = Path(__file__).resolve().parents[4]
H100 = GPUS["h100_80gb"]
XL_PADDED = 1_557_611_200 + (50_304 - 50_257) * 1600
TOKENS = "data.tokens=9_000_000_000"


def config(*overrides: str) -> PlanConfig:
    cfg = load(PlanConfig, ["model=gpt2_xl", TOKENS, *overrides])
    assert isinstance(cfg, PlanConfig)
    return cfg


def layout(**changes: object) -> Layout:
    base = Layout(1, 1, False, 1, Recompute.none, Offload.none, 8)
    return replace(base, **changes)  # type: ignore[arg-type]


def test_parameters_on_a_rank_are_the_models_and_its_padding() -> None:
    model = config().model
    assert local_params(model, 1) == XL_PADDED
    assert param_count(model) == 1_557_611_200
    two = local_params(model, 2)  # 26 heads of 64 instead of 25, a vocabulary of 50,304, split; the rest whole
    block = 4 * 1600 + (3 * 832 * 1601) + (832 * 1600 + 1600) + 3200 * 1601 + (3200 * 1600 + 1600)
    assert two == (50_304 // 2 + 1024) * 1600 + 48 * block + 3200


@pytest.mark.parametrize(
    ("stage", "dp", "parts"),
    [
        (1, 1, (2, 4, 12)),
        (1, 8, (2, 4, 12 / 8)),
        (2, 8, (2, 4 / 8, 12 / 8)),
    ],
)
def test_zeros_parts_of_xl_are_bytes_a_parameter(stage: int, dp: int, parts: tuple[float, ...]) -> None:
    states = zero_states(XL_PADDED, layout(zero_stage=stage, dp=dp), 2, True)
    found = (states.weights, states.gradients, states.optimizer)
    assert found == pytest.approx([n * XL_PADDED for n in parts], rel=1e-12)


def test_zero_3_splits_weights_too_and_holds_a_billion_gathered() -> None:
    states = zero_states(XL_PADDED, layout(zero_stage=3, dp=8), 2, True)
    assert states.weights == pytest.approx(2 * XL_PADDED / 8 + 2e9)
    assert (states.gradients, states.optimizer) == pytest.approx((4 * XL_PADDED / 8, 12 * XL_PADDED / 8))


def test_activations_of_xl_are_16_c_a_token_and_layer() -> None:
    """A layer keeps 16 elements of the width for each token, and full recompute one."""
    work = Workload.of(config())
    tokens, c = 8 * 1024, 1600
    expected = tokens * (48 * (16 * c * 2 + 4 * 25) + 2 * c * 2)
    assert activations(work, layout()) == expected
    assert logit_bytes(work, layout()) == tokens * 50_304 * 2 + 2.25 * 64 * 2**20
    full = tokens * (48 * c * 2 + 2 * c * 2)
    assert activations(work, layout(recompute=Recompute.full)) == full


def random_layout(rng: random.Random) -> Layout:
    tp = rng.choice([1, 2, 4, 8])
    return Layout(
        dp=rng.choice([1, 2, 4, 8]),
        tp=tp,
        sequence_parallel=tp > 1 and rng.random() < 0.5,
        zero_stage=rng.choice([1, 2, 3]),
        recompute=rng.choice(list(Recompute)),
        offload=rng.choice(list(Offload)),
        micro_batch_size=rng.choice([1, 2, 4, 8]),
    )


def test_what_must_not_grow_does_not() -> None:
    """More dp, more recompute, more tp, sequence parallelism, a smaller micro batch: never more of what they split."""
    seed = seeded()
    rng, work = random.Random(seed), Workload.of(config())
    for _ in range(100):
        here = random_layout(rng)
        said = f"seed {seed}: {here}"
        base = tensor_memory(work, here)
        wider = tensor_memory(work, replace(here, dp=2 * here.dp))
        for part in ("weights", "gradients", "optimizer"):
            if not (part == "weights" and here.dp == 1 and here.zero_stage == 3):  # from here on weights are gathered
                assert getattr(wider, part) <= getattr(base, part), said
        kept = [activations(work, replace(here, recompute=r)) for r in Recompute]
        assert kept == sorted(kept, reverse=True), said
        if here.tp < 8:
            split = replace(here, tp=2 * here.tp)
            less, more = activations(work, split), activations(work, here)
            assert less < more or (less == more and here.recompute is Recompute.full), said  # a block's input is whole
            assert local_params(work.model, split.tp) < local_params(work.model, here.tp), said
        if here.tp > 1:
            whole, split = (activations(work, replace(here, sequence_parallel=s)) for s in (False, True))
            assert split < whole, said
        assert tensor_memory(work, replace(here, micro_batch_size=2 * here.micro_batch_size)).total >= base.total, said


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_the_best_of_xl_on_h100s_fits_and_adds_up(gpus: int) -> None:
    cfg = config(
        f"cluster.nodes={-(-gpus // 8)}", f"cluster.gpus_per_node={min(8, gpus)}", "cluster.price_per_gpu_hour=2"
    )
    cluster, price = cluster_of(cfg.cluster)
    found = rows(cfg, cluster)
    assert len(found) <= 1000  # each costs a tenth of a millisecond
    best = found[0]
    assert best.fits and 0.3 < best.mfu < 0.7 and best.layout.world_size == gpus
    assert best.memory.total < 80 * 2**30
    assert all(row.tokens_per_s <= best.tokens_per_s for row in found if row.fits)
    run = Run(cfg, cluster, price, parts_of(cfg))
    row = as_json(best, run)
    assert run.steps == -(-9_000_000_000 // cfg.tokens_per_step)
    assert row["days"] == pytest.approx(run.steps * best.step.total / 86400)
    assert row["cost"] == pytest.approx(row["days"] * 24 * gpus * 2)
    assert best.mfu == pytest.approx(best.tokens_per_s * flops_per_token(cfg.model) / (gpus * 989.4e12))
    parts = {name: size for name, size in row["memory_gib"].items() if name not in ("total", "host")}
    assert sum(parts.values()) == pytest.approx(row["memory_gib"]["total"], abs=0.01)
    assert row["step_s"]["total"] == pytest.approx(sum(best.step.parts().values()), abs=1e-4)


def test_predicted_speed_is_within_15_percent_of_the_measured() -> None:
    """One H100 SXM, DeepSpeed's own ZeRO-1 and a plain loop; the 355M row through DeepSpeed set TENSOR_S, no other."""
    found = speed_rows()
    assert len(found) == 6
    for row in found:
        assert row["ratio"] == pytest.approx(1, abs=0.15), row
    page = (ROOT / "docs/benchmarks/plan_h100.md").read_text()
    (printed,) = (json.loads(line) for line in page.splitlines() if line.startswith("{"))
    assert printed["speed"] == found  # the page is of this reckoning


def test_collectives_send_what_a_ring_sends() -> None:
    assert gather(8e9, 8, 1e9) == pytest.approx(7.0, rel=1e-4)
    assert all_reduce(8e9, 8, 1e9) == pytest.approx(14.0, rel=1e-4)
    assert gather(8e9, 1, 1e9) == 0


def test_an_update_moves_the_bytes_of_its_engine() -> None:
    """8 bytes a parameter in bf16, 12 in later micro steps, 38 on a rank's part; in fp32 12, 16 and 32."""
    rate = 0.8 * H100.hbm_gb_s * 1e9
    for micro_steps, dp, precision, expected in (
        (1, 1, "bf16", 8 + 38),
        (4, 8, "bf16", 8 + 3 * 12 + 38 / 8),
        (4, 8, "fp32", 12 + 3 * 16 + 32 / 8),
    ):
        cfg = config(f"precision={precision}", f"tokens_per_step={micro_steps * dp * 8192}", "data.lanes=8")
        step = step_seconds(Workload.of(cfg), layout(dp=dp), Cluster(1, dp, H100, 400))
        assert step.optimizer == pytest.approx(expected * XL_PADDED / rate), (micro_steps, precision)


def test_full_recompute_runs_the_collectives_of_forward_again() -> None:
    work, cluster = Workload.of(config()), Cluster(1, 2, H100, 400)
    for split in (False, True):
        here = layout(tp=2, sequence_parallel=split)
        one = all_reduce(8 * 1024 * 1600 * 2, 2, tp_rate(cluster))
        more = tp_seconds(work, replace(here, recompute=Recompute.full), cluster) - tp_seconds(work, here, cluster)
        assert more == pytest.approx(48 * 2 * one)


def test_a_copy_for_checkpoints_lies_in_the_hosts_memory() -> None:
    here = layout(dp=4)
    for cfg, each in ((config(), 12), (config("checkpoint.background=false"), 0)):
        work = Workload.of(cfg)
        assert memory(work, here, H100).host == pytest.approx(each * XL_PADDED / 4)
        on_cpu = memory(work, here, GPUS["cpu"])  # its memory is the device's
        assert on_cpu.host == 0
        assert on_cpu.total == pytest.approx(tensor_memory(work, here).total + 0.7 * GIB + each * XL_PADDED / 4)


def test_muon_has_one_moment_of_the_blocks_matrices() -> None:
    work, here = Workload.of(config("optim=muon")), layout(dp=4)
    expected = 12 * XL_PADDED - 4 * 48 * 12 * 1600**2
    assert tensor_memory(work, here).optimizer == pytest.approx(expected / 4)
    assert memory(work, here, H100).host == pytest.approx(expected / 4)


def test_fp8_is_faster_keeps_less_and_needs_its_gpu() -> None:
    bf16, fp8 = Workload.of(config()), Workload.of(config("precision=fp8"))
    tokens = 8 * 1024
    assert activations(fp8, layout()) == 48 * (tokens * (27 * 1600 + 4 * 25) + 12 * 1600**2) + tokens * 2 * 1600 * 2
    cluster = Cluster(1, 1, H100, 400)
    gain = step_seconds(bf16, layout(), cluster).matmul / step_seconds(fp8, layout(), cluster).matmul
    assert 1.5 < gain < 1.92  # of the blocks' products alone 1.78, the head is bf16
    with pytest.raises(UserError, match=r"^precision=fp8: a100_80gb has no fp8 products: .*h100_80gb"):
        rows(config("precision=fp8"), Cluster(1, 1, GPUS["a100_80gb"], 400))


def test_a_sparse_pattern_is_dense_where_flex_attention_is_not() -> None:
    """Dropout or a small head: all of the square is computed, and one bias [T, T] is there."""
    banded, dropped = (Workload.of(config("model=gpt3_xl", f"model.dropout={p}")) for p in (0, 0.1))
    assert "B" in banded.model.attention
    cluster, here, n = Cluster(1, 1, H100, 400), layout(micro_batch_size=2), 2048
    assert bias_bytes(banded, here, on_gpu=True) == 0
    assert bias_bytes(dropped, here, on_gpu=True) == bias_bytes(banded, here, on_gpu=False) == 2 * n * n
    fast, slow = (step_seconds(work, here, cluster).attention for work in (banded, dropped))
    shares = [visited(banded.model, i) for i in range(24)]
    dense = max(shares)
    assert slow / fast == pytest.approx((12 * dense + 12) / sum(shares))
    documents = Workload.of(config("model=gpt2_xl", "data.document_mask=true", "model.dropout=0.1"))
    assert bias_bytes(documents, layout(), on_gpu=True) == 8 * 1024**2 * 2


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_can_be_planned(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """To the tokens and steps that a run's own ledger has, ramp and all."""
    cfg = load(PlanConfig, [f"experiment={name}", "json=true"])
    assert isinstance(cfg, PlanConfig)
    plan(cfg)
    found = json.loads(capsys.readouterr().out)
    n_ctx, each = cfg.model.n_ctx, cfg.tokens_per_step
    ledger = plan_ledger(cfg.data, n_ctx=n_ctx, tokens_per_step=each, ramp=cfg.batch_ramp)
    assert (found["steps"], found["tokens"]) == (cfg.max_steps, ledger.tokens(cfg.max_steps))
    best = found["layouts"][0]
    assert best["days"] >= 0.999 * found["tokens"] / best["tokens_per_s"] / 86400  # small batches are no faster


def test_a_course_with_stages_and_a_ramp_is_the_ledgers() -> None:
    stages = "data.stages=[{step: 50, n_ctx: 512}, {step: 300, tokens_per_step: 1048576}]"
    cfg = config(stages, "batch_ramp.start=131072", "batch_ramp.over=100_000_000")
    ledger = plan_ledger(cfg.data, n_ctx=1024, tokens_per_step=524288, ramp=cfg.batch_ramp)
    for tokens in (1, 40_000_000, 99_999_999, 400_000_000):
        parts = parts_of(replace(cfg, data=replace(cfg.data, tokens=tokens)))
        steps, done = sum(p.steps for p in parts), sum(p.tokens for p in parts)
        assert done == ledger.tokens(steps) and ledger.tokens(steps - 1) < tokens <= done
    assert len({p.windows * p.n_ctx for p in parts}) > 5 and {p.n_ctx for p in parts} == {512, 1024}


def test_a_pattern_visits_the_blocks_that_its_mask_touches() -> None:
    """Against the mask itself, written out pair by pair."""
    T, block = 1024, 128
    model = ModelConfig("m", 4, 2, 128, T, 100, attention="DBSF", band=200, stride=300, summary=9)
    sees = {
        "D": lambda i, j: True,
        "B": lambda i, j: i - j < 200,
        "S": lambda i, j: i - j < 300 or (i - j) % 300 == 0,
        "F": lambda i, j: i // 300 == j // 300 or j % 300 >= 300 - 9,
    }
    for number, (kind, rule) in enumerate(sees.items()):
        touched = {(i // block, j // block) for i in range(T) for j in range(i + 1) if rule(i, j)}
        assert visited(model, number) == len(touched) / (T // block) ** 2, kind


def test_scaling_goes_to_512_gpus_and_loses_something() -> None:
    cfg = config("model=gpt2_small", "cluster=ethernet")
    found = curves(cfg, cluster_of(cfg.cluster)[0])
    assert [p["gpus"] for p in found["weak"]] == gpu_counts(8) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    for points in found.values():
        each = [p["tokens_per_s"] / p["gpus"] for p in points]
        assert all(b <= 1.02 * a for a, b in pairwise(each)), points
    assert found["strong"][-1]["tokens_per_s"] < found["weak"][-1]["tokens_per_s"]


def test_the_picture_is_a_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan(config("model=gpt2_small", f"plot={tmp_path}/scaling.png", "json=true"))
    assert (tmp_path / "scaling.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert set(json.loads(capsys.readouterr().out)["scaling"]) == {"weak", "strong"}
    check_picture(tmp_path / "scaling.png", "plot")  # its own may be replaced


def test_no_picture_is_drawn_over_a_file_of_others(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_bytes(b"years of work")
    with pytest.raises(UserError, match=r"^plot=.*/notes\.png: it is there and no picture of ours: move it away, or"):
        plan(config("model=gpt2_small", f"plot={tmp_path}/notes.png"))
    assert (tmp_path / "notes.png").read_bytes() == b"years of work"


def command(*argv: str, code: str = "") -> subprocess.CompletedProcess[str]:
    run = code or "import runpy; runpy.run_module('launch.plan', run_name='__main__')"
    watch = "heavy = [m for m in ('torch', 'numpy', 'matplotlib', 'deepspeed') if m in sys.modules]"
    text = f"import sys\ntry:\n    {run}\nfinally:\n    {watch}\n    print(heavy, file=sys.stderr)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", text, *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )


def test_the_command_prints_its_keys_and_imports_nothing_heavy() -> None:
    """JSON has every promised key, and neither torch, numpy, matplotlib nor DeepSpeed is imported."""
    where = ("cluster.nodes=4", "cluster.gpus_per_node=8", "cluster.gpu=h100_80gb")
    done = command("model=gpt2_xl", *where, TOKENS, "json=true")
    assert done.returncode == 0 and done.stderr == "[]\n", done.stderr
    result = json.loads(done.stdout)
    keys = {"dp", "tp", "zero_stage", "recompute", "micro_batch_size", "fits", "memory_gib", "tokens_per_s", "mfu"}
    parts = {"weights", "gradients", "optimizer", "activations", "logits", "workspace", "total"}
    for row in result["layouts"]:
        assert keys | {"days", "cost", "limit"} <= set(row) and parts <= set(row["memory_gib"])
    assert result["simulated"] and result["tokens"] == 9_000_000_000


def test_the_table_marks_the_best_and_says_what_is_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    plan(config("cluster.nodes=2"))
    out = capsys.readouterr().out
    assert "\nbest  " in out and "a simulation" in out and "in all" in out
    plan(config("cluster.gpus_per_node=1", "max_hours=0.5"))
    out = capsys.readouterr().out
    assert "a simulation" not in out and "\n  max_hours=0.5, over all starts, ends it after " in out
    assert cut(2.0, 8.0) == ["  max_hours=2, over all starts, ends it after 25% of 8.0 hours"] and cut(8.0, 8.0) == []


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["cluster.gpu=h100"], "cluster.gpu=h100: give one of h200_141gb, "),
        (["cluster.nodes=0"], "cluster.nodes=0: give at least 1"),
        (["cluster.network_gbit=-1"], "cluster.network_gbit=-1"),
        (["data.tokens=0"], "data.tokens=0: give at least 1"),
        (["data.tokens=null"], "not given: data.tokens"),
        (["gpu=a100_40gb"], "gpu=a100_40gb: a plan is for cluster.gpu=a100_40gb"),
        (["micro_batch_size=many"], "micro_batch_size=many: give an integer, or auto"),
        (["micro_batch_size=1.5"], "micro_batch_size=1.5: give an integer or auto"),
        (["micro_batch_size=7"], "micro_batch_size=7 does not divide the 64 windows of a rank"),
        (["parallel.tp=3"], "parallel.tp=3 does not divide the 8 GPUs of a node"),
        (
            ["cluster.gpu=rtx3090_24gb", "cluster.gpus_per_node=1", "parallel.offload=none"],
            "gpt2_xl does",
        ),
    ],
)
def test_a_mistake_is_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(config(*overrides))
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_a_pinned_value_stays() -> None:
    cfg = config("parallel.tp=2", "parallel.zero_stage=2", "micro_batch_size=4", "parallel.recompute=full")
    for row in rows(cfg, cluster_of(cfg.cluster)[0]):
        found = row.layout
        assert (found.tp, found.zero_stage, found.micro_batch_size) == (2, 2, 4)
        assert found.recompute is Recompute.full and found.sequence_parallel


def pretrain(*overrides: str) -> PretrainConfig:
    cfg = load(PretrainConfig, ["data.path=d", "max_steps=9", *overrides])
    assert isinstance(cfg, PretrainConfig)
    return cfg


AUTO = ("parallel=auto", "micro_batch_size=auto")


def test_auto_is_settled_for_a_given_gpu_as_the_plan_says() -> None:
    open_cfg = pretrain("model=gpt2_xl", "gpu=h100_80gb", *AUTO)
    assert is_open(open_cfg.parallel, open_cfg.micro_batch_size)
    cfg, said = settle(open_cfg, World(3, 8, 3, 8))
    assert not is_open(cfg.parallel, cfg.micro_batch_size) and cfg.tokens_per_step == open_cfg.tokens_per_step
    best = rows(config(), Cluster(1, 8, H100, 400))[0].layout
    found = cfg.parallel
    assert (found.tp, found.zero_stage, found.recompute, cfg.micro_batch_size) == (
        best.tp,
        best.zero_stage,
        best.recompute,
        best.micro_batch_size,
    )
    assert said.startswith("the plan's choice for 8 x h100_80gb: dp=8 tp=1 ")
    again, same = settle(open_cfg, World(0, 8, 0, 8))
    assert (again, same) == (cfg, said)  # every rank comes to the same
    frozen = freeze(cfg)  # what a run keeps has nothing open
    words = {line.strip() for line in frozen.splitlines() if line.endswith(" auto")}
    assert words == {"name: auto", "resume: auto", "compile: auto"} and "tp: 1\n" in frozen
    assert resumed({"dp": 4, "tp": 2, "zero_stage": 3}).endswith("was written on dp=4 tp=2 ZeRO-3")


def test_auto_works_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    cfg, said = settle(pretrain("experiment=demo", *AUTO), World(0, 2, 0))
    assert cfg.parallel.offload is Offload.none and 1 <= cfg.micro_batch_size <= 4 and "2 x cpu" in said


def test_nothing_is_settled_where_nothing_is_open() -> None:
    cfg = pretrain()
    assert settle(cfg, World(0, 1, 0)) == (cfg, "")


def test_what_does_not_fit_is_refused_with_the_way_out() -> None:
    cfg = pretrain("model=gpt2_xl", "gpu=rtx3090_24gb", "parallel=zero1", "micro_batch_size=auto")
    with pytest.raises(UserError, match=r"^gpt2_xl does not fit on 1 x rtx3090_24gb .*GiB.*parallel\.offload=cpu"):
        settle(cfg, World(0, 1, 0))


def test_the_way_out_names_no_knob_that_was_turned_in_vain() -> None:
    small = Cluster(1, 1, replace(GPUS["rtx3090_24gb"], memory_gib=2.0), 400)
    for words, named, not_named in (
        ([], [], ["parallel.", "micro_batch_size="]),
        (
            ["optim=muon"],
            ["optim.kind=adamw with parallel.offload=cpu"],
            ["parallel.recompute", "what helps: parallel"],
        ),
        (["parallel=zero1"], ["parallel.offload=cpu", "parallel.recompute=full"], ["micro_batch_size=1"]),
    ):
        cfg = config(*words)
        best = rows(cfg, small)[0]
        helps = way_out(best, Workload.of(cfg), cfg.parallel, cfg.micro_batch_size, small).partition("what helps: ")[2]
        assert not best.fits and "more GPUs" in helps
        assert all(word in helps for word in named) and not any(word in helps for word in not_named), helps


@pytest.mark.parametrize(
    ("name", "mib", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "81559", "h100_80gb"),
        ("NVIDIA H100 NVL", "95830", "h100_94gb"),
        ("NVIDIA H100 PCIe", "81559", "h100_pcie"),
        ("NVIDIA H200", "143771", "h200_141gb"),
        ("NVIDIA A100-SXM4-40GB", "40960", "a100_40gb"),
        ("NVIDIA A100-SXM4-80GB", "81920", "a100_80gb"),
        ("NVIDIA GeForce RTX 3090", "24576", "rtx3090_24gb"),
        ("Tesla V100-SXM2-32GB", "32768", "v100_32gb"),
    ],
)
def test_a_gpu_is_known_by_what_nvidia_smi_says(name: str, mib: str, row: str) -> None:
    assert recognise(name, mib).name == row


@pytest.mark.parametrize(
    ("name", "mib"),
    [
        ("NVIDIA A1000", "6144"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "9856"),
        ("NVIDIA A100 80GB PCIe", "81920"),
        ("NVIDIA H200 NVL", "143771"),
        ("X", "?"),
    ],
)
def test_an_unknown_gpu_is_named(name: str, mib: str) -> None:
    with pytest.raises(UserError, match=f"{name} with .* give gpu="):
        recognise(name, mib)


def test_the_gpu_that_is_there_is_asked_for_through_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'NVIDIA H100 80GB HBM3, 81559'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    assert installed_gpu() == H100
    tool.write_text("#!/bin/sh\nexit 9\n")
    monkeypatch.setattr(hardware, "DRIVER", (tmp_path / "nvidia0",))
    assert installed_gpu() is None  # no driver either
    (tmp_path / "nvidia0").touch()
    with pytest.raises(UserError, match=r"nvidia-smi names no GPU: give gpu= one of h200_141gb"):
        installed_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert installed_gpu() is None


def test_the_hardware_table_of_the_page_is_the_plans() -> None:
    page = (ROOT / "docs/plan.md").read_text()
    for gpu in GPUS.values():
        fp8 = "" if gpu.fp8_tflops is None else f"{gpu.fp8_tflops:g}"
        row = f"| `{gpu.name}` | {gpu.memory_gib:.1f} | {gpu.tflops:g} | {fp8} | {gpu.hbm_gb_s:g} | {gpu.link_gb_s:g} |"
        assert row in page
