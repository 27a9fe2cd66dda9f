"""THE loop: batch, loss, step, log, evaluate, save, stop. `Trainer.train` reads top to bottom.

    shards -> plan -> stream -> loader.next() -> engine.backward -> engine.step -> tracker -> [evaluate] -> [save]

Steps are counted by what is done: the row, the validation and the checkpoint of step N come after N updates.
"""

from __future__ import annotations

import time
from types import TracebackType

import torch
import torch.distributed as dist

from data_pipeline.config import Geometry, UserError
from data_pipeline.loader import IGNORE, Batch, TrainLoader, validation_batches
from data_pipeline.manifest import TOKENIZER, Manifest
from data_pipeline.plan import Order
from trainer import checkpoint, parallel
from trainer.arithmetic import flops_per_token
from trainer.config import Precision, PretrainConfig
from trainer.engine import NonFiniteError
from trainer.metrics import Speed, peak_flops, peak_memory_gib, progress_line
from trainer.run_folder import RunFolder
from trainer.schedule import lr_at
from trainer.start import build_engine, introduction, ledger_of, take_run
from trainer.tracking import Tracker
from trainer.world import World


class Trainer:
    """One start of a run: built from the config and the run's last checkpoint, then trained to the end."""

    def __init__(
        self, cfg: PretrainConfig, config_text: str, world: World, geometry: Geometry, train: Manifest, val: Manifest
    ) -> None:
        self.cfg, self.config_text, self.geometry = cfg, config_text, geometry
        self.train_data, self.val_data = train, val
        self.mesh = parallel.start(world, cfg.parallel)
        self.run = RunFolder(cfg.run.dir)
        self.generation, found = take_run(self.run, self.mesh, config_text)
        state = checkpoint.read_state(found) if found else {}
        self.step: int = state.get("step", 0)
        self.tokens: int = state.get("tokens", 0)
        self.val_loss: float | None = None  # of this step, where it was validated
        self.best_val_loss: float | None = state.get("best_val_loss")
        self.order = Order([s.windows(cfg.model.n_ctx) for s in train.shards], cfg.data.lanes, cfg.seed)
        self.ledger = ledger_of(state.get("data"), self.step, geometry)
        self.engine = build_engine(cfg, geometry, self.mesh, found)
        self.loader = TrainLoader(
            train,
            self.order,
            self.ledger,
            cfg.model.n_ctx,
            dp_rank=self.mesh.dp_rank,
            dp=self.mesh.dp,
            micro_batch_size=cfg.micro_batch_size,
            step=self.step,
            pin=self.mesh.device.type == "cuda",
            channel=parallel.channel(self.mesh),
        )
        dtype = torch.bfloat16 if cfg.precision is Precision.bf16 else torch.float32
        self.speed = Speed(flops_per_token(cfg.model), peak_flops(self.mesh.device, dtype) * world.world_size)
        self.tracker: Tracker | None = None  # on rank 0
        checkpoint.together(f"{self.run.root} takes no metrics", self._open_tracker)
        self.saved_at = time.monotonic()
        if world.is_main:
            print(introduction(cfg, geometry, self.mesh, train, self.order, self.ledger, found), flush=True)

    def train(self) -> None:
        """To max_steps. Raises UserError where data, numbers or the disk stop it; the last checkpoint stands."""
        cfg = self.cfg
        self.speed.start()
        while self.step < cfg.max_steps:
            loss, grad_norm, lr, save_now = self._update()
            self.step += 1
            self.tokens += cfg.tokens_per_step
            self.speed.step(cfg.tokens_per_step)
            last = self.step == cfg.max_steps
            self.val_loss = None
            if last or due(self.step, cfg.log_every):
                self._log(loss, grad_norm, lr)
            if last or due(self.step, cfg.eval.every):
                self._evaluate()
            if last or save_now or due(self.step, cfg.checkpoint.every_steps) or self._is_best():
                self._save(last)

    def _update(self) -> tuple[torch.Tensor, float, float, bool]:
        """One optimizer step.

        Returns this rank's part of the loss (nats per token; the parts add up over dp), the global gradient norm, the
        learning rate, and whether rank 0's clock asks for a checkpoint.

        Raises:
            UserError: on every rank, with no weight changed: data that one cannot read, or a norm that is not finite.
        """
        cfg = self.cfg
        batches, unread = self._read()
        valid, clock = self._agree_on_step(batches, unread)
        loss = torch.zeros((), device=self.mesh.device)
        for micro_step, batch in enumerate(batches):
            parallel.seed_dropout(self.mesh, cfg.seed, self.step, micro_step)
            loss += self.engine.backward(batch, valid)
        lr = lr_at(
            cfg.optim.schedule,
            cfg.optim.lr,
            step=self.step,
            tokens=self.tokens,
            max_steps=cfg.max_steps,
            tokens_per_step=cfg.tokens_per_step,
        )
        try:
            grad_norm = self.engine.step(lr)  # waits for the device, once
        except NonFiniteError:
            if not valid.isnan():
                raise
            others = UserError("another rank could not read its data and says why: this step is not made")
            raise unread or others from None
        return loss / valid, grad_norm, lr, cfg.checkpoint.every_minutes > 0 and bool(clock)

    def _read(self) -> tuple[list[Batch], UserError | None]:
        """The step's batches; where they cannot be read, empty ones and the reason."""
        try:
            return self.loader.next(), None
        except UserError as error:
            nothing = torch.zeros(self.geometry.micro_batch_size, self.cfg.model.n_ctx, dtype=torch.int64)
            return [Batch(nothing, nothing)] * self.geometry.grad_accum_steps, error

    def _agree_on_step(self, batches: list[Batch], unread: UserError | None) -> torch.Tensor:
        """[valid tokens of the step over all ranks, rank 0's wish to save by the clock], not waited for.

        A rank that could not read makes the count NaN: it takes part in the step, so that no one waits for it, and
        the gradient is NaN everywhere, which the engine refuses with the one look at the device that it takes anyway.
        """
        minutes = self.cfg.checkpoint.every_minutes
        wish = self.mesh.world.is_main and 0 < minutes * 60 <= time.monotonic() - self.saved_at
        valid = sum(int((batch.labels != IGNORE).sum()) for batch in batches) if self.mesh.tp_rank == 0 else 0
        facts = torch.tensor([float("nan") if unread else valid, float(wish)], dtype=torch.float64)
        facts = facts.to(self.mesh.device)
        dist.all_reduce(facts)
        return facts

    def _log(self, loss: torch.Tensor, grad_norm: float, lr: float) -> None:
        dist.all_reduce(loss, group=self.mesh.dp_group)
        if self.tracker is None:
            return
        position = self.ledger.position(self.step - 1)
        row: dict[str, float] = {
            "train/loss": loss.item(),
            "optim/lr": lr,
            "optim/grad_norm": grad_norm,
            "speed/tokens_per_s": self.speed.tokens_per_s,
            "speed/mfu": self.speed.mfu,
            "memory/peak_gib": peak_memory_gib(self.mesh.device),
            f"data/epoch/{self.train_data.source}": self.order.epoch(self.ledger.position(self.step)),
            "data/position": position,  # of the step's first window
            "data/crc32": self.loader.crc32,  # of the tokens that rank 0 was fed
        }
        self.tracker.log(self.step, row)
        eta = self.speed.eta_s((self.cfg.max_steps - self.step) * self.cfg.tokens_per_step)
        print(progress_line(self.step, self.cfg.max_steps, row, eta), flush=True)

    def _evaluate(self) -> None:
        """Mean loss over the validation windows; every rank runs the same number of forwards."""
        batches = validation_batches(
            self.val_data,
            self.cfg.model.n_ctx,
            dp_rank=self.mesh.dp_rank,
            dp=self.mesh.dp,
            micro_batch_size=self.cfg.micro_batch_size,
            windows=self.cfg.eval.windows,
            pin=self.mesh.device.type == "cuda",
            channel=parallel.channel(self.mesh),
        )
        sums = torch.zeros(2, dtype=torch.float64, device=self.mesh.device)  # loss, tokens
        for batch in batches:
            sums[0] += self.engine.evaluate(batch)
            sums[1] += (batch.labels != IGNORE).sum()
        dist.all_reduce(sums, group=self.mesh.dp_group)
        dist.broadcast(sums, src=0)  # the decision whether this is the best is taken on equal bits
        total, tokens = sums.tolist()
        self.val_loss = total / tokens
        if self.tracker is not None:
            self.tracker.log(self.step, {"val/loss": self.val_loss})
            print(
                f"step {self.step}/{self.cfg.max_steps}  val loss {self.val_loss:.4f} on {tokens:.0f} tokens",
                flush=True,
            )
        self.speed.start()  # validation is no training time

    def _is_best(self) -> bool:
        """Where the best checkpoint is kept, a validation better than all before is worth one."""
        if not self.cfg.checkpoint.keep_best or self.val_loss is None:
            return False
        return self.best_val_loss is None or self.val_loss < self.best_val_loss

    def _save(self, last: bool) -> None:
        cfg, tracker = self.cfg, self.tracker
        # A resumed run finds the journal at least as far as its checkpoint.
        checkpoint.together(f"step {self.step} is not saved", lambda: tracker.flush() if tracker else None)
        if self._is_best():
            self.best_val_loss = self.val_loss
        data = {
            "source": self.train_data.source,
            "sha256": self.train_data.sha256,
            "seed": cfg.seed,
            "lanes": cfg.data.lanes,
            "n_ctx": cfg.model.n_ctx,
            "position": self.ledger.position(self.step),
            "ledger": self.ledger.to_json(),
        }
        path = checkpoint.save(
            self.engine,
            self.run,
            step=self.step,
            state={
                "tokens": self.tokens,
                "val_loss": self.val_loss,
                "best_val_loss": self.best_val_loss,
                "data": data,
            },
            generation=self.generation,
            config_text=self.config_text,
            tokenizer=self.train_data.root / TOKENIZER,
            hf=last,
            eot_id=self.train_data.eot_id,
        )
        if self.mesh.world.is_main:
            print(f"step {self.step}/{cfg.max_steps}  saved {path}", flush=True)
        self.saved_at = time.monotonic()
        self.speed.start()

    def _open_tracker(self) -> None:
        if self.mesh.world.is_main:
            self.tracker = Tracker(self.cfg, self.run, self.generation, resumed_at=self.step)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.loader.close()
        if self.tracker is not None:
            self.tracker.close(failed=kind is not None)
        if kind is None:  # after an error the other ranks may be gone: no collective any more
            parallel.stop(self.mesh)


def due(step: int, every: int) -> bool:
    """True each `every` steps; never for 0."""
    return every > 0 and step % every == 0
