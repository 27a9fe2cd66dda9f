"""Each experiment of a paper is the run that its comment and docs/experiments.md say, by the real plan and schedule."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from conf.schema import CONF, load, options
from data_pipeline.order.ledger import Ledger
from data_pipeline.order.stages import plan_ledger
from trainer.config.pretrain import PretrainConfig
from trainer.engine.schedule import lr_at
from trainer.model.arithmetic import param_count
from trainer.plan.layout_rules import check_layout

PAGE = Path(__file__).resolve().parents[3] / "docs" / "experiments.md"
PAPERS = [name for name in options("experiment") if name != "demo"]
RATES = {"small": 6.0e-4, "medium": 3.0e-4, "large": 2.5e-4, "xl": 2.0e-4}  # Brown et al. 2020, table 2.1
GPT3 = {  # parameters, tokens of a full batch: table 2.1
    "small": (125_226_240, 524_288),
    "medium": (355_871_744, 524_288),
    "large": (760_300_032, 524_288),
    "xl": (1_315_723_264, 1_048_576),
}
SIZES = pytest.mark.parametrize("size", GPT3)
EXPERIMENTS = pytest.mark.parametrize("name", PAPERS)
MORE = {"gpt1": ["micro_batch_size=1"], "gpt2": [], "gpt3": ["data.lanes=64", "batch_ramp.start=131072"]}  # at dp=64


@cache
def experiment(name: str, *overrides: str) -> PretrainConfig:
    cfg = load(PretrainConfig, [f"experiment={name}", "data.path=data", *overrides])
    assert isinstance(cfg, PretrainConfig)
    return cfg


@cache
def ledger_of(name: str) -> Ledger:
    cfg = experiment(name)
    return plan_ledger(cfg.data, n_ctx=cfg.model.n_ctx, tokens_per_step=cfg.tokens_per_step, ramp=cfg.batch_ramp)


def rate(name: str, step: int) -> float:
    cfg, ledger = experiment(name), ledger_of(name)
    return lr_at(
        cfg.optim.schedule,
        cfg.optim.lr,
        step=step,
        max_steps=cfg.max_steps,
        tokens=ledger.tokens(step),
        step_tokens=ledger.segment(step).tokens_per_step,
        end_tokens=ledger.tokens(cfg.max_steps),
    )


def step_at(name: str, tokens: int) -> int:
    """The first step before which so many tokens were trained on."""
    low, high = 0, experiment(name).max_steps
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if ledger_of(name).tokens(middle) >= tokens else (middle + 1, high)
    return low


def row(name: str) -> str:
    """A line of the table in docs/experiments.md."""
    cfg, ledger = experiment(name), ledger_of(name)
    ramp = f"from {cfg.batch_ramp.start:,} over {cfg.batch_ramp.over:,}" if cfg.batch_ramp.start else "none"
    cells = [
        f"`{name}`",
        f"{param_count(cfg.model):,}",
        f"{ledger.tokens(cfg.max_steps):,}",
        f"{cfg.max_steps:,}",
        f"{cfg.tokens_per_step:,}",
        ramp,
        f"{cfg.optim.lr:.1e}",
    ]
    return f"| {' | '.join(cells)} |"


def shares(name: str) -> str:
    """A line of the table of layouts: what a step is on 1, 8 and 64 data-parallel ranks, once the batch is full."""
    cells = []
    for dp in (1, 8, 64):
        cfg = experiment(name, *(MORE[name[:4]] if dp == 64 else []))
        g = check_layout(cfg, dp)
        assert g.dp * g.micro_batch_size * g.grad_accum_steps * cfg.model.n_ctx == cfg.tokens_per_step
        cells.append(f"{g.micro_batch_size} x {g.grad_accum_steps}")
    return f"| `{name}` | {' | '.join(cells)} | {' '.join(f'`{m}`' for m in MORE[name[:4]]) or '-'} |"


def test_every_size_of_the_papers_has_its_experiment() -> None:
    sizes = ("small", "medium", "large", "xl")
    assert set(PAPERS) == {"gpt1_bookcorpus", *(f"gpt2_{s}_webtext" for s in sizes), *(f"gpt3_{s}_mix" for s in sizes)}


@EXPERIMENTS
def test_the_run_has_the_tokens_that_its_comment_says(name: str) -> None:
    (stated,) = re.findall(r"^# tokens: ([\d,]+)$", (CONF / f"experiment/{name}.yaml").read_text(), re.MULTILINE)
    tokens, end = int(stated.replace(",", "")), experiment(name).max_steps
    assert abs(ledger_of(name).tokens(end) - tokens) <= 0.005 * tokens
    assert ledger_of(name).tokens(end - 1) < tokens <= ledger_of(name).tokens(end), "to the step"


@EXPERIMENTS
def test_the_page_has_the_experiment_and_its_split_over_ranks(name: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert f"{row(name)}\n" in page and f"{shares(name)}\n" in page, f"{row(name)}\n{shares(name)}"
    assert experiment(name).run.name == name and experiment(name).run.dir == f"runs/{name}"


def test_the_page_speaks_of_no_other_experiment() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)) == set(PAPERS)


@SIZES
def test_gpt3_is_as_its_tables_say(size: str) -> None:
    name = f"gpt3_{size}_mix"
    cfg, ledger, (parameters, batch) = experiment(name), ledger_of(name), GPT3[size]
    assert (param_count(cfg.model), cfg.tokens_per_step, cfg.model.n_ctx) == (parameters, batch, 2048)
    assert (cfg.optim.beta1, cfg.optim.beta2, cfg.optim.eps) == (0.9, 0.95, 1e-8)
    assert (cfg.optim.weight_decay, cfg.optim.grad_clip) == (0.1, 1.0)
    assert not cfg.data.document_mask and set(cfg.data.sources) >= {"common_crawl", "webtext2", "wikipedia"}
    first, last = ledger.segments[0], ledger.segments[-1]
    assert (first.tokens_per_step, last.tokens_per_step) == (32_768, batch)
    over = ledger.tokens(last.step)
    assert 4e9 <= over < 12e9 and cfg.batch_ramp.over <= over < cfg.batch_ramp.over + batch
    peak, warm, decayed = RATES[size], step_at(name, 375_000_000), step_at(name, 260_000_000_000)
    assert rate(name, 0) == pytest.approx(peak * 32_768 / 375e6)
    assert max(rate(name, s) for s in range(warm - 3, warm + 3)) == pytest.approx(peak, rel=1e-4)
    assert rate(name, warm // 2) < 0.6 * peak and rate(name, decayed - 2000) > 0.1 * peak * 1.00001
    assert [rate(name, s) for s in (decayed, cfg.max_steps - 1)] == pytest.approx([0.1 * peak] * 2)


@SIZES
def test_gpt2_has_gpt3s_rate_and_512_sequences_of_1024(size: str) -> None:
    name = f"gpt2_{size}_webtext"
    cfg, peak = experiment(name), RATES[size]
    assert (cfg.tokens_per_step, cfg.model.n_ctx, cfg.optim.beta2) == (512 * 1024, 1024, 0.95)
    warm = cfg.optim.schedule.warmup
    assert abs(warm * cfg.tokens_per_step - 375e6) < cfg.tokens_per_step
    assert rate(name, warm - 1) == pytest.approx(peak) and rate(name, 0) == pytest.approx(peak / warm)
    assert rate(name, cfg.max_steps - 1) == pytest.approx(0.1 * peak, rel=1e-4)


def test_gpt1_is_as_its_section_says() -> None:
    name = "gpt1_bookcorpus"
    cfg = experiment(name)
    assert (cfg.tokens_per_step, cfg.model.n_ctx, cfg.model.dropout) == (64 * 512, 512, 0.1)
    assert (cfg.optim.beta2, cfg.optim.weight_decay, cfg.optim.schedule.warmup) == (0.999, 0.01, 2000)
    assert rate(name, 1999) == pytest.approx(2.5e-4) and rate(name, 0) == pytest.approx(2.5e-4 / 2000)
    assert rate(name, cfg.max_steps - 1) < 1e-4 * 2.5e-4


@SIZES
def test_gpt3_takes_64_ranks_as_16_copies_of_4(size: str) -> None:
    assert check_layout(experiment(f"gpt3_{size}_mix", "parallel.tp=4"), 64).dp == 16
