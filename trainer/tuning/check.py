"""Refuses a tuning before torch is imported, reads its examples, and settles what follows from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from conf.errors import UserError
from data_pipeline.examples.collect import Examples
from data_pipeline.examples.rows import RowOrder
from data_pipeline.examples.templates import Marked, Renderer
from data_pipeline.manifest import TOKENIZER
from data_pipeline.tokenizer.tokenizer import Tokenizer
from trainer.checkpoint.find import check_model, check_resume, find_checkpoint, model_of, resumable
from trainer.config.model import ModelConfig
from trainer.config.tracking import resolved
from trainer.config.tuning.common import TuneConfig
from trainer.distributed.world import World
from trainer.hf.settings import check_registry
from trainer.plan.choose import is_open
from trainer.plan.layout_rules import check_ranks
from trainer.plan.workload import Workload
from trainer.run.folder import RunFolder
from trainer.run.redact import refuse_secrets

T = TypeVar("T")
R = TypeVar("R", bound=Marked)
C = TypeVar("C", bound=TuneConfig)


@dataclass(frozen=True)
class Reader(Generic[T, R]):
    """The reader of a kind of examples.

    read: the examples of the files at a path, by a tokenizer, of at most n_ctx tokens.
    ids: int32 that say all of an example, by which a run knows its examples again.
    length: tokens that one takes of a row that several share; None: each makes a row.
    side: the ids by which an example is held out or not, such as its prompt's; None: all of them.
    arrange: makes of the examples to train on those that are trained on; None: they are.
    """

    read: Callable[[str, Tokenizer, int], Examples[T, R]]
    ids: Callable[[T], np.ndarray]
    length: Callable[[T], int] | None = None
    side: Callable[[T], np.ndarray] | None = None
    arrange: Callable[[Sequence[T], R], Sequence[T]] | None = None


@dataclass(frozen=True)
class Checked(Generic[C, T, R]):
    """A tuning that may start.

    cfg: with its model's vocabulary and its number of steps settled.
    train, held_out: the examples, in the order of the files.
    order: of the rows of `train`.
    tokenizer: the run's, with the special tokens.
    about: what a run that goes on must have again.
    lines: to print first.
    """

    cfg: C
    train: Sequence[T]
    held_out: Sequence[T]
    order: RowOrder
    renderer: R
    tokenizer: Tokenizer
    about: dict[str, Any]
    lines: list[str]

    @property
    def workload(self) -> Workload:
        """That of a step of rows of n_ctx tokens, one for each that `batch_size` counts."""
        cfg = self.cfg
        tokens, background = cfg.batch_size * cfg.model.n_ctx, cfg.checkpoint.background
        return Workload(cfg.model, cfg.optim.kind, cfg.precision, tokens, document_mask=True, background=background)


def check(cfg: C, world: World, path: str, reader: Reader[T, R]) -> Checked[C, T, R]:
    """Check a tuning on the examples of `path`.

    Raises:
        UserError: its layout, its weights, its examples or its past do not allow it.
    """
    check_tuned_layout(cfg, world.world_size)
    tracking, tracked = resolved(cfg.tracking)
    cfg = replace(cfg, tracking=tracking)
    refuse_secrets(asdict(cfg))
    check_registry(cfg.tracking, cfg.model)
    checkpoint, state = resumable(RunFolder(cfg.run.dir), cfg.resume_step)
    origin = checkpoint or find_checkpoint(str(cfg.init_from), "init_from")
    tokenizer = tokenizer_of(origin)
    found = reader.read(path, tokenizer, cfg.model.n_ctx)
    model = settled_vocabulary(cfg.model, origin, found.renderer, resumed=checkpoint is not None)
    lines = found.summary()
    if cfg.held_out.path is None:
        train, held_out = split(found.items, cfg.held_out.fraction, reader)
    else:
        theirs = reader.read(cfg.held_out.path, tokenizer, cfg.model.n_ctx)
        train, held_out = found.items, theirs.items
        lines += [f"held out: {line}" for line in theirs.summary()]
    if reader.arrange:
        train = list(reader.arrange(train, found.renderer))
    lengths = [reader.length(item) if reader.length else 1 for item in train]
    n_ctx = cfg.model.n_ctx if reader.length else None
    order = RowOrder(lengths, rows_per_step=cfg.batch_size, seed=cfg.seed, n_ctx=n_ctx)
    steps = cfg.max_steps or order.start(cfg.epochs) // cfg.batch_size
    cfg = replace(cfg, model=model, max_steps=steps, epochs=0)
    check_resume(cfg, checkpoint, state)
    own = tokenizer.with_special(found.renderer.special)
    if model.vocab_size != (known := model_of(origin, RunFolder.state(origin)).vocab_size):
        new = ", ".join(token for token, id_ in found.renderer.special.items() if id_ >= known)
        lines.append(f"model.vocab_size: {known:,} of init_from and {model.vocab_size - known} new ones: {new}")
    about: dict[str, Any] = {"examples": digest(train, reader), "batch_size": cfg.batch_size, "seed": cfg.seed}
    if isinstance(found.renderer, Renderer):
        about["template"] = found.renderer.template.value
    check_same(about, state.get("data", {}))
    return Checked(cfg, train, held_out, order, found.renderer, own, about, [tracked, *lines])


def check_tuned_layout(cfg: TuneConfig, world_size: int) -> None:
    """Raises UserError for ranks, parallelism and rows that do not fit together."""
    if is_open(cfg.parallel, cfg.micro_batch_size):
        raise UserError(
            f"parallel={cfg.parallel.name} with micro_batch_size={cfg.micro_batch_size} leaves a choice to the plan, "
            "which reckons with pre-training alone: give parallel=zero1, zero2, zero3 or tp2, and a number"
        )
    check_ranks(cfg, world_size)
    layout, n_ctx = cfg.parallel, cfg.model.n_ctx
    if layout.sequence_parallel and n_ctx % layout.tp:
        raise UserError(
            f"parallel.sequence_parallel splits model.n_ctx={n_ctx}, which parallel.tp={layout.tp} does not divide: "
            "give parallel.sequence_parallel=false"
        )
    at_once = world_size // layout.tp * int(cfg.micro_batch_size)
    if cfg.batch_size % at_once:
        raise UserError(
            f"batch_size={cfg.batch_size} is not a multiple of micro_batch_size={cfg.micro_batch_size} times "
            f"{world_size // layout.tp} data-parallel ranks: give batch_size={-(-cfg.batch_size // at_once) * at_once}"
        )


def tokenizer_of(checkpoint: Path) -> Tokenizer:
    """The vocabulary of a checkpoint. Raises UserError if it has none."""
    path = checkpoint / TOKENIZER
    if not path.is_file():
        raise UserError(
            f"init_from: {checkpoint} has no {TOKENIZER}, by which examples become ids: put the model's there"
        )
    return Tokenizer.load(path)


def settled_vocabulary(model: ModelConfig, origin: Path, renderer: Marked, *, resumed: bool) -> ModelConfig:
    """`model` with room for the special tokens of a renderer.

    Raises:
        UserError: the weights of `origin`, the checkpoint that a run starts from or goes on from, are of another model.
    """
    theirs = model_of(origin, RunFolder.state(origin))
    whole = replace(model, vocab_size=max(theirs.vocab_size, renderer.vocab_size))
    if resumed and model.vocab_size <= whole.vocab_size:
        return whole
    if model.vocab_size not in (theirs.vocab_size, whole.vocab_size):
        check_model(origin, theirs, model, "another init_from")
    check_model(origin, replace(theirs, vocab_size=whole.vocab_size), whole, "another init_from")
    return whole


def split(items: Sequence[T], fraction: float, reader: Reader[T, R]) -> tuple[list[T], list[T]]:
    """The examples to train on, and the share of them that is held out.

    Raises:
        UserError: one of the two is empty.
    """
    sides: tuple[list[T], list[T]] = ([], [])
    ids = reader.side or reader.ids
    for item in items:
        sides[_share(ids(item)) < fraction].append(item)
    if not sides[0] or (fraction and not sides[1]):
        raise UserError(
            f"held_out.fraction={fraction} leaves {len(sides[0])} examples to train on and {len(sides[1])} to validate "
            "with: give another share, or more examples"
        )
    return sides


def _share(ids: np.ndarray) -> float:
    """A number in [0, 1) that equal ids have in common."""
    raw = hashlib.blake2b(np.ascontiguousarray(ids, np.int32).tobytes(), digest_size=7).digest()
    return int.from_bytes(raw) / (1 << 56)


def digest(items: Sequence[T], reader: Reader[T, R]) -> str:
    """A name of these examples in this order."""
    hashed = hashlib.sha256()
    for item in items:
        ids = np.ascontiguousarray(reader.ids(item), np.int32)
        hashed.update(len(ids).to_bytes(8) + ids.tobytes())
    return hashed.hexdigest()[:16]


def check_same(about: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Raises UserError if a checkpoint's data state is of other examples, another order or another template."""
    for key, value in about.items():
        if key in state and state[key] != value:
            raise UserError(
                f"the checkpoint's run has {key} {state[key]}, and this start {value}: give the old examples and "
                "settings, or another run.name"
            )
