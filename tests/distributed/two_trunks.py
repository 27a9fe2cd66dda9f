"""A policy and a value trunk with a head, as one module with an objective of two terms, and plain torch beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.config import IGNORE
from tests.distributed import tiny_run as run
from trainer.config.model import ModelConfig
from trainer.config.optim import OptimConfig
from trainer.config.pretrain import PretrainConfig
from trainer.distributed.mesh import Mesh
from trainer.engine.fragments import owned
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.model.specs import from_local
from trainer.objective.heads import Head
from trainer.objective.language_model import lm_loss

ROWS = 2  # of a micro batch


class Policy(NamedTuple):
    """A micro batch for the policy alone."""

    tokens: Tensor
    labels: Tensor
    returns: Tensor  # NaN where the value is not asked for


class Value(NamedTuple):
    """A micro batch for the value trunk and its head alone."""

    tokens: Tensor
    labels: Tensor
    returns: Tensor


class Both(NamedTuple):
    """A micro batch for both."""

    tokens: Tensor
    labels: Tensor
    returns: Tensor


class Unvalued(NamedTuple):
    """A micro batch for both, none of whose returns count."""

    tokens: Tensor
    labels: Tensor
    returns: Tensor


class Pair(GPT):
    """The policy without a prefix, `value.*` and `head.*`."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh, *, sequence_parallel: bool = False) -> None:
        super().__init__(cfg, mesh, sequence_parallel=sequence_parallel)
        self.value = GPT(cfg, mesh, sequence_parallel=sequence_parallel)
        self.head = Head(cfg.n_embd, 1, mesh, sequence_parallel=sequence_parallel)


class PolicyAndValue:
    """-log p over labels, and half the squared error of the value over returns."""

    terms = ("policy", "value")
    weights = (1.0, 0.7)

    def counts(self, batch: Any) -> list[float]:
        labels = 0 if isinstance(batch, Value) else int((batch.labels != IGNORE).sum())
        returns = 0 if isinstance(batch, Policy) else int((~batch.returns.isnan()).sum())
        return [float(labels), float(returns)]

    def sums(self, module: Pair, batch: Any) -> Tensor:
        policy = value = torch.zeros((), device=batch.tokens.device)
        if not isinstance(batch, Value):
            policy = lm_loss(module, batch.tokens, batch.labels)
        if not isinstance(batch, Policy):
            value_TB = module.head(module.value.hidden(batch.tokens)).squeeze(-1)
            returns_TB = batch.returns.t()
            counted_TB = ~returns_TB.isnan()
            value = (0.5 * (value_TB - returns_TB.where(counted_TB, 0.0)) ** 2 * counted_TB).sum()
        return torch.stack([policy, value])


def build(cfg: PretrainConfig, mesh: Mesh) -> Pair:
    """The pair with the weights of one seed, whatever the layout."""
    pair = Pair(cfg.model, mesh, sequence_parallel=cfg.parallel.sequence_parallel)
    initialise(pair, cfg.model, 7)
    return pair


def micro_batches(step: int, kinds: Sequence[type], vocab_size: int, dp: int, dp_rank: int) -> list[Any]:
    """A rank's micro batches of a step, one of each kind; every row has other numbers of labels and of returns."""
    n = dp * len(kinds) * ROWS
    tokens, labels, _ = run.windows(step, vocab_size, n)
    returns = torch.randn(labels.shape, generator=torch.Generator().manual_seed(step))
    returns[torch.arange(n)[:, None] % 7 > torch.arange(labels.shape[1])] = torch.nan
    first = dp_rank * len(kinds) * ROWS
    parts = (t[first : first + len(kinds) * ROWS].split(ROWS) for t in (tokens, labels, returns))
    batches = [kind(*part) for kind, part in zip(kinds, zip(*parts, strict=True), strict=True)]
    return [b._replace(returns=b.returns * torch.nan) if isinstance(b, Unvalued) else b for b in batches]


def global_counts(step: int, kinds: Sequence[type], vocab_size: int, dp: int) -> Tensor:
    batches = [b for rank in range(dp) for b in micro_batches(step, kinds, vocab_size, dp, rank)]
    return torch.tensor([PolicyAndValue().counts(b) for b in batches], dtype=torch.float64).sum(0)


