"""Samples of text at validations: what the model makes of the prompts of eval.samples, of the same draws each time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from data_pipeline.tokenizer.tokenizer import Tokenizer
from trainer.config.model import ModelConfig
from trainer.config.pretrain import SamplesConfig

if TYPE_CHECKING:
    from trainer.model.gpt import GPT


class Samples:
    """The prompts of a run as token ids, which its model continues on any layout."""

    def __init__(self, cfg: SamplesConfig, tokenizer: Tokenizer, model: ModelConfig) -> None:
        """Raises UserError for a prompt that the model cannot continue by so many tokens."""
        self._cfg = cfg
        self._tokenizer = tokenizer
        self._prompts = [tokenizer.encode(prompt) for prompt in cfg.prompts]
        for i, ids in enumerate(self._prompts):
            if not ids and tokenizer.eot_id is None:
                raise UserError(
                    f"eval.samples.prompts: prompt {i} is empty, but {tokenizer.name} has no end-of-text token to "
                    "start a text with: give a prompt of at least one token"
                )
            room = model.n_ctx - max(1, len(ids))
            if cfg.tokens > room:
                cure = f"give eval.samples.tokens={room}, or a shorter prompt" if room > 0 else "give a shorter prompt"
                raise UserError(
                    f"eval.samples.tokens={cfg.tokens} after the {max(1, len(ids))} tokens of prompt {i} are more than "
                    f"model.n_ctx={model.n_ctx}: {cure}"
                )

    def draw(self, model: GPT, loss: float, on_progress: Callable[[], None]) -> list[str]:
        """Each prompt's text, with what comes after it; the same list on all ranks. Collective.

        `loss`: of the validation, the same on all ranks; where it is not finite, one line says so instead.
        `on_progress` is called at each token.
        """
        if not math.isfinite(loss):
            return [f"no samples: val loss is {loss}"]
        import torch.distributed as dist

        from trainer.inference.requests import Sampling
        from trainer.inference.sampler import sample

        def touch(index: int, new: list[int]) -> bool:
            on_progress()
            return False

        eot, mesh = self._tokenizer.eot_id, model.mesh
        own = range(mesh.dp_rank, len(self._prompts), mesh.dp)
        new = sample(
            model,
            [self._prompts[i] or [int(str(eot))] for i in own],
            Sampling(),
            max_new_tokens=self._cfg.tokens,
            seed=self._cfg.seed,
            keys=own,
            eot=eot,
            stop=touch,
        )
        texts = {i: self._tokenizer.decode(self._prompts[i] + ids) for i, ids in zip(own, new, strict=True)}
        parts: list[Any] = [None] * mesh.world.world_size
        dist.all_gather_object(parts, texts)
        drawn = {i: text for part in parts for i, text in part.items()}
        return [drawn[i] for i in range(len(self._prompts))]
