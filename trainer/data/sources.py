"""The sources of a run: opened, checked against the model, the run's past and the node's disk, and planned.

Without torch: all of it is refused before torch is imported.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from conf.errors import UserError
from data_pipeline.config import DataConfig, RampConfig
from data_pipeline.manifest import TOKENIZER, Manifest
from data_pipeline.order.ledger import Ledger
from data_pipeline.order.plan import Plan
from data_pipeline.order.stages import plan_ledger
from data_pipeline.remote.cache import Cache
from data_pipeline.remote.mirror import NoSource
from data_pipeline.remote.source import open_cache, open_source
from trainer.config.model import ModelConfig
from trainer.config.pretrain import EvalConfig
from trainer.distributed.world import World


class Sources(NamedTuple):
    """Manifests by the source's name in `data.sources`; some or all may have no validation data."""

    train: dict[str, Manifest]
    val: dict[str, Manifest]
    cache: Cache | None  # of what is not a local folder
    past: Mapping[str, Any] = MappingProxyType({})  # the sources that the run was fed, by its checkpoint

    @property
    def any(self) -> Manifest:
        """One of them, for what all share: tokenizer, vocabulary."""
        return next(iter(self.train.values()))


def open_sources(cfg: DataConfig) -> Sources:
    """Raises UserError if a source is missing, damaged or out of reach."""
    cache = open_cache(cfg)
    sources = Sources({}, {}, cache)
    for name in cfg.sources:
        try:
            sources.train[name] = open_source(cfg.location(name, "train"), cache)
        except NoSource as e:
            raise UserError(f"data.sources.{name}: {e}") from None
        try:
            sources.val[name] = open_source(cfg.location(name, "val"), cache)
        except NoSource:
            continue
    if not sources.train:
        raise UserError("data.sources is empty")
    return sources


def check_sources(sources: Sources, model: ModelConfig, validation: EvalConfig) -> None:
    """Raises UserError if the shards do not fit the model or one another, or none can validate."""
    if validation.every and not sources.val:
        raise UserError(
            f"eval.every={validation.every}, but no source has validation data: write one with val_fraction above 0, "
            "or give eval.every=0, which then trains without validation"
        )
    if validation.train_windows and not sources.val:
        raise UserError(
            f"eval.train_windows={validation.train_windows} is a loss beside the validation's, but no source has "
            "validation data: write one with val_fraction above 0, or give eval.train_windows=0"
        )
    if validation.samples.prompts and not sources.val:
        raise UserError(
            "eval.samples.prompts are continued at validations, but no source has validation data: write one with "
            "val_fraction above 0, or give eval.samples.prompts=[]"
        )
    one = sources.any
    for manifest in (*sources.train.values(), *sources.val.values()):
        tokenizer = manifest.root / TOKENIZER
        if manifest.tokenizer_sha256 != one.tokenizer_sha256:
            raise UserError(f"{one.root} and {manifest.root} were written with different tokenizers: write both again")
        if not tokenizer.is_file() or hashlib.sha256(tokenizer.read_bytes()).hexdigest() != manifest.tokenizer_sha256:
            raise UserError(f"{tokenizer} is not the tokenizer that the shards were written with: put it back")
        if manifest.vocab_size != model.vocab_size:
            raise UserError(
                f"{manifest.root} was written with a vocabulary of {manifest.vocab_size}, model={model.name} has "
                f"model.vocab_size={model.vocab_size}: give model.vocab_size={manifest.vocab_size}, "
                "or shards of another tokenizer"
            )
        windows = sum(shard.windows(model.n_ctx) for shard in manifest.shards)
        if not windows:
            raise UserError(
                f"{manifest.root} holds {manifest.tokens} tokens in {len(manifest.shards)} shards, none with a window "
                f"of model.n_ctx={model.n_ctx} + 1 tokens: give a smaller model.n_ctx, more text, or no val "
                "(eval.every=0)"
            )
        is_val = manifest in sources.val.values()
        if is_val and validation.windows is not None and validation.windows > windows:
            raise UserError(
                f"eval.windows={validation.windows}, but {manifest.root} holds {windows} windows: "
                f"give 1 to {windows}, or null for all (a source may do without val)"
            )
        if not is_val and validation.train_windows > windows:
            raise UserError(
                f"eval.train_windows={validation.train_windows}, but {manifest.root} holds {windows} windows: "
                f"give 0 to {windows}"
            )


