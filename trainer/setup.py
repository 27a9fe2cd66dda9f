"""Set up one start of a run: claim the folder, find the checkpoint, build the engine, the feed and the saver."""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist

from conf.errors import UserError
from trainer.checkpoint import load
from trainer.checkpoint.changes import changed_lines
from trainer.checkpoint.claim import claim_run
from trainer.checkpoint.find import find_checkpoint, read_state
from trainer.checkpoint.ranking import Ranking
from trainer.checkpoint.save import Saver
from trainer.checkpoint.write import Writer, run_facts
from trainer.config.optim import ScheduleConfig, Unit
from trainer.config.parallel import Precision
from trainer.config.train import TrainConfig, profiled_steps
from trainer.data.feed import Feed
from trainer.distributed.collective import all_ranks
from trainer.distributed.mesh import Mesh, join_ranks, leave_ranks, wait_for_main
from trainer.distributed.world import World
from trainer.ends import Ends
from trainer.engine.compile import prepare
from trainer.engine.engine import Engine, make_deterministic
from trainer.engine.trace import StepTrace
from trainer.health.recompute_check import check_recheck
from trainer.health.rollback import Target
from trainer.health.spike_guard import Guard
from trainer.health.watchdog import Watch
from trainer.metrics import Speed, peak_flops
from trainer.model.arithmetic import flops_per_token
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.objective.objective import Objective
from trainer.run import signals
from trainer.run.folder import RunFolder
from trainer.run.journal import read_rows, seconds_trained
from trainer.run.progress import Progress
from trainer.run.signals import Stopped
from trainer.step import Stepper
from trainer.summary import run_summary
from trainer.task import MakeModel, Task
from trainer.tracking.shipper import REGISTER_S
from trainer.tracking.tracker import Status, Tracker


class Parts(NamedTuple):
    """All that one start, or one rollback, builds again."""

    engine: Engine
    feed: Feed
    saver: Saver
    stepper: Stepper


