"""THE loop: batch, loss, step, log, evaluate, save, stop. `Trainer.train` reads top to bottom.

    shards -> plan -> stream -> loader.next() -> engine.backward -> engine.step -> tracker -> [evaluate] -> [save]

Steps are counted by what is done: the row, the validation and the checkpoint of step N come after N updates.
"""

from __future__ import annotations

import contextlib
import math
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from conf.errors import UserError
from data_pipeline.config import IGNORE
from data_pipeline.manifest import TOKENIZER
from data_pipeline.order.geometry import Geometry
from data_pipeline.order.plan import Plan
from data_pipeline.stream.loader import Batch
from trainer.checkpoint import load as checkpoint
from trainer.checkpoint.save import Saver
from trainer.checkpoint.write import Writer
from trainer.config.parallel import Precision
from trainer.config.pretrain import PretrainConfig
from trainer.data.feed import Feed
from trainer.data.sources import Sources, data_state, fetch_s, plan_run
from trainer.data.validate import validate
from trainer.distributed.collective import all_ranks
from trainer.distributed.device_copies import AsyncCopy, ComputeTimer, to_device
from trainer.distributed.mesh import join_ranks, leave_ranks, wait_for_main
from trainer.distributed.seeds import seed_dropout
from trainer.distributed.world import World
from trainer.engine.engine import NonFiniteError
from trainer.engine.schedule import lr_of
from trainer.health.recompute_check import recheck
from trainer.health.rollback import check_skips, maybe_roll_back
from trainer.health.spike_guard import Guard
from trainer.health.watchdog import Watch
from trainer.metrics import Speed, peak_flops, peak_memory_gib, progress_line
from trainer.model.arithmetic import flops_per_token
from trainer.run import signals
from trainer.run.folder import RunFolder
from trainer.run.progress import SAVE, VALIDATE, Progress
from trainer.run.signals import Stopped, agreed
from trainer.setup import build_engine, claim_run, init_checkpoint, run_summary
from trainer.tracking.shipper import REGISTER_S
from trainer.tracking.tracker import Status, Tracker