def check_cache(data: DataConfig, sources: Sources, world: World, tp: int) -> None:
    """Raises UserError if the cache of a node cannot hold the shards that its ranks use at once.

    A lane is in one shard of each source while another is read ahead for it. Lanes may share a shard, so what counts is
    as many of the source's largest shards, or all of them where there are fewer.
    """
    remote = {name: m for name, m in sources.train.items() if m.origin is not None}
    if sources.cache is None or not remote:
        return
    ranks = world.local_world_size or world.world_size
    readers = max(1, ranks // tp)  # the first rank of each tensor-parallel group reads
    lanes = readers * data.lanes // (world.world_size // tp)
    held = {name: sorted((s.bytes for s in m.shards), reverse=True)[: 2 * lanes] for name, m in remote.items()}
    need = sum(map(sum, held.values()))
    if need <= sources.cache.limit:
        return
    each = " + ".join(f"{sum(sizes):,} of {len(sizes)} shards of {name}" for name, sizes in held.items())
    alone = "" if world.local_world_size else ", all of them, for LOCAL_WORLD_SIZE is not set"
    tenths = -(-need * 10 // 2**30)
    raise UserError(
        f"data.cache.limit_gib={data.cache.limit_gib:g} ({sources.cache.limit:,} bytes) cannot hold what the "
        f"{ranks} ranks of a node{alone}, {readers} of which read {lanes} of data.lanes={data.lanes}, use at once, "
        f"one shard of each source for a lane and the next: {each} = {need:,} bytes: give data.cache.limit_gib="
        f"{tenths / 10:g}, fewer data.lanes (a new run), smaller shards (shard_tokens) or more nodes"
    )


def fetch_s(cfg: DataConfig, sources: Sources) -> float:
    """Seconds that a step may wait for a remote source before that is an error; 0 if all are local folders."""
    remote = any(m.origin is not None for m in (*sources.train.values(), *sources.val.values()))
    return cfg.fetch.timeout_s * (cfg.fetch.retries + 2) if remote else 0.0


def plan_run(
    data: DataConfig,
    sources: Sources,
    state: Mapping[str, Any],
    *,
    n_ctx: int,
    tokens_per_step: int,
    ramp: RampConfig,
    seed: int,
    max_steps: int,
) -> Plan:
    """The plan of the whole run: the steps done by its checkpoint's state, then those that the config asks for.

    Raises:
        UserError: stages or a ramp that cannot be, or as `plan_of`.
    """
    past = Ledger.from_json(state["data"]["ledger"]) if state else None
    ledger = plan_ledger(
        data, n_ctx=n_ctx, tokens_per_step=tokens_per_step, ramp=ramp, past=past, step=state.get("step", 0)
    )
    return plan_of(data, sources, ledger, seed=seed, max_steps=max_steps)


def plan_of(data: DataConfig, sources: Sources, ledger: Ledger, *, seed: int, max_steps: int) -> Plan:
    """Raises UserError if `max_epochs` would be passed: at the start, or when a lost shard leaves too little."""
    tokens = {name: [shard.tokens for shard in m.shards] for name, m in sources.train.items()}
    plan = Plan(tokens, ledger, lanes=data.lanes, seed=seed)
    for name, source in data.sources.items():
        limit = source.max_epochs
        if limit is not None and plan.passes(name, ledger.position(max_steps)) > limit:
            step = bisect_left(range(max_steps), True, key=lambda s: plan.passes(name, ledger.position(s + 1)) > limit)
            raise UserError(
                f"data.sources.{name}.max_epochs={limit}: its {sources.train[name].tokens:,} tokens are used up in "
                f"step {step} of max_steps={max_steps} ({plan.epoch(name, ledger.position(max_steps)):.2f} epochs "
                f"by then): give max_steps={step}, a smaller weight, more text, or more max_epochs"
            )
    return plan


def data_state(data: DataConfig, sources: Sources, plan: Plan, step: int) -> dict[str, Any]:
    """The data state that a checkpoint keeps: all that `Plan` needs, the paths of the sources, and `fim_rate`."""
    named = {
        name: {"sha256": m.sha256, "path": str(m.origin or m.root.absolute())} for name, m in sources.train.items()
    }
    return {
        "seed": plan.seed,
        "lanes": plan.lanes,
        "position": plan.ledger.position(step),
        "sources": {**sources.past, **named},  # those that the config no longer names too: their windows were served
        "ledger": plan.ledger.to_json(),
        **({"fim_rate": data.fim_rate} if data.fim_rate else {}),
    }


def check_rate(data: DataConfig, past: Mapping[str, Any], checkpoint: str, run_dir: str) -> None:
    """Raises UserError if `checkpoint`, whose data state is `past`, was trained on windows of another fim_rate."""
    if data.fim_rate != (then := past.get("fim_rate", 0.0)):
        raise UserError(
            f"data.fim_rate is {data.fim_rate}, {checkpoint} of {run_dir} was trained with {then}: the windows and "
            "perhaps the vocabulary depend on it; give the old value, or another run.name and init_from for the weights"
        )


def check_past(
    data: DataConfig, sources: Sources, past: Mapping[str, Any], *, seed: int, checkpoint: str, run_dir: str
) -> None:
    """Raises UserError if the order of the data, in which `checkpoint` was trained, can no longer be followed.

    `past`: the data state of that checkpoint.
    """
    pairs: dict[str, tuple[Any, Any]] = {
        "seed": (seed, past.get("seed")),
        "data.lanes": (data.lanes, past.get("lanes")),
    }
    for name, source in past.get("sources", {}).items():
        if name in sources.train and sources.train[name].sha256 != source["sha256"]:
            raise UserError(
                f"data.sources.{name}: the shards in {sources.train[name].root} are not those that {checkpoint} of "
                f"{run_dir} was trained with, which were in {source.get('path')}: their bytes differ, and the order of "
                "the data depends on them; give the old shards, or another run.name"
            )
    for knob, (now, then) in pairs.items():
        if now != then:
            raise UserError(
                f"{knob} is {now}, {checkpoint} of {run_dir} was trained with {then}: "
                "the order of the data depends on it; give the old value, or another run.name"
            )