class Start:
    """All that one start of a run holds, and closes. `parts` depend on a checkpoint: a rollback builds them again."""

    def __init__(self, cfg: TrainConfig, config_text: str, world: World, task: Task) -> None:
        self.cfg = cfg
        self.config_text = config_text
        self.task = task
        self.signals = signals.OF_THIS_PROCESS
        self.progress = Progress()
        self.mesh = join_ranks(world, cfg.parallel, cfg.watch.collective_s)
        self.run = RunFolder(cfg.run.dir)
        self.tracker: Tracker | None = None  # on rank 0
        self.generation, checkpoint = claim_run(
            self.run, self.mesh, config_text, cfg.take_over, cfg.watch.beat_s, cfg.resume_step
        )
        self.watch = Watch(cfg.watch, self.run, self.generation, world, self.progress, self._flush, task.fetch_s)
        state = read_state(checkpoint) if checkpoint else {}
        self.guard = Guard(cfg.guard, state.get("guard"))
        dtype = torch.float32 if cfg.precision is Precision.fp32 else torch.bfloat16
        self.speed = Speed(flops_per_token(cfg.model), peak_flops(self.mesh.device, dtype) * world.world_size)
        self.step = 0
        steps = profiled_steps(cfg.profile, cfg.max_steps) if world.is_main else None
        path = self.run.root / "profile" / f"steps-{cfg.profile}.gen-{self.generation:04d}.json"
        self.trace = StepTrace(steps, path, self.speed.start)  # writing it is no training time
        self._open_parts = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:  # closes all that was opened if the rest fails
            undo.push(self)
            self.ends = Ends(cfg.max_hours, task.patience, self._trained_s())
            self.parts = self._build(checkpoint, state)
            undo.pop_all()

    def restart(self, target: Target) -> None:
        """Build all parts again, as a start from the target of a rollback would. Collective."""
        self.parts.engine.close()
        self.parts.saver.release()
        self.progress.drain = lambda: None
        self._open_parts.pop_all()
        del self.parts
        gc.collect()  # frees the old engine's memory before the new one takes as much
        if self.mesh.device.type == "cuda":
            torch.cuda.empty_cache()
        self.generation = target.generation
        self.parts = self._build(target.checkpoint, target.state)

    def _build(self, checkpoint: Path | None, state: Mapping[str, Any]) -> Parts:
        """Build the parts from a checkpoint of this state; None: from the beginning. Collective."""
        cfg = self.cfg
        self.watch.generation = self.generation
        self.step = state.get("step", 0)
        self.ranking = Ranking(state)
        init_from = init_checkpoint(cfg.init_from, checkpoint)
        engine = build_engine(cfg, self.task.objective, self.mesh, checkpoint, init_from, self.task.model)
        feed = self.task.feed(engine, state)
        self._open_parts.callback(feed.close)
        check_feed(cfg.optim.schedule, cfg.max_steps, feed)
        all_ranks(f"{self.run.root} takes no metrics", self._open_tracker)
        self.show_plan(feed)
        facts = run_facts(cfg.optim, cfg.model, cfg.parallel, cfg.precision, self.mesh)
        writer = Writer(
            cfg.model,
            engine.specs,
            cfg.checkpoint,
            self.mesh,
            self.run,
            self.generation,
            self.config_text,
            facts,
            self.task.tokenizer,
            self.task.eot_id,
            self._flush,
            self._published,
        )
        saver = Saver(engine, writer, self.progress.touch)
        self._open_parts.callback(saver.close)
        self.progress.drain = saver.drain
        if self.mesh.world.is_main:
            then = checkpoint / "config.yaml" if checkpoint else None
            changed = (
                changed_lines(type(cfg), cfg.optim, cfg.max_steps, feed, self.step, then, self.run.config)
                if then
                else []
            )
            print(run_summary(cfg, self.mesh, feed, checkpoint, init_from, changed), flush=True)
        stepper = Stepper(
            engine,
            feed,
            self.guard,
            self.speed,
            self.progress,
            optim=cfg.optim,
            recheck_every=cfg.guard.recheck_every,
            seed=cfg.seed,
            max_steps=cfg.max_steps,
        )
        self.ends.resume(state)
        return Parts(engine, feed, saver, stepper)

    def end_early(self) -> None:
        """Record and print the reason for an end before max_steps, once its checkpoint is published."""
        self.parts.saver.wait()
        if self.mesh.world.is_main:
            self.run.note(self.generation, ended=self.ends.why)
            print(f"step {self.step}/{self.cfg.max_steps}  the run ends: {self.ends.why}", flush=True)

    def _trained_s(self) -> float:
        """The seconds that earlier starts have trained, by the journal; 0 where no limit asks for them. Collective."""
        limit, path = self.cfg.max_hours, self.run.metrics
        asked = limit is not None and self.mesh.world.is_main and path.exists()
        rows = read_rows(path) if asked else iter(())
        what = f"max_hours={limit} needs the hours of all starts"
        return all_ranks(what, lambda: seconds_trained(row for row, _ in rows))[0]

    def show_plan(self, feed: Feed) -> None:
        """Draw the plan of the data again, from this step on."""
        if self.tracker is not None and feed.plan is not None:
            self.tracker.show(feed.plan, self.step)

    def _flush(self) -> None:
        """Make the journal durable up to a checkpoint, so that a resumed run finds it. In the saver's thread."""
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
            self.tracker.restart(self.generation, self.step)
        elif self.mesh.world.is_main:
            self.tracker = Tracker(self.cfg, self.run, self.generation, resumed_at=self.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.signals.over()
        self.progress.end()  # what closes and writes on is no hang
        with contextlib.ExitStack() as rest:  # from the last to the first, each whatever the others raise
            rest.callback(self.watch.close)
            rest.callback(self.trace.close)
            if self.tracker is not None:
                rest.callback(self.tracker.close, Status.of(error))
            rest.callback(self._open_parts.close)
        if kind in (None, Stopped):  # after an error the other ranks may be gone: no collective any more
            # rank 0 may wait for MLflow, and a launcher ends the other ranks some time after the first has ended
            wait_for_main(self.mesh, f"closed {self.generation}", self.cfg.watch.start_s + REGISTER_S)
            if kind is Stopped:
                dist.barrier()  # a launcher ends the other ranks as soon as one ends with a code
            leave_ranks(self.mesh)


def init_checkpoint(init_from: str | None, checkpoint: Path | None) -> Path | None:
    """The checkpoint whose weights a new run starts from, the same on all ranks; None if it has none. Collective.

    Rank 0 looks it up, for the run that wrote it may still be going on.
    """
    if checkpoint is not None or init_from is None:
        return None
    paths = all_ranks(f"init_from={init_from} cannot be used", lambda: str(find_checkpoint(init_from, "init_from")))
    return Path(paths[0])


def build_engine(
    cfg: TrainConfig,
    objective: Objective,
    mesh: Mesh,
    checkpoint: Path | None,
    init_from: Path | None = None,
    make_model: MakeModel = GPT,
) -> Engine:
    """Load weights into the plain module, wrap it by ZeRO, then restore masters and moments.

    The same code serves a fresh start and a resumed one. `checkpoint`, which the start's claim or a rollback has
    verified, gives all of them; `init_from` the weights alone, as far as the module has them.
    """
    check_recheck(cfg.guard, cfg.deterministic, mesh.device.type)
    if cfg.deterministic and mesh.device.type == "cuda":  # a CPU always is
        make_deterministic()
    split, recompute = cfg.parallel.sequence_parallel, cfg.parallel.recompute
    model = make_model(cfg.model, mesh, sequence_parallel=split, recompute=recompute)
    model.to(mesh.device)
    if checkpoint:
        load.load_weights(checkpoint, model, mesh, verified=True)
    else:
        initialise(model, cfg.model, cfg.seed)
        if init_from:
            load.start_from(init_from, model, mesh)
    prepare(model, cfg.precision, cfg.compile, cfg.parallel, mesh)
    engine = Engine(model, objective, cfg.optim, cfg.parallel, cfg.precision, mesh)
    if checkpoint:
        load.restore(checkpoint, engine, verified=True)
    return engine


def check_feed(schedule: ScheduleConfig, max_steps: int, feed: Feed) -> None:
    """Raises UserError if the schedule counts what the feed does not, or if the run would end inside an iteration."""
    if schedule.unit is Unit.tokens and not feed.size(0).fixed:
        raise UserError(
            "optim.schedule.unit=tokens, but the examples of this run have no fixed number of tokens: give "
            "optim.schedule.unit=steps"
        )
    if not feed.may_save(max_steps):
        end = next(step for step in itertools.count(max_steps) if feed.may_save(step))
        raise UserError(f"max_steps={max_steps} is inside an iteration: give max_steps={end}, where one ends")
