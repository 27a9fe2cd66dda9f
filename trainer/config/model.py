"""A GPT decoder's shape. Standard library only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from conf.errors import MISSING, UserError
from trainer.config.attention import Pattern

KINDS = "DBSF"  # of attention, see ModelConfig.attention


class Norm(Enum):
    pre = "pre"  # GPT-2, GPT-3: LayerNorm before each sub-block, one more after the last
    post = "post"  # GPT-1: LayerNorm after each residual add, none at the end


class Gelu(Enum):
    tanh = "tanh"  # the approximation in the released code of GPT-1 and GPT-2
    exact = "exact"  # by the error function: nanoGPT


@dataclass
class ModelConfig:
    """A GPT decoder. `vocab_size` is the tokenizer's true size; padding for tensor parallelism is derived."""

    name: str = MISSING  # the choice of model=
    n_layer: int = MISSING  # blocks
    n_head: int = MISSING  # heads of attention, n_embd / n_head wide each
    n_embd: int = MISSING  # width of the residual stream
    n_ctx: int = MISSING  # tokens of a window
    vocab_size: int = MISSING  # ids of the tokenizer
    norm: Norm = Norm.pre
    gelu: Gelu = Gelu.tanh
    dropout: float = 0.0  # on embeddings, attention weights and residuals
    init_std: float = 0.02  # standard deviation of the first weights
    layer_norm_eps: float = 1e-5  # added to the variance
    attention: str = "D"  # a letter for each layer, tiled: D dense, B banded (GPT-3), S strided, F fixed (1904.10509)
    band: int | None = None  # B: a token sees itself and the band - 1 tokens before it
    stride: int | None = None  # S: the width of the band, and how far apart the tokens before lie; F: a block's length
    summary: int | None = None  # F: so many tokens at the end of each block are seen by all that follow

    def __post_init__(self) -> None:
        for key in ("n_layer", "n_head", "n_embd", "n_ctx", "vocab_size"):
            if getattr(self, key) < 1:
                raise UserError(f"model.{key}={getattr(self, key)}: give at least 1")
        if self.n_embd % self.n_head:
            raise UserError(f"model.n_embd={self.n_embd} is not a multiple of model.n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"model.dropout={self.dropout}: give 0 <= dropout < 1")
        for key in ("init_std", "layer_norm_eps"):
            if not 0 < getattr(self, key) < math.inf:
                raise UserError(f"model.{key}={getattr(self, key)}: give a positive number")
        self._check_attention()

    def _check_attention(self) -> None:
        """One number for each letter that needs it, and no letter or number that nothing uses."""
        letters = self.attention
        if not letters or (unknown := "".join(sorted(set(letters) - set(KINDS)))):
            what = f"no letter {unknown}" if letters else "empty"
            raise UserError(f"model.attention={letters}: {what}, give letters of {KINDS}, repeated over the layers")
        if len(letters) > self.n_layer:
            raise UserError(
                f"model.attention={letters} has {len(letters)} letters for model.n_layer={self.n_layer}: "
                "give at most one for each layer"
            )
        for key, users in (("band", "B"), ("stride", "SF"), ("summary", "F")):
            value, used = getattr(self, key), set(users) & set(letters)
            if value is None and used:
                raise UserError(f"model.attention={letters} needs model.{key}: give a number of tokens")
            if value is not None and not used:
                raise UserError(
                    f"model.{key}={value} is for attention {' and '.join(users)}, of which "
                    f"model.attention={letters} has none: set it to null"
                )
            if value is not None and value < 1:
                raise UserError(f"model.{key}={value}: give at least 1")
        if self.summary is not None and self.stride is not None and self.summary > self.stride:
            raise UserError(
                f"model.summary={self.summary} is more than model.stride={self.stride}: a block has no more tokens"
            )

    def kind(self, layer: int) -> str:
        """The letter of a layer."""
        return self.attention[layer % len(self.attention)]

    def pattern(self, kind: str) -> Pattern:
        """The tokens that attention of this kind sees."""
        return Pattern(kind, self.band or 0, self.stride or 0, self.summary or 0)

    def as_json(self) -> dict[str, Any]:
        """The arguments as a checkpoint's state.json holds them."""
        return {**asdict(self), "norm": self.norm.value, "gelu": self.gelu.value}

    @classmethod
    def from_json(cls, body: Any) -> ModelConfig:
        """The model of `as_json`; checkpoints of older versions, which know no other, have GELU's tanh form.

        Raises:
            KeyError, TypeError, ValueError, UserError: it is none.
        """
        norm, gelu = Norm(body["norm"]), Gelu(body.get("gelu", Gelu.tanh.value))
        return cls(**{**body, "norm": norm, "gelu": gelu})

    @property
    def sparse_layers(self) -> list[int]:
        """The layers that do not see all of the past in a full context."""
        return [i for i in range(self.n_layer) if not self.pattern(self.kind(i)).sees_all(self.n_ctx)]

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head
