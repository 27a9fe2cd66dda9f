"""What a run reads: its sources opened, held against the model, the run's past and the node's disk, and planned.

All of it before torch is imported.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from conf.errors import UserError
from data_pipeline.config import DataConfig
from data_pipeline.manifest import TOKENIZER, Manifest
from data_pipeline.order.ledger import Ledger
from data_pipeline.order.plan import Plan
from data_pipeline.order.stages import plan_ledger
from data_pipeline.remote.cache import Cache
from data_pipeline.remote.mirror import NoSource
from data_pipeline.remote.source import open_cache, open_source
from trainer.config.pretrain import PretrainConfig
from trainer.distributed.world import World


class Sources(NamedTuple):
    """Manifests by the source's name in `data.sources`; some may have no validation data, not all."""

    train: dict[str, Manifest]
    val: dict[str, Manifest]
    cache: Cache | None  # of what is not a local folder
    past: Mapping[str, Any] = MappingProxyType({})  # what the run's checkpoint says of the sources that it was fed

    @property
    def any(self) -> Manifest:
        """One of them, for what all share: tokenizer, vocabulary."""
        return next(iter(self.train.values()))


def open_sources(cfg: DataConfig) -> Sources:
    """Raises UserError where a source is missing, damaged or out of reach, or none has validation data."""
    cache = open_cache(cfg)
    found, none = Sources({}, {}, cache), None
    for name in cfg.sources:
        try:
            found.train[name] = open_source(cfg.location(name, "train"), cache)
        except NoSource as e:
            raise UserError(f"data.sources.{name}: {e}") from None
        try:
            found.val[name] = open_source(cfg.location(name, "val"), cache)
        except NoSource as e:
            none = e
    if not found.val:
        raise none or UserError("data.sources is empty")
    return found


def check_sources(cfg: PretrainConfig, sources: Sources) -> None:
    """Raises UserError where the shards do not fit the model or one another."""
    one = sources.any
    for manifest in (*sources.train.values(), *sources.val.values()):
        tokenizer = manifest.root / TOKENIZER
        if manifest.tokenizer_sha256 != one.tokenizer_sha256:
            raise UserError(f"{one.root} and {manifest.root} were written with different tokenizers: write both anew")
        if not tokenizer.is_file() or hashlib.sha256(tokenizer.read_bytes()).hexdigest() != manifest.tokenizer_sha256:
            raise UserError(f"{tokenizer} is not the tokenizer that the shards were written with: put it back")
        if manifest.vocab_size != cfg.model.vocab_size:
            raise UserError(
                f"{manifest.root} was written with a vocabulary of {manifest.vocab_size}, model={cfg.model.name} has "
                f"model.vocab_size={cfg.model.vocab_size}: give model.vocab_size={manifest.vocab_size}, "
                "or shards of another tokenizer"
            )
        have, n_ctx = sum(shard.windows(cfg.model.n_ctx) for shard in manifest.shards), cfg.model.n_ctx
        if not have:
            raise UserError(
                f"{manifest.root} holds {manifest.tokens} tokens in {len(manifest.shards)} shards, none with a window "
                f"of model.n_ctx={n_ctx} + 1 tokens: give a smaller model.n_ctx, more text, or no val"
            )
        if manifest in sources.val.values() and cfg.eval.windows is not None and not 0 < cfg.eval.windows <= have:
            raise UserError(
                f"eval.windows={cfg.eval.windows}, but {manifest.root} holds {have} windows: "
                f"give 1 to {have}, or null for all (a source may do without val)"
            )


