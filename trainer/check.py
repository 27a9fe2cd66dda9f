"""Refuses a run before torch is imported: on its ranks, and on a login node before it is sent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from conf.errors import UserError
from data_pipeline.examples.templates import Marked
from data_pipeline.manifest import TOKENIZER
from data_pipeline.order.plan import Plan
from data_pipeline.stream.infill import Infill
from data_pipeline.tokenizer.tokenizer import Tokenizer
from data_pipeline.tokenizer.vocabularies import EOT, INFILL
from trainer.checkpoint.find import check_model, check_resume, find_checkpoint, model_of, resumable
from trainer.config.model import ModelConfig
from trainer.config.pretrain import PretrainConfig
from trainer.config.tracking import resolved as resolved_tracking
from trainer.data.sources import Sources, check_cache, check_past, check_rate, check_sources, open_sources, plan_run
from trainer.distributed.world import World
from trainer.engine.schedule import lr_at
from trainer.evaluation.task_scores import TaskScores
from trainer.hf.settings import check_registry
from trainer.model.arithmetic import padded_vocab_size
from trainer.plan.choose import resumed, settle
from trainer.plan.layout_rules import check_layout
from trainer.run.folder import RunFolder
from trainer.run.redact import refuse_secrets
from trainer.samples import Samples


class Checked(NamedTuple):
    """A run that may start: its config with nothing left open, its sources, and the checkpoint it resumes from."""

    cfg: PretrainConfig
    sources: Sources
    state: dict[str, Any]  # of that checkpoint, {} for a new run
    chosen: str  # the plan's choice, in words; "" if nothing was open
    tracked: str = ""  # where the metrics go, in words; "" if into the run folder only
    samples: Samples | None = None  # of its validations
    scores: TaskScores | None = None  # of the model that trains
    marked: Marked | None = None  # the data's tokenizer with the tokens of data.fim_rate

    @property
    def tokenizer(self) -> bytes:
        """The run's tokenizer.json: the data's, which also knows the tokens of data.fim_rate."""
        return _raw(self.marked) if self.marked else (self.sources.any.root / TOKENIZER).read_bytes()

    @property
    def infill(self) -> Infill | None:
        """Rearranges windows, or None."""
        return Infill.of(self.cfg.data.fim_rate, self.cfg.seed, self.marked.special) if self.marked else None

    @property
    def new_tokens(self) -> str:
        """A line on the tokens that the data's vocabulary lacks, else ""."""
        known = self.sources.any.vocab_size
        new = [token for token, id_ in self.marked.special.items() if id_ >= known] if self.marked else []
        return f"model.vocab_size: {known:,} of the data and {len(new)} new ones: {', '.join(new)}" if new else ""

    @property
    def done(self) -> str:
        """A line where nothing is left to do, else ""."""
        step, max_steps = self.state.get("step", 0), self.cfg.max_steps
        if step < max_steps:
            return ""
        return f"{self.cfg.run.dir} is done, at step {step} of max_steps={max_steps}: give more max_steps to go on"

    def plan(self, state: Mapping[str, Any]) -> Plan:
        """The plan of the run that resumes from this state, {} for a new run. Raises UserError as `plan_run`."""
        cfg = self.cfg
        return plan_run(
            cfg.data,
            self.sources,
            state,
            n_ctx=cfg.model.n_ctx,
            tokens_per_step=cfg.tokens_per_step,
            ramp=cfg.batch_ramp,
            seed=cfg.seed,
            max_steps=cfg.max_steps,
        )


def check(cfg: PretrainConfig, world: World) -> Checked:
    """Raises UserError for a run that cannot be: its layout, its data, its tracker, its past or its length."""
    cfg, chosen = settle(cfg, world)
    check_layout(cfg, world.world_size)
    sources = open_sources(cfg.data)
    marked = marks_of_infill(cfg.data.fim_rate, cfg.model, sources) if cfg.data.fim_rate else None
    if marked and cfg.model.vocab_size in (sources.any.vocab_size, marked.vocab_size):
        check_sources(sources, replace(cfg.model, vocab_size=sources.any.vocab_size), cfg.eval)
        cfg = replace(cfg, model=replace(cfg.model, vocab_size=marked.vocab_size))
    else:
        check_sources(sources, cfg.model, cfg.eval)
    check_cache(cfg.data, sources, world, cfg.parallel.tp)
    tracking, tracked = resolved_tracking(cfg.tracking)
    cfg = replace(cfg, tracking=tracking)
    refuse_secrets(asdict(cfg))
    check_registry(cfg.tracking, cfg.model)
    checkpoint, state = resumable(RunFolder(cfg.run.dir), cfg.resume_step)
    if checkpoint:
        check_rate(cfg.data, state.get("data", {}), checkpoint.name, cfg.run.dir)
    check_resume(cfg, checkpoint, state)
    path, batch = sources.any.root / TOKENIZER, int(cfg.micro_batch_size)
    if checkpoint:
        name = checkpoint.name
        check_past(cfg.data, sources, state.get("data", {}), seed=cfg.seed, checkpoint=name, run_dir=cfg.run.dir)
    elif cfg.init_from is not None:
        check_init_from(cfg.init_from, cfg.model, path, marked)
    if chosen:
        chosen += resumed(state.get("layout", {}))
    sources = sources._replace(past=state.get("data", {}).get("sources", {}))
    checked = Checked(cfg, sources, state, chosen, tracked, marked=marked)
    if cfg.eval.samples.prompts or cfg.eval.tasks:
        tokenizer = Tokenizer(checked.tokenizer, str(path))
        samples = Samples(cfg.eval.samples, tokenizer, cfg.model) if cfg.eval.samples.prompts else None
        scores = TaskScores(cfg.eval, tokenizer, cfg.model, batch) if cfg.eval.tasks else None
        checked = checked._replace(samples=samples, scores=scores)
    tokens = checked.plan(state).ledger.tokens(cfg.max_steps)
    lr_at(cfg.optim.schedule, cfg.optim.lr, step=0, max_steps=cfg.max_steps, tokens=0, step_tokens=0, end_tokens=tokens)
    return checked