class Trainer:
    """One start of a run: built from the config and the run's last checkpoint, then trained to the end."""

    def __init__(
        self, cfg: PretrainConfig, config_text: str, world: World, geometry: Geometry, sources: Sources
    ) -> None:
        self.signals, self.progress = signals.OF_THIS_PROCESS, Progress()
        self.cfg, self.config_text, self.geometry, self.sources = cfg, config_text, geometry, sources
        self.mesh = join_ranks(world, cfg.parallel, cfg.watch.collective_s)
        self.run = RunFolder(cfg.run.dir)
        self.tracker: Tracker | None = None  # on rank 0
        self.generation, found = claim_run(self.run, self.mesh, config_text)
        at, patience = (self.run, self.generation, world, self.progress), fetch_s(cfg.data, sources)
        self.watch = Watch(cfg.watch, *at, self._flush, patience)
        state = checkpoint.read_state(found) if found else {}
        self.guard = Guard(cfg.guard, state.get("guard"))
        dtype = torch.float32 if cfg.precision is Precision.fp32 else torch.bfloat16
        self.speed = Speed(flops_per_token(cfg.model), peak_flops(self.mesh.device, dtype) * world.world_size)
        self.own = ComputeTimer(self.mesh.device)
        with contextlib.ExitStack() as undo:  # what is begun is closed, where the rest fails
            undo.push(self)
            self.stand(found, state, plan_run(cfg, sources, state))
            undo.pop_all()

    def stand(self, found: Path | None, state: dict[str, Any], plan: Plan) -> None:
        """Begin at a checkpoint of this state; None and {}: at the beginning. For starts and rollbacks. Collective."""
        cfg, sources, self.watch.generation = self.cfg, self.sources, self.generation
        self.step: int = state.get("step", 0)
        self.val_loss: float | None = None  # of this step, where it was validated
        self.best_val_loss: float | None = state.get("best_val_loss")
        begin = init_checkpoint(cfg, found)
        self.engine = build_engine(cfg, self.mesh, found, begin)
        self.feed = Feed(cfg, self.mesh, sources, plan, self.step)
        all_ranks(f"{self.run.root} takes no metrics", self._open_tracker)
        where = (cfg, self.mesh, self.run, self.generation, self.config_text)
        writer = Writer(*where, sources.any.root / TOKENIZER, sources.any.eot_id, self._flush, self._published)
        self.saver = Saver(self.engine, writer, self.progress.moved)
        self.progress.linger = self.saver.linger
        self.saved_at = time.monotonic()
        if self.mesh.world.is_main:
            print(run_summary(cfg, self.geometry, self.mesh, sources, self.plan, found, begin), flush=True)

    @property
    def plan(self) -> Plan:
        return self.feed.plan

    def train(self) -> None:
        """To max_steps. Raises UserError where data, numbers or the disk stop it, Stopped where a signal did.

        The last checkpoint stands; of a run that is stopped it is the one of its last step.
        """
        cfg = self.cfg
        self.speed.start()
        self.progress.begin(self.step)
        self.signals.train(self.progress, cfg.watch.stop_s)
        while self.step < cfg.max_steps:
            self.guard.enter(self.plan.ledger, self.step)
            here = self.plan.ledger.segment(self.step)
            self.progress.next_takes(here.tokens_per_step, here.n_ctx)
            loss, grad_norm, lr, (save_now, *stop) = self._update()
            skipped = self.guard.record(self.step, self.plan.ledger.position(self.step), loss, grad_norm)
            self.step += 1
            self.progress.step_done(self.step)
            self.speed.step(here.tokens_per_step)
            last = self.step == cfg.max_steps
            self.val_loss = None
            if last or skipped or due(self.step, cfg.log_every):
                self._log(loss, grad_norm, lr, skipped)
            if skipped and maybe_roll_back(self):
                continue
            if last or due(self.step, cfg.eval.every):
                with self.progress.phase(VALIDATE):
                    self._evaluate()
            if last or any((save_now, *stop)) or due(self.step, cfg.checkpoint.every_steps) or self._is_best():
                with self.progress.phase(SAVE):
                    self._save(last)
            if not last and (signal := agreed(stop)):
                with self.progress.phase(SAVE):
                    self.signals.over()
                    self.saver.wait()
                raise Stopped(signal, self.step, self.run.latest())

    def _update(self) -> tuple[float, float, float, list[float]]:
        """One optimizer step.

        Returns the loss (nats per token, over all ranks), the global gradient norm, the learning rate, and the wishes
        of all ranks: 0 or more.

        Raises:
            UserError: on every rank, with no weight changed: data that one cannot read.
        """
        while True:
            started = time.monotonic()
            batches, unread = self.feed.next()
            self.speed.wait(waited := time.monotonic() - started)
            valid, *wishes, skipped = self.agree_on_step(batches, unread)
            recheck(self.engine, self.cfg.guard.recheck_every, self.cfg.seed, self.step, batches[0])
            self.own.start()
            loss = torch.zeros((), device=self.mesh.device)
            for micro_step, batch in enumerate(batches):
                seed_dropout(self.mesh, self.cfg.seed, self.step, micro_step)
                loss += self.engine.backward(batch, valid[None], last=micro_step + 1 == len(batches))[0]
            self.progress.own(self.own.stop(waited))
            facts = torch.stack([loss / valid, valid, skipped, *wishes])
            dist.all_reduce(facts, group=self.mesh.dp_group)
            told = AsyncCopy(facts)
            lr = lr_of(self.cfg.optim, self.plan.ledger, step=self.step, max_steps=self.cfg.max_steps)
            try:  # waits for the device, once; `told` has come by then
                grad_norm = self.engine.step(lr, partial(self.guard.accepts, told.numbers))
            except NonFiniteError as e:
                grad_norm = e.norm
            mean_loss, counted, all_skipped, *wished = told.numbers()
            self.guard.check(all_skipped, self.mesh.world.world_size * self.mesh.dp)
            if math.isnan(counted):
                self.saver.check()
                for lost in self.feed.retire(self.step, unread):
                    if self.tracker is not None:
                        print(f"step {self.step}  goes on without a shard: {lost}", flush=True)
                if self.tracker is not None:
                    self.tracker.show(self.plan, self.step)
            else:
                if unread is not None:
                    raise RuntimeError("a step without data was made") from unread
                return mean_loss, grad_norm, lr, wished

    def agree_on_step(self, batches: list[Batch], unread: UserError | None) -> torch.Tensor:
        """[valid tokens, rank 0's wish to save by the clock, *wishes to stop, steps skipped], sums over all ranks.

        Not waited for.

        A rank that could not read, or whose checkpoint in flight could not be written, makes the count NaN: it takes
        part in the step, so that no one waits for it, and the gradient is NaN everywhere, which the engine refuses
        with the one look at the device that it takes anyway.
        """
        minutes = self.cfg.checkpoint.every_minutes
        wish = self.mesh.world.is_main and 0 < minutes * 60 <= time.monotonic() - self.saved_at
        valid = sum(int((batch.labels != IGNORE).sum()) for batch in batches) if self.mesh.tp_rank == 0 else 0
        count = float("nan") if unread or self.saver.failed else valid
        facts = to_device([count, float(wish), *self.signals.wishes(), self.guard.skipped], self.mesh.device)
        dist.all_reduce(facts)
        return facts

    def _log(self, loss: float, grad_norm: float, lr: float, skipped: str | None) -> None:
        if self.tracker is None:
            return
        row: dict[str, float] = {
            "train/loss": loss,
            "optim/lr": lr,
            "optim/grad_norm": grad_norm,
            "speed/tokens_per_s": self.speed.tokens_per_s,
            "speed/mfu": self.speed.mfu,
            "speed/loader_wait": self.speed.wait_share,
            "memory/peak_gib": peak_memory_gib(self.mesh.device),
            **self.feed.row(self.step),
            **self.watch.stragglers.row,
        }
        if skipped:
            row["guard/skipped"] = 1
        self.tracker.log(self.step, row)
        ledger = self.plan.ledger
        eta = self.speed.eta_s(ledger.tokens(self.cfg.max_steps) - ledger.tokens(self.step))
        print(progress_line(self.step, self.cfg.max_steps, row, eta), flush=True)

    def _evaluate(self) -> None:
        self.val_loss, losses = validate(
            self.engine, self.feed, self.sources.val, self.plan.ledger.segment(self.step - 1), self.progress.moved
        )
        if self.tracker is not None:
            each = {f"val/loss/{name}": loss for name, loss in losses.items()} if len(losses) > 1 else {}
            self.tracker.log(self.step, {"val/loss": self.val_loss, **each})
            parts = "".join(f"  {name} {loss:.4f}" for name, loss in losses.items()) if each else ""
            print(f"step {self.step}/{self.cfg.max_steps}  val loss {self.val_loss:.4f}{parts}", flush=True)
        self.speed.start()  # validation is no training time

    def _is_best(self) -> bool:
        """Where the best checkpoint is kept, a validation better than all before is worth one."""
        if not self.cfg.checkpoint.keep_best or self.val_loss is None:
            return False
        return self.best_val_loss is None or self.val_loss < self.best_val_loss

    def _save(self, last: bool) -> None:
        started = time.monotonic()
        check_skips(self)  # no checkpoint of weights that some ranks have updated and others not
        if self._is_best():
            self.best_val_loss = self.val_loss
        state = {
            "tokens": self.plan.ledger.tokens(self.step),
            "val_loss": self.val_loss,
            "best_val_loss": self.best_val_loss,
            "data": data_state(self.cfg, self.sources, self.plan, self.step),
            "guard": self.guard.to_json(),
        }
        self.saver.save(self.step, state, last=last, back_to=None if last else self.guard.first_bad(self.step))
        self.saved_at = time.monotonic()
        if self.tracker is not None:
            self.tracker.log(self.step, {"checkpoint/stall_s": self.saved_at - started})
        self.speed.start()

    def _flush(self) -> None:
        """A resumed run finds the journal at least as far as its checkpoint. In the saver's thread."""
        if self.tracker is not None:
            self.tracker.flush()

    def _published(self, path: Path, step: int, seconds: float) -> None:
        """In the saver's thread, on rank 0."""
        print(f"step {step}/{self.cfg.max_steps}  saved {path}", flush=True)
        if self.tracker is not None:
            with contextlib.suppress(UserError):  # the training thread meets it at its next row
                self.tracker.log(step, {"checkpoint/write_s": seconds})

    def _open_tracker(self) -> None:
        if self.tracker is not None:
            self.tracker.begin(self.generation, self.step)
        elif self.mesh.world.is_main:
            self.tracker = Tracker(self.cfg, self.run, self.generation, resumed_at=self.step)
        if self.tracker is not None:
            self.tracker.show(self.plan, self.step)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.signals.over()
        self.progress.end()  # what closes and writes on is no hang
        with contextlib.ExitStack() as rest:  # from the last to the first, and each whatever becomes of the others
            rest.callback(self.watch.close)
            if self.tracker is not None:
                rest.callback(self.tracker.close, Status.of(error))
            for made in (vars(self).get("feed"), vars(self).get("saver")):  # not both, where `stand` has failed
                if made is not None:
                    rest.callback(made.close)
        if kind in (None, Stopped):  # after an error the other ranks may be gone: no collective any more
            # rank 0 may wait for MLflow, and a launcher ends whoever is left some time after the first has ended
            wait_for_main(self.mesh, f"closed {self.generation}", self.cfg.watch.start_s + REGISTER_S)
            if kind is Stopped:
                dist.barrier()  # a launcher ends the other ranks as soon as one ends with a code
            leave_ranks(self.mesh)


def due(step: int, every: int) -> bool:
    """True each `every` steps; never for 0."""
    return every > 0 and step % every == 0