def engine_step(engine: run.TinyEngine, step: int, kinds: Sequence[type]) -> tuple[list[float], float]:
    """(sums over all ranks and micro batches, gradient norm)"""
    mesh, vocab_size = engine.mesh, engine.cfg.model.vocab_size
    counts = global_counts(step, kinds, vocab_size, mesh.dp)
    batches = micro_batches(step, kinds, vocab_size, mesh.dp, mesh.dp_rank)
    sums = torch.stack([engine.backward(b, counts, last=b is batches[-1]) for b in batches]).sum(0)
    dist.all_reduce(sums, group=mesh.dp_group)
    return sums.tolist(), engine.step(run.lr(step))


class PlainTorch:
    """Autograd, clipping and AdamW of torch's own, fp32 masters: one process with every rank's micro batches.

    A parameter that a step does not use gets a gradient of 0, as in ZeRO: torch's None would leave its moments alone.
    """

    def __init__(self, pair: Pair, optim: OptimConfig, dtype: torch.dtype) -> None:
        self.pair = pair.to(dtype)
        self.optim = optim
        self.masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in pair.named_parameters()}
        self.adam = run.plain_adamw(self.masters.values(), optim)

    def gradient(self, step: int, kinds: Sequence[type], dp: int) -> list[float]:
        """Put the step's gradient into the masters; returns the sums."""
        vocab_size, objective = self.pair.cfg.vocab_size, PolicyAndValue()
        counts = global_counts(step, kinds, vocab_size, dp)
        sums = torch.zeros(2)
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        for batch in (b for rank in range(dp) for b in micro_batches(step, kinds, vocab_size, dp, rank)):
            self.pair.zero_grad()
            terms = self.pair(objective.sums, batch)
            used = [weight * x / n for weight, x, n in zip(objective.weights, terms, counts, strict=True) if n > 0]
            torch.stack(used).sum().backward()
            sums += terms.detach()
            for name, p in self.pair.named_parameters():
                master = self.masters[name]
                if p.grad is not None and master.grad is not None:
                    master.grad += p.grad.float()
        return sums.tolist()

    def step(self, step: int, kinds: Sequence[type], dp: int) -> tuple[list[float], float]:
        """(sums, gradient norm)"""
        sums = self.gradient(step, kinds, dp)
        norm = float(torch.stack(list(self.norms().values())).norm())
        torch.nn.utils.clip_grad_norm_(self.masters.values(), self.optim.grad_clip or float("inf"))
        for group in self.adam.param_groups:
            group["lr"] = run.lr(step)
        self.adam.step()
        with torch.no_grad():
            for name, p in self.pair.named_parameters():
                p.copy_(self.masters[name])
        return sums, norm

    def weights(self) -> dict[str, Tensor]:
        """The masters in their true shapes."""
        return {name: self._true(name, p.detach()) for name, p in self.masters.items()}

    def gradients(self) -> dict[str, Tensor]:
        """The masters' gradients in their true shapes."""
        return {name: self._true(name, p.grad) for name, p in self.masters.items() if p.grad is not None}

    def _true(self, name: str, tensor: Tensor) -> Tensor:
        return from_local([tensor], self.pair.specs()[name])

    def norms(self) -> dict[str, Tensor]:
        """The gradient norm of each part."""
        parts: dict[str, list[Tensor]] = {"trunk": [], "value": [], "head": []}
        for name, p in self.masters.items():
            prefix = name.partition(".")[0]
            assert p.grad is not None
            parts[prefix if prefix in parts else "trunk"].append(p.grad.double().norm())
        return {name: torch.stack(norms).norm() for name, norms in parts.items()}


def whole(engine: run.TinyEngine, kind: str) -> dict[str, Tensor]:
    """Masters or moments in their true shapes, on every rank."""
    mesh, specs = engine.mesh, engine.specs
    local = {name: torch.zeros(spec.local_shape(mesh.tp)).view(-1) for name, spec in specs.items()}
    for fragment in owned(engine.module, engine.adam):
        local[fragment.name][fragment.start : fragment.start + fragment.length] = fragment.views[kind]
    out = {}
    for name, spec in specs.items():
        dist.all_reduce(local[name], group=mesh.dp_group)
        parts = [torch.empty_like(local[name]) for _ in range(mesh.tp)]
        dist.all_gather(parts, local[name], group=mesh.tp_group)
        out[name] = from_local([part.view(spec.local_shape(mesh.tp)) for part in parts], spec)
    return out
