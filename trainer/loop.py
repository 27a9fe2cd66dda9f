"""THE loop: batch, loss, step, log, evaluate, save, stop. `Trainer.train` reads top to bottom.

    feed.next() -> vote -> engine.backward -> engine.step -> tracker -> [evaluate] -> [save]

Steps are counted by what is done: the row, the validation and the checkpoint of step N come after N updates.
"""

from __future__ import annotations

import math
import time

from trainer.data.validate import validate
from trainer.health.rollback import roll_back
from trainer.metrics import progress_line
from trainer.run.progress import SAVE, VALIDATE
from trainer.run.signals import Stopped, agreed
from trainer.setup import Start
from trainer.step import Outcome
from trainer.summary import step_row, validation_line, validation_row
from trainer.task import Scores
from trainer.vote import Vote, add_votes


class Trainer(Start):
    """One start of a run, trained to the end."""

    val_loss: float | None = None  # of this step, if it was validated
    eval_due = False  # as soon as the feed allows
    save_due = False
    saved_at: float
    stop_by = math.inf  # the end of the grace after a stop signal inside an iteration

    def train(self) -> None:
        """Train to max_steps, or to an end before it (ends.py).

        Raises:
            UserError: data, numbers or the disk stop the run.
            Stopped: a signal did.

        The last checkpoint stays; that of a stopped run is of its last step, or of its last whole iteration.
        """
        cfg = self.cfg
        self.saved_at = time.monotonic()
        self.speed.start()
        self.progress.start(self.step)
        self.signals.train(self.progress, cfg.watch.stop_s)
        while self.step < cfg.max_steps and self.ends.why is None:
            with self.trace.step(self.step + 1):
                outcome, skipped = self._update()
            whole, vote = self.parts.feed.may_save(self.step), outcome.vote
            last = self.step == cfg.max_steps or (whole and self.ends.out_of_time(vote.hours > 0))
            if last or skipped or due(self.step, cfg.log_every):
                self._log(outcome, skipped)
            if skipped and self._maybe_roll_back():
                continue
            self.eval_due |= last or due(self.step, self.task.eval_every)
            self.save_due |= last or any((vote.save, *vote.stops)) or due(self.step, cfg.checkpoint.every_steps)
            if whole:
                if self.eval_due:
                    self._evaluate()
                last |= self.ends.why is not None
                if (scores := self.task.scores) is not None and (last or due(self.step, scores.every)):
                    self._score(scores, outcome.loss)
                if last:
                    self._finish()
                if last or self.save_due or self._is_best():
                    self._save(last)
            if not last:
                self._maybe_stop(vote)
        if self.step < cfg.max_steps:
            with self.progress.phase(SAVE):
                self.end_early()

    def _update(self) -> tuple[Outcome, bool]:
        """One optimizer step, repeated without the data that cannot be read; and whether the guard skipped it."""
        feed = self.parts.feed
        size = feed.size(self.step)
        self.guard.enter(size, feed.size(max(0, self.step - 1)))
        self.progress.next_takes(size.work, size.n_ctx)
        while True:
            outcome = self.parts.stepper.step(self.step, self._wishes)
            self.guard.check(outcome.vote.skipped, self.mesh.world.world_size)
            if not outcome.vote.failed:
                break
            self.parts.saver.check()
            for reason in feed.retire(outcome.error):
                if self.tracker is not None:
                    print(f"step {self.step}  goes on without a shard: {reason}", flush=True)
            self.show_plan(feed)
            size = feed.size(self.step)
        skipped = self.guard.record(self.step, feed.position(self.step), outcome.loss, outcome.grad_norm)
        self.step += 1
        self.progress.step_done(self.step)
        self.speed.step(size.work)
        self.val_loss = None
        return outcome, skipped is not None

    def _wishes(self) -> Vote:
        """This rank's vote, without the counts of its batches."""
        now, is_main = time.monotonic(), self.mesh.world.is_main
        return Vote(
            counts=tuple(0.0 for _ in self.task.objective.terms),
            failed=float(self.parts.saver.failed),
            save=float(is_main and self.cfg.checkpoint.due(now - self.saved_at)),
            overdue=float(is_main and now > self.stop_by),
            hours=float(is_main and self.ends.time_is_up()),
            stops=tuple(self.signals.wishes()),
            skipped=self.guard.skipped,
        )

    def _log(self, outcome: Outcome, skipped: bool) -> None:
        if self.tracker is None:
            return
        size = self.parts.feed.size(self.step)
        row = step_row(outcome, self.speed, self.mesh.device, fixed=size.fixed, skipped=skipped)
        row |= {**self.parts.feed.row(self.step), **self.watch.stragglers.row}
        self.tracker.log(self.step, row)
        eta = self.speed.eta_s(self.parts.feed.size(self.cfg.max_steps).done - size.done)
        print(progress_line(self.step, self.cfg.max_steps, row, eta), flush=True)

    def _evaluate(self) -> None:
        with self.progress.phase(VALIDATE):
            found = validate(self.parts.engine, self.parts.feed, self.step, self.progress.touch)
            self.eval_due = False
            if found is None:
                return
            self.val_loss = found.val.mean
            anew = self.ranking.enter(found.measured)
            self.ends.validated(self.val_loss, found.measured)
            samples, model = self.task.samples, self.parts.engine.module
            texts = samples.draw(model, self.val_loss, self.progress.touch) if samples else []
            if self.tracker is not None:
                self.tracker.log(self.step, validation_row(found), texts)
                print(validation_line(self.step, self.cfg.max_steps, found, anew), flush=True)
            self.speed.start()  # validation is no training time

    def _score(self, scores: Scores, loss: float) -> None:
        """Score the model on tasks; `loss`: of the last step, where it was not validated."""
        with self.progress.phase(VALIDATE):
            loss = loss if self.val_loss is None else self.val_loss
            row, line = scores.find(self.parts.engine.module, loss, self.progress.touch)
            if self.tracker is not None:
                self.tracker.log(self.step, row)
                print(f"step {self.step}/{self.cfg.max_steps}  {line}", flush=True)
            self.speed.start()

    def _finish(self) -> None:
        """Let the task change the weights once more, before the last save."""
        with self.progress.phase(VALIDATE):
            row = self.task.finish(self.parts.engine, self.progress.touch)
            if row and self.tracker is not None:
                self.tracker.log(self.step, row)
                found = "".join(f"  {name} {x:.4f}" for name, x in row.items())
                print(f"step {self.step}/{self.cfg.max_steps}{found}", flush=True)

    def _is_best(self) -> bool:
        """Return True if the best checkpoint is kept and this validation is better than all before."""
        return self.cfg.checkpoint.keep_best and self.val_loss is not None and self.ranking.beats(self.val_loss)

    def _save(self, last: bool) -> None:
        with self.progress.phase(SAVE):
            started = time.monotonic()
            self._check_skips()  # no checkpoint of weights that some ranks have updated and others not
            if self.val_loss is not None and self._is_best():
                self.ranking.take(self.val_loss)
            size = self.parts.feed.size(self.step)
            state = {
                "tokens": size.done if size.fixed else None,
                "val_loss": self.val_loss if self.val_loss is not None and math.isfinite(self.val_loss) else None,
                **self.ranking.state(),
                **self.ends.state(),
                "data": self.parts.feed.state(self.step),
                "guard": self.guard.to_json(),
            }
            self.parts.saver.save(
                self.step, state, last=last, back_to=None if last else self.guard.first_bad(self.step)
            )
            self.saved_at = time.monotonic()
            self.save_due = False
            if self.tracker is not None:
                self.tracker.log(self.step, {"checkpoint/stall_s": self.saved_at - started})
            self.speed.start()

    def _maybe_stop(self, vote: Vote) -> None:
        """Raises Stopped if a rank got a signal, at the end of the feed's iteration or of watch.stop_s."""
        signal = agreed(vote.stops)
        whole = self.parts.feed.may_save(self.step)
        if signal is None:
            return
        if not whole and not vote.overdue:
            self.stop_by = min(self.stop_by, time.monotonic() + self.cfg.watch.stop_s)
            return
        with self.progress.phase(SAVE):
            self.signals.over()
            self.parts.saver.wait()
        raise Stopped(signal, self.step, self.run.latest(), whole=whole)

    def _check_skips(self) -> None:
        """Raises TransientError on every rank if not all have skipped the same steps. Collective."""
        vote = Vote.unpack(add_votes(self._wishes(), self.mesh).tolist())
        self.guard.check(vote.skipped, self.mesh.world.world_size)

    def _maybe_roll_back(self) -> bool:
        """After a bad step: report it, and roll back if there were too many. Collective."""
        self._report_guard()
        if not self.guard.must_roll_back(self.step):
            return False
        with self.progress.phase(SAVE):
            self._check_skips()
            self.parts.feed.close()
            self.parts.saver.wait()
            place = (self.mesh, self.run, self.guard, self.parts.feed)
            every = self.cfg.checkpoint.every_steps
            target = roll_back(*place, step=self.step, every_steps=every, generation=self.generation)
            self._report_guard()
            self.restart(target)
            self.val_loss = None
            self.eval_due = False
            self.save_due = False
            self.saved_at = time.monotonic()
            self.speed.start()
        self.progress.start(self.step)
        return True

    def _report_guard(self) -> None:
        if self.mesh.world.is_main:
            print(f"guard: {self.guard.last_event()}", flush=True)


def due(step: int, every: int) -> bool:
    """True each `every` steps; never for 0."""
    return every > 0 and step % every == 0