def marks_of_infill(rate: float, model: ModelConfig, sources: Sources) -> Marked:
    """The data's tokenizer with ids for the tokens of data.fim_rate: its own, or the next ones behind it.

    Raises:
        UserError: it has no end of a text, or the model has no rows for new ids.
    """
    data, path = sources.any, sources.any.root / TOKENIZER
    tokenizer = Tokenizer.load(path)
    if tokenizer.eot_id is None:
        raise UserError(
            f"data.fim_rate={rate}: {path} has no {EOT}, with which a middle ends: give shards of a tokenizer that has "
            "it, or data.fim_rate=0"
        )
    marked = Marked(tokenizer, (EOT, *INFILL))
    rows = padded_vocab_size(data.vocab_size, 1)
    if marked.vocab_size > max(rows, model.vocab_size):
        raise UserError(
            f"data.fim_rate={rate} needs ids for {', '.join(INFILL)}: {path} lacks some, its {data.vocab_size:,} ids "
            f"leave {rows - data.vocab_size} of the {rows:,} rows of the embedding free: give model.vocab_size="
            f"{marked.vocab_size}, which adds rows, shards of a tokenizer that has the tokens, or data.fim_rate=0"
        )
    return marked


def check_init_from(init_from: str, model: ModelConfig, tokenizer: Path, marked: Marked | None = None) -> None:
    """Check the checkpoint whose weights a new run starts from; its dropout and init_std may differ.

    It may know the tokens of `marked` or not.

    Raises:
        UserError: no checkpoint there, one of another shape, or one whose tokens are not those of `tokenizer`, the
            data's.
    """
    path = find_checkpoint(init_from, "init_from")
    theirs = model_of(path, RunFolder.state(path))
    if marked and theirs.vocab_size in (marked.tokenizer.vocab_size, marked.vocab_size):
        model = replace(model, vocab_size=theirs.vocab_size)
    check_model(path, theirs, model, "another init_from")
    own = path / TOKENIZER
    if own.is_file() and not (same_vocabulary(own, tokenizer) or (marked and _same(own.read_bytes(), _raw(marked)))):
        raise UserError(
            f"init_from={init_from}: {own} is another vocabulary than the data's {tokenizer}: its weights know other "
            f"tokens; write the shards with tokenizer={own}"
        )


def same_vocabulary(a: Path, b: Path) -> bool:
    """Return True if two tokenizer.json make the same ids of every text: equal bytes, or equal in all that decides."""
    return _same(a.read_bytes(), b.read_bytes())


def _same(raw_a: bytes, raw_b: bytes) -> bool:
    if raw_a == raw_b:
        return True
    try:
        return _parts(raw_a) == _parts(raw_b)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


def _raw(marked: Marked) -> bytes:
    return marked.tokenizer.with_special(marked.special).raw


def _parts(raw: bytes) -> dict[str, Any]:
    """The parts that decide on ids, in one form: files of several years and libraries write the same differently."""
    body = json.loads(raw)
    model, added = body["model"], body["added_tokens"]
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
    kind = {key: model.get(key) or None for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix")}
    return {
        "ids": ids,
        "merges": merges,
        "kind": {**kind, "type": model.get("type", "BPE"), "byte_fallback": bool(model.get("byte_fallback"))},
        "ignore_merges": bool(model.get("ignore_merges")),
        "special": sorted(token["content"] for token in added if token["special"]),
        "normalizer": body.get("normalizer"),
        "pre_tokenizer": _pre_tokenizer(body.get("pre_tokenizer")),
    }


def _pre_tokenizer(body: Any) -> Any:
    """ByteLevel's settings without its offsets, which are not ids, and with the regex that it has by default."""
    if not isinstance(body, dict) or body.get("type") != "ByteLevel":
        return body
    return {"use_regex": True, **{key: value for key, value in body.items() if key != "trim_offsets"}}