def check_cache(cfg: PretrainConfig, sources: Sources, world: World) -> None:
    """Raises UserError where the cache of a node cannot hold the shards that its ranks use at once.

    A lane is in one shard of each source while another is read ahead for it. Lanes may share a shard, so what counts is
    as many of the source's largest shards, or all of them where there are fewer.
    """
    afar = {name: m for name, m in sources.train.items() if m.origin is not None}
    if sources.cache is None or not afar:
        return
    here = world.local_world_size or world.world_size
    readers = max(1, here // cfg.parallel.tp)  # the first rank of each tensor-parallel group reads
    lanes = readers * cfg.data.lanes // (world.world_size // cfg.parallel.tp)
    held = {name: sorted((s.bytes for s in m.shards), reverse=True)[: 2 * lanes] for name, m in afar.items()}
    need = sum(map(sum, held.values()))
    if need <= sources.cache.limit:
        return
    each = " + ".join(f"{sum(sizes):,} of {len(sizes)} shards of {name}" for name, sizes in held.items())
    alone = "" if world.local_world_size else ", all of them, for LOCAL_WORLD_SIZE is not set"
    tenths = -(-need * 10 // 2**30)
    raise UserError(
        f"data.cache.limit_gib={cfg.data.cache.limit_gib:g} ({sources.cache.limit:,} bytes) cannot hold what the "
        f"{here} ranks of a node{alone}, {readers} of which read {lanes} of data.lanes={cfg.data.lanes}, use at once, "
        f"one shard of each source for a lane and the next: {each} = {need:,} bytes: give data.cache.limit_gib="
        f"{tenths / 10:g}, fewer data.lanes (a new run), smaller shards (shard_tokens) or more nodes"
    )


def fetch_s(cfg: DataConfig, sources: Sources) -> float:
    """How long a step may wait for a remote source before that is an error; 0 where all are local folders."""
    afar = any(m.origin is not None for m in (*sources.train.values(), *sources.val.values()))
    return cfg.fetch.timeout_s * (cfg.fetch.retries + 2) if afar else 0.0


def plan_run(cfg: PretrainConfig, sources: Sources, state: Mapping[str, Any]) -> Plan:
    """The plan of the whole run: what its checkpoint's state says it has done, then what the config asks for.

    Raises:
        UserError: stages or a ramp that cannot be, or as `plan_of`.
    """
    past = Ledger.from_json(state["data"]["ledger"]) if state else None
    ledger = plan_ledger(
        cfg.data,
        n_ctx=cfg.model.n_ctx,
        tokens_per_step=cfg.tokens_per_step,
        ramp=cfg.batch_ramp,
        past=past,
        step=state.get("step", 0),
    )
    return plan_of(cfg, sources, ledger)


def plan_of(cfg: PretrainConfig, sources: Sources, ledger: Ledger) -> Plan:
    """Raises UserError where `max_epochs` would be passed: at the start, or when a lost shard leaves too little."""
    tokens = {name: [shard.tokens for shard in m.shards] for name, m in sources.train.items()}
    plan = Plan(tokens, ledger, lanes=cfg.data.lanes, seed=cfg.seed)
    for name, source in cfg.data.sources.items():
        most = source.max_epochs
        if most is not None and plan.passes(name, ledger.position(cfg.max_steps)) > most:
            step = bisect_left(
                range(cfg.max_steps), True, key=lambda s: plan.passes(name, ledger.position(s + 1)) > most
            )
            raise UserError(
                f"data.sources.{name}.max_epochs={most}: its {sources.train[name].tokens:,} tokens are used up in step "
                f"{step} of max_steps={cfg.max_steps} ({plan.epoch(name, ledger.position(cfg.max_steps)):.2f} epochs "
                f"by then): give max_steps={step}, a smaller weight, more text, or more max_epochs"
            )
    return plan


def data_state(cfg: PretrainConfig, sources: Sources, plan: Plan, step: int) -> dict[str, Any]:
    """What a checkpoint keeps of the data: all that `Plan` needs, and where the sources were."""
    found = {
        name: {"sha256": m.sha256, "path": str(m.origin or m.root.absolute())} for name, m in sources.train.items()
    }
    return {
        "seed": cfg.seed,
        "lanes": cfg.data.lanes,
        "position": plan.ledger.position(step),
        "sources": {**sources.past, **found},  # those that the config no longer names too: their windows were served
        "ledger": plan.ledger.to_json(),
    }


def check_past(cfg: PretrainConfig, sources: Sources, checkpoint: str, state: Mapping[str, Any]) -> None:
    """Raises UserError where the order of the data that `checkpoint` was trained on is no longer to be had."""
    data = state.get("data", {})
    pairs: dict[str, tuple[Any, Any]] = {
        "seed": (cfg.seed, data.get("seed")),
        "data.lanes": (cfg.data.lanes, data.get("lanes")),
    }
    for name, found in data.get("sources", {}).items():
        if name in sources.train:
            pairs[f"data.sources.{name}"] = (sources.train[name].sha256, found["sha256"])
    for knob, (now, then) in pairs.items():
        if now != then:
            raise UserError(
                f"{knob} is {now}, {checkpoint} of {cfg.run.dir} was trained with {then}: "
                "the order of the data hangs on it; give the old value, or another run.name"
            )
