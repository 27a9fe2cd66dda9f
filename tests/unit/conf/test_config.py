"""Batch geometry and layouts against brute force; what is refused, and the way out that each message gives."""

from __future__ import annotations

import re
from itertools import product

import pytest

from conf.errors import UserError
from data_pipeline.config import CacheConfig, DataConfig, SourceConfig
from data_pipeline.order.geometry import batch_geometry
from data_pipeline.prepare.recipe_config import BadWordsConfig, DedupConfig, LanguageConfig, LengthConfig
from data_pipeline.shards.shards_config import BpeTrainConfig, ShardsConfig
from launch.config import SuperviseConfig
from trainer.config.checkpoint import CheckpointConfig
from trainer.config.inference import GenerateConfig
from trainer.config.model import ModelConfig
from trainer.config.optim import Kind, OptimConfig, ScheduleConfig, ScheduleKind
from trainer.config.parallel import ParallelConfig, Precision
from trainer.config.pretrain import EvalConfig, PretrainConfig
from trainer.config.tracking import TrackerName, TrackingConfig
from trainer.config.train import RunConfig
from trainer.plan.layout_rules import check_layout


def deal(tokens_per_step: int, n_ctx: int, micro_batch_size: int, lanes: int, dp: int) -> int | None:
    """Micro steps of one optimizer update, by dealing out a step's windows one by one; None where they do not fit."""
    windows = [0] * lanes
    for i, start in enumerate(range(0, tokens_per_step, n_ctx)):
        if start + n_ctx > tokens_per_step:
            return None  # a window that is cut short
        windows[i % lanes] += 1
    if len(set(windows)) > 1 or lanes % dp:
        return None  # a lane gives more than another, or a rank would serve a part of a lane
    ranks = [sum(windows[r * (lanes // dp) : (r + 1) * (lanes // dp)]) for r in range(dp)]
    left, micro_steps = ranks[0], 0
    while left > 0:
        left, micro_steps = left - micro_batch_size, micro_steps + 1
    return micro_steps if left == 0 else None


def test_a_checkpoint_is_due_by_minutes() -> None:
    every = CheckpointConfig(every_steps=0, every_minutes=1.5)
    assert [every.due(age_s) for age_s in (0.0, 1.6, 89.0, 90.0)] == [False, False, False, True]
    assert not CheckpointConfig(every_steps=1).due(1e9)


def test_geometry_is_what_dealing_windows_out_one_by_one_gives() -> None:
    outcomes = set()
    for tokens, n_ctx, micro, lanes, dp in product(
        (8, 24, 32, 36, 96), (1, 4, 6), (1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)
    ):
        expected = deal(tokens, n_ctx, micro, lanes, dp)
        given = {"tokens_per_step": tokens, "n_ctx": n_ctx, "micro_batch_size": micro, "lanes": lanes, "dp": dp}
        if expected is None:
            with pytest.raises(UserError):
                batch_geometry(**given)
        else:
            geometry = batch_geometry(**given)
            assert geometry.grad_accum_steps == expected
            assert geometry.windows_per_rank * dp == geometry.windows_per_step == tokens // n_ctx
            assert geometry.grad_accum_steps * micro * dp * n_ctx == tokens
        outcomes.add(expected is None)
    assert outcomes == {True, False}


NAN = float("nan")
GOOD = {"tokens_per_step": 4096, "n_ctx": 128, "micro_batch_size": 4, "lanes": 8, "dp": 2}


@pytest.mark.parametrize(
    ("change", "message", "mended"),
    [
        (
            {"tokens_per_step": 4000},
            "tokens_per_step=4000 is not a multiple of model.n_ctx=128",
            {"tokens_per_step": 4096},
        ),
        (
            {"tokens_per_step": 100},
            "tokens_per_step=100 is not a multiple of model.n_ctx=128",
            {"tokens_per_step": 1024},
        ),
        ({"tokens_per_step": 0}, "tokens_per_step=0 is not a multiple", {"tokens_per_step": 1024}),
        ({"tokens_per_step": 1280}, "= 10 windows a step, not a multiple of data.lanes=8", {"tokens_per_step": 1024}),
        ({"dp": 3}, "dp=3 does not divide data.lanes=8: run on dp=2 or 4", {"dp": 4}),
        ({"dp": 16}, "dp=16 does not divide data.lanes=8", {"lanes": 16, "micro_batch_size": 2}),
        (
            {"tokens_per_step": 1024, "dp": 3, "micro_batch_size": 1},
            "data.lanes=3 and tokens_per_step=768 or 1152 (3 ranks cannot share 8 windows a step)",
            {"tokens_per_step": 1152, "lanes": 3},
        ),
        (
            {"tokens_per_step": 24 * 128, "dp": 3},
            "or start a new run with data.lanes=6 or 12",
            {"lanes": 12},
        ),
        (
            {"micro_batch_size": 5},
            "micro_batch_size=5 does not divide the 16 windows of a rank",
            {"micro_batch_size": 4},
        ),
        ({"micro_batch_size": 99}, "micro_batch_size=99 does not divide the 16 windows", {"micro_batch_size": 16}),
        ({"micro_batch_size": 0}, "micro_batch_size=0 does not divide", {"micro_batch_size": 1}),
    ],
)
def test_misfit_batches_are_refused(change: dict[str, int], message: str, mended: dict[str, int]) -> None:
    """A batch that does not fit is refused with a number that does."""
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        batch_geometry(**{**GOOD, **change})
    for key, value in mended.items():
        if key in change:
            assert re.search(rf"\b{value}\b", str(caught.value).split(": give ")[-1].split(": run on ")[-1])
    batch_geometry(**{**GOOD, **change, **mended})


def config(
    tp: int = 1, *, n_head: int = 4, n_embd: int = 64, n_ctx: int = 128, sequence_parallel: bool = False
) -> PretrainConfig:
    return PretrainConfig(
        run=RunConfig(name="r", dir="runs/r"),
        model=ModelConfig(name="m", n_layer=2, n_head=n_head, n_embd=n_embd, n_ctx=n_ctx, vocab_size=100),
        optim=OptimConfig(name="o", lr=1e-3, schedule=ScheduleConfig(kind=ScheduleKind.constant)),
        data=DataConfig(name="shards", path="data", sources={"shards": SourceConfig(".")}, lanes=8),
        parallel=ParallelConfig(name="p", tp=tp, sequence_parallel=sequence_parallel),
        eval=EvalConfig(every=10),
        checkpoint=CheckpointConfig(every_steps=10),
        tracking=TrackingConfig(name=TrackerName.none),
        tokens_per_step=8 * n_ctx,
        micro_batch_size=1,
        max_steps=10,
        precision=Precision.fp32,
    )


@pytest.mark.parametrize(("tp", "world_size", "dp"), [(1, 1, 1), (1, 8, 8), (2, 2, 1), (2, 4, 2), (4, 8, 2)])
def test_a_layout_gives_its_geometry(tp: int, world_size: int, dp: int) -> None:
    """A layout that fits gives the geometry of its data-parallel size."""
    geometry = check_layout(config(tp), world_size)
    assert (geometry.dp, geometry.grad_accum_steps, geometry.windows_per_step) == (dp, 8 // dp, 8)


def test_heads_that_tp_does_not_divide_are_fine() -> None:
    assert check_layout(config(2, n_head=5, n_embd=60), 2).dp == 1


@pytest.mark.parametrize(
    ("cfg", "world_size", "message"),
    [
        (config(2), 3, "parallel.tp=2 does not divide the 3 ranks: start a multiple of 2 ranks, or change parallel.tp"),
        (config(8, n_head=4), 8, "parallel.tp=8 is more than model.n_head=4: a rank would hold no head"),
        (config(3, n_head=4), 3, "4 x model.n_embd=256 is not a multiple of parallel.tp=3"),
        (
            config(3, n_head=6, n_embd=66, sequence_parallel=True),
            3,
            "splits n_ctx=128 (model.n_ctx, or data.stages from step 0 on), which parallel.tp=3 does not",
        ),
        (config(1), 3, "dp=3 does not divide data.lanes=8"),
    ],
)
def test_an_impossible_layout_is_refused(cfg: PretrainConfig, world_size: int, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_layout(cfg, world_size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig("m", 0, 4, 64, 64, 100), "model.n_layer=0: give at least 1"),
        (lambda: ModelConfig("m", 2, 4, 66, 64, 100), "model.n_embd=66 is not a multiple of model.n_head=4"),
        (lambda: ModelConfig("m", 2, 4, 64, 64, 100, dropout=1.0), "model.dropout=1.0: give 0 <= dropout < 1"),
        (lambda: ModelConfig("m", 2, 4, 64, 64, 100, init_std=-1.0), "model.init_std=-1.0: give a positive number"),
        (lambda: ModelConfig("m", 2, 4, 64, 64, 100, attention=""), "model.attention=: empty, give letters of DBSF"),
        (lambda: ModelConfig("m", 2, 4, 64, 64, 100, attention="dX"), "model.attention=dX: no letter Xd, give letters"),
        (
            lambda: ModelConfig("m", 2, 4, 64, 64, 100, attention="DBD", band=4),
            "model.attention=DBD has 3 letters for model.n_layer=2: give at most one for each layer",
        ),
        (
            lambda: ModelConfig("m", 2, 4, 64, 64, 100, attention="DB"),
            "model.attention=DB needs model.band: give a num",
        ),
        (lambda: ModelConfig("m", 2, 4, 64, 64, 100, attention="S"), "model.attention=S needs model.stride"),
        (lambda: ModelConfig("m", 2, 4, 64, 64, 100, attention="F", stride=4), "=F needs model.summary"),
        (lambda: ModelConfig("m", 2, 4, 64, 64, 100, band=4), "model.band=4 is for attention B, of which model.attent"),
        (
            lambda: ModelConfig("m", 2, 4, 64, 64, 100, attention="DB", band=4, stride=4),
            "model.stride=4 is for attention S and F, of which model.attention=DB has none: set it to null",
        ),
        (
            lambda: ModelConfig("m", 2, 4, 64, 64, 100, attention="S", stride=4, summary=1),
            "model.summary=1 is for attention F, of which model.attention=S has none",
        ),
        (lambda: ModelConfig("m", 2, 4, 64, 64, 100, attention="B", band=0), "model.band=0: give at least 1"),
        (
            lambda: ModelConfig("m", 2, 4, 64, 64, 100, attention="F", stride=4, summary=5),
            "model.summary=5 is more than model.stride=4: a block has no more tokens",
        ),
        (
            lambda: OptimConfig("o", 1e-3, ScheduleConfig(ScheduleKind.constant), kind=Kind.muon),
            "optim.kind=muon: optim.muon_lr=None must be positive and 0 <= optim.momentum=None < 1 hold",
        ),
        (
            lambda: OptimConfig("o", 1e-3, ScheduleConfig(ScheduleKind.constant), momentum=0.9),
            "optim.kind=adamw with optim.muon_lr=None and optim.momentum=0.9: they are Muon's",
        ),
        (lambda: ScheduleConfig(ScheduleKind.wsd), "cooldown=0 with kind=wsd: a cooldown goes with wsd"),
        (
            lambda: ScheduleConfig(ScheduleKind.cosine, cooldown=5),
            "cooldown=5 with kind=cosine: a cooldown goes with wsd",
        ),
        (lambda: ScheduleConfig(ScheduleKind.linear, floor=2.0), "floor=2.0 is a share of optim.lr"),
        (
            lambda: ScheduleConfig(ScheduleKind.linear, warmup=-1),
            "warmup=-1, cooldown=0, end=None: none may be negative",
        ),
        (lambda: OptimConfig("o", 0.0, ScheduleConfig(ScheduleKind.linear)), "lr=0.0 must be positive"),
        (lambda: OptimConfig("o", 1.0, ScheduleConfig(ScheduleKind.linear), beta2=1.0), "beta2=1.0 < 1"),
        (lambda: OptimConfig("o", NAN, ScheduleConfig(ScheduleKind.linear)), "lr=nan must be positive"),
        (lambda: OptimConfig("o", 1.0, ScheduleConfig(ScheduleKind.linear), weight_decay=NAN), "weight_decay=nan and"),
        (
            lambda: OptimConfig("o", 1.0, ScheduleConfig(ScheduleKind.linear), grad_clip=NAN),
            "grad_clip=nan not negative",
        ),
        (lambda: OptimConfig("o", 1.0, ScheduleConfig(ScheduleKind.linear), eps=NAN), "eps=nan > 0 must hold"),
        (lambda: EvalConfig(every=-5), "eval.every=-5: give a number of steps"),
        (lambda: EvalConfig(every=5, train_windows=-1), "eval.train_windows=-1: give a number of windows, or 0 for"),
        (lambda: EvalConfig(every=5, patience=-1), "eval.patience=-1: give a number of validations, or 0 to"),
        (lambda: EvalConfig(every=0, patience=2), "eval.patience=2 with eval.every=0, which validates only at the end"),
        (lambda: EvalConfig(every=5, windows=0), "eval.windows=0: give at least 1, or null for all"),
        (lambda: EvalConfig(0, tasks=["a"], tasks_every=-1), "eval.tasks_every=-1: give a number of steps, or 0 for"),
        (lambda: EvalConfig(0, tasks=["a"], tasks_limit=0), "eval.tasks_limit=0: give at least 1, or null for all"),
        (lambda: EvalConfig(0, tasks=["a", "b", "a"]), "eval.tasks=['a', 'b', 'a']: a is there twice: give it once"),
        (lambda: EvalConfig(0, tasks_every=5), "eval.tasks_every=5 with eval.tasks=[] scores nothing: give tasks"),
        (lambda: EvalConfig(0, task_data="a"), "eval.task_data=a with eval.tasks=[] scores nothing: give tasks, such"),
        (lambda: CheckpointConfig(every_steps=1, every_minutes=NAN), "every_minutes=nan must be 0 or more and finite"),
        (lambda: ParallelConfig("p", tp=0), "parallel.tp=0: give at least 1"),
        (lambda: ParallelConfig("p", zero_stage=0), "parallel.zero_stage=0: give 1, 2 or 3"),
        (lambda: ParallelConfig("p", sequence_parallel=True), "there is nothing to split"),
        (lambda: CheckpointConfig(every_steps=1, keep=0), "keep=0 at least 1"),
        (lambda: GenerateConfig("c", prompt="a", prompt_ids=[[1]]), "given: prompt, prompt_ids"),
        (lambda: GenerateConfig("c", prompt="a", top_p=0.0), "top_p=0.0: give 0 < top_p <= 1, or null"),
        (lambda: GenerateConfig("c", prompt="a", top_k=0), "top_k=0: give at least 1, or null"),
        (lambda: GenerateConfig("c", prompt="a", temperature=-1.0), "temperature=-1.0: give 0 (greedy) or more"),
        (lambda: GenerateConfig("c", prompt="a", temperature=NAN), "temperature=nan: give 0 (greedy) or more"),
        (lambda: GenerateConfig("c", prompt="a", max_new_tokens=0), "max_new_tokens=0: give at least 1"),
        (lambda: BpeTrainConfig(output="o", vocab_size=256), "vocab_size=256: a byte-level vocabulary has 256 bytes"),
        (
            lambda: ShardsConfig(block_tokens=9, shard_tokens=8),
            "block_tokens=9 and shard_tokens=8: give 0 < block_tokens",
        ),
        (lambda: ShardsConfig(workers=-1), "workers=-1: give the number of processes"),
        (lambda: DataConfig("d", "p", {"a": SourceConfig(".")}, lanes=0), "data.lanes=0: give at least 1"),
        (lambda: DedupConfig(memory_gib=0.0), "dedup.memory_gib=0.0: give a number above 0"),
        (lambda: LanguageConfig(min_score=1.1), "language.min_score=1.1: give 0 to 1"),
        (lambda: BadWordsConfig("f", keep=NAN), "bad_words.keep=nan: give 0 to 1"),
        (lambda: LengthConfig(min_chars=9, max_chars=8), "length.min_chars=9, max_chars=8 and min_tokens=0: give 0 or"),
        (lambda: LengthConfig(min_tokens=-1), "min_tokens=-1: give 0 or more"),
        (lambda: SuperviseConfig(grace_s=float("nan")), "grace_s=nan: give 0 <= backoff_s"),
    ],
)
def test_a_value_out_of_range_is_refused_where_it_is_declared(make: object, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("root", "source", "there"),
    [
        ("data", "web", "data/web/val"),
        ("data?", "web", "data?/web/val"),
        ("data", ".", "data/val"),
        ("s3://bucket/a/", ".", "s3://bucket/a/val"),
        ("https://h/a?sig=1", "web", "https://h/a/web/val?sig=1"),
        ("data", "https://h?sig=a/b", "https://h/val?sig=a/b"),
        ("pipe:curl http://h/{}?sig=1", "web", "pipe:curl http://h/web/val/{}?sig=1"),
    ],
)
def test_a_split_lies_below_its_source_whatever_that_is(root: str, source: str, there: str) -> None:
    data = DataConfig(name="x", path=root, sources={"web": SourceConfig(path=source)}, lanes=1)
    assert data.location("web", "val") == there


@pytest.mark.parametrize("limit", [0.0, -1.0, float("inf"), float("nan")])
def test_a_cache_without_a_limit_is_refused(limit: float) -> None:
    with pytest.raises(UserError, match=rf"data.cache.limit_gib={limit}: give a number above 0"):
        CacheConfig("x", limit)
