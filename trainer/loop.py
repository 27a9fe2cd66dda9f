"""THE loop: batch, loss, step, log, evaluate, save, stop. `Trainer.train` reads top to bottom.

    shards -> plan -> stream -> loader.next() -> engine.backward -> engine.step -> tracker -> [evaluate] -> [save]

Steps are counted by what is done: the row, the validation and the checkpoint of step N come after N updates.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.config import Geometry, UserError
from data_pipeline.loader import IGNORE, Batch, TrainLoader, validation_batches
from data_pipeline.manifest import TOKENIZER, Manifest, publish
from data_pipeline.plan import Ledger, Order
from trainer import checkpoint, parallel
from trainer.arithmetic import flops_per_token, param_count
from trainer.config import PretrainConfig
from trainer.engine import Engine
from trainer.metrics import Speed, peak_flops, peak_memory_gib, progress_line
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.run_folder import RunFolder
from trainer.schedule import lr_at
from trainer.tracking import Tracker
from trainer.world import World


class Trainer:
    """One start of a run: built from the config and the run's last checkpoint, then trained to the end."""

    def __init__(
        self, cfg: PretrainConfig, config_text: str, world: World, geometry: Geometry, train: Manifest, val: Manifest
    ) -> None:
        self.cfg, self.config_text, self.train_data, self.val_data = cfg, config_text, train, val
        self.mesh = parallel.start(world, cfg.parallel)
        self.run = RunFolder(cfg.run.dir)
        self.generation, found = self._agree_on_start()
        state = checkpoint.read_state(found) if found else {}
        self.step: int = state.get("step", 0)
        self.tokens: int = state.get("tokens", 0)
        self.val_loss: float | None = None
        self.order = Order([s.windows(cfg.model.n_ctx) for s in train.shards], cfg.data.lanes, cfg.seed)
        self.ledger = ledger_of(state.get("data"), self.step, geometry)
        self.engine = self._build_engine(found, geometry)
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
        dtype = torch.bfloat16 if cfg.precision.value == "bf16" else torch.float32
        self.speed = Speed(flops_per_token(cfg.model), peak_flops(self.mesh.device, dtype) * world.world_size)
        self.tracker = Tracker(cfg, self.run, self.generation, resumed_at=self.step) if world.is_main else None
        self.saved_at = time.monotonic()
        if world.is_main:
            self._introduce(found, geometry)

    def train(self) -> None:
        """To max_steps. Raises UserError where data, numbers or the disk stop it; the last checkpoint stands."""
        cfg = self.cfg
        self.speed.start()
        while self.step < cfg.max_steps:
            loss, grad_norm, lr, save_now = self._update(self.loader.next())
            self.step += 1
            self.tokens += cfg.tokens_per_step
            self.speed.step(cfg.tokens_per_step)
            last = self.step == cfg.max_steps
            self.val_loss = None
            if last or due(self.step, cfg.log_every):
                self._log(loss, grad_norm, lr)
            if last or due(self.step, cfg.eval.every):
                self._evaluate()
            if last or save_now or due(self.step, cfg.checkpoint.every_steps):
                self._save(last)

    def _update(self, batches: list[Batch]) -> tuple[torch.Tensor, float, float, bool]:
        """One optimizer step.

        Returns this rank's part of the loss (nats per token; the parts add up over dp), the global gradient norm, the
        learning rate, and whether rank 0's clock asks for a checkpoint.
        """
        cfg = self.cfg
        valid, clock = self._agree_on_step(batches)
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
        grad_norm = self.engine.step(lr)  # waits for the device, once
        return loss / valid, grad_norm, lr, bool(clock)

    def _agree_on_step(self, batches: list[Batch]) -> torch.Tensor:
        """[valid tokens of the step over all ranks, rank 0's wish to save by the clock], not waited for."""
        minutes = self.cfg.checkpoint.every_minutes
        wish = self.mesh.world.is_main and 0 < minutes * 60 <= time.monotonic() - self.saved_at
        valid = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        facts = torch.tensor([valid / self.mesh.tp, float(wish)], dtype=torch.float32).to(self.mesh.device)
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
        total, tokens = sums.tolist()
        self.val_loss = total / tokens
        if self.tracker is not None:
            self.tracker.log(self.step, {"val/loss": self.val_loss})
            print(
                f"step {self.step}/{self.cfg.max_steps}  val loss {self.val_loss:.4f} on {tokens:.0f} tokens",
                flush=True,
            )
        self.speed.start()  # validation is no training time

    def _save(self, last: bool) -> None:
        if self.tracker is not None:
            self.tracker.flush()  # a resumed run finds the journal at least as far as its checkpoint
        cfg = self.cfg
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
            state={"tokens": self.tokens, "val_loss": self.val_loss, "data": data},
            generation=self.generation,
            config_text=self.config_text,
            tokenizer=self.train_data.root / TOKENIZER,
            hf=last,
        )
        if self.mesh.world.is_main:
            print(f"step {self.step}/{cfg.max_steps}  saved {path}", flush=True)
        self.saved_at = time.monotonic()
        self.speed.start()

    def _build_engine(self, found: Path | None, geometry: Geometry) -> Engine:
        """One path for fresh and resumed: weights into the plain module, ZeRO around it, then masters and moments."""
        cfg = self.cfg
        model = GPT(
            cfg.model, self.mesh, sequence_parallel=cfg.parallel.sequence_parallel, recompute=cfg.parallel.recompute
        ).to(self.mesh.device)
        if found:
            checkpoint.load_weights(found, model, self.mesh)
        else:
            initialise(model, cfg.model, cfg.seed)
        engine = Engine(model, cfg, geometry, self.mesh)
        if found:
            checkpoint.restore(found, engine)
        return engine

    def _agree_on_start(self) -> tuple[int, Path | None]:
        """Rank 0 takes the generation and freezes the config; then all ranks look for the last checkpoint.

        Raises:
            UserError: they do not see the same one.
        """
        generation = torch.zeros((), dtype=torch.int64, device=self.mesh.device)
        if self.mesh.world.is_main:
            generation += self.run.take_generation()
            publish(self.run.config, self.config_text.encode())
        dist.broadcast(generation, src=0)
        found = self.run.latest()
        step = self.run.state(found)["step"] if found else 0
        bounds = torch.tensor([step, -step], device=self.mesh.device)
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
        if bounds[0] != -bounds[1]:
            raise UserError(
                f"the ranks' last checkpoints in run.dir={self.run.root} go from step {-bounds[1]} to step "
                f"{bounds[0]}: give a folder that all nodes share"
            )
        return int(generation), found

    def _introduce(self, found: Path | None, geometry: Geometry) -> None:
        cfg, mesh = self.cfg, self.mesh
        print(
            f"{cfg.run.name}: {cfg.model.name}, {param_count(cfg.model):,} parameters in {cfg.precision.value} on "
            f"{mesh.world.world_size} {mesh.device.type} ranks "
            f"(dp={mesh.dp} tp={mesh.tp} ZeRO-{cfg.parallel.zero_stage})\n"
            f"  a step: {geometry.windows_per_step} windows of {cfg.model.n_ctx} tokens = dp {geometry.dp} x "
            f"micro batch {geometry.micro_batch_size} x {geometry.grad_accum_steps} micro steps\n"
            f"  data: {self.train_data.tokens:,} tokens, {self.order.windows:,} windows; the run takes "
            f"{self.order.epoch(self.ledger.position(cfg.max_steps)):.2f} epochs\n"
            f"  {self.run.root}: " + (f"goes on from {found.name}" if found else "starts from nothing"),
            flush=True,
        )

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


def ledger_of(data: dict[str, Any] | None, step: int, geometry: Geometry) -> Ledger:
    """The run's ledger so far; a batch size that has changed since the checkpoint becomes an event from `step` on."""
    if data is None:
        return Ledger.start(geometry.windows_per_step)
    ledger = Ledger.from_json(data["ledger"])
    if ledger.windows_per_step(step) == geometry.windows_per_step:
        return ledger
    return ledger.then(step, ledger.position(step), geometry.windows_per_step)
