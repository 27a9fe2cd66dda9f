"""Entry: `python -m trainer.generate checkpoint=RUN prompt=TEXT`: continue prompts with a checkpoint of any layout."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import UserError
from conf.schema import run
from data_pipeline.manifest import TOKENIZER
from trainer.checkpoint.find import find_checkpoint, model_of
from trainer.config.generate import GenerateConfig
from trainer.config.model import ModelConfig
from trainer.distributed.world import read_world
from trainer.run.folder import RunFolder

if TYPE_CHECKING:
    import torch

    from data_pipeline.tokenizer.tokenizer import Tokenizer
    from trainer.model.gpt import GPT


BATCH = 16  # prompts at a time: their keys and values for n_ctx tokens lie in memory


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn from logits; `temperature` 0 takes the likeliest."""

    temperature: float
    top_k: int | None
    top_p: float | None

    def __call__(self, logits_BV: torch.Tensor, u_B: torch.Tensor) -> torch.Tensor:
        """One id for each row [B]; `u_B` in [0, 1) decides, by the inverse of the cumulated probabilities."""
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        p_BV, id_BV = (logits_BV.double() / self.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            p_BV[:, self.top_k :] = 0
        if self.top_p is not None:  # the fewest likeliest tokens whose mass reaches top_p; the first always stays
            p_BV[p_BV.cumsum(-1) - p_BV >= self.top_p] = 0
        mass_BV = p_BV.cumsum(-1)
        pick_B1 = (mass_BV <= u_B[:, None] * mass_BV[:, -1:]).sum(-1, keepdim=True)
        last_B1 = (p_BV > 0).sum(-1, keepdim=True) - 1  # u close to 1 may round past the last token with any mass
        return id_BV.gather(-1, pick_B1.minimum(last_B1)).squeeze(-1)


def generate(cfg: GenerateConfig) -> None:
    checkpoint = find_checkpoint(cfg.checkpoint)
    model_cfg = model_of(checkpoint, RunFolder.state(checkpoint))
    tokenizer = _tokenizer(checkpoint)
    prompts = _prompts(cfg, tokenizer)
    _check(prompts, cfg, model_cfg)
    model = load_model(checkpoint, model_cfg)
    sampler = Sampler(cfg.temperature, cfg.top_k, cfg.top_p)
    eot = tokenizer.eot_id if tokenizer else None
    ids = continue_prompts(model, prompts, cfg.max_new_tokens, sampler, cfg.seed, eot)
    text = [tokenizer.decode(row) if tokenizer else "" for row in ids]
    if cfg.json:
        print(json.dumps({"ids": ids, "text": text}, ensure_ascii=False))
    else:
        print("\n---\n".join(text) if tokenizer else "\n".join(map(str, ids)))


def load_model(checkpoint: Path, cfg: ModelConfig) -> GPT:
    """The checkpoint's weights on one device, whatever layout wrote them, ready to sample from."""
    from trainer.checkpoint.load import load_weights
    from trainer.config.parallel import ParallelConfig
    from trainer.distributed import mesh as parallel
    from trainer.model.gpt import GPT

    mesh = parallel.start(read_world(), ParallelConfig(name="generate"))
    model = GPT(cfg, mesh).to(mesh.device).eval()
    load_weights(checkpoint, model, mesh)
    return model


def continue_prompts(
    model: GPT, prompts: list[list[int]], max_new_tokens: int, sampler: Sampler, seed: int, eot: int | None
) -> list[list[int]]:
    """Each prompt with its continuation, which ends after `eot`.

    Prompts of one length run in batches of up to BATCH. A prompt's draws depend on `seed` and its place in the list.
    """
    import torch

    out: list[list[int]] = [[]] * len(prompts)
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    batches = [m[i : i + BATCH] for m in by_length.values() for i in range(0, len(m), BATCH)]
    for members in batches:
        draws = torch.stack([_uniform(seed, i, max_new_tokens) for i in members])
        for i, row in zip(
            members, _continue_batch(model, [prompts[i] for i in members], sampler, draws, eot), strict=True
        ):
            out[i] = row
    return out


def _continue_batch(
    model: GPT, prompts: list[list[int]], sampler: Sampler, u_BN: torch.Tensor, eot: int | None
) -> list[list[int]]:
    import torch

    from trainer.inference.cache import KVCache

    device = next(model.parameters()).device
    rows = [list(p) for p in prompts]
    cache = KVCache(model.cfg.n_ctx)
    new_BT = torch.tensor(rows, device=device)
    ended = [False] * len(rows)
    with torch.inference_mode():
        for u_B in u_BN.to(device).unbind(1):
            next_B = sampler(model.logits(new_BT, cache)[:, -1], u_B)
            for r, token in enumerate(next_B.tolist()):
                if not ended[r]:
                    rows[r].append(token)
                    ended[r] = token == eot
            if all(ended):
                break
            new_BT = next_B[:, None]
    return rows


def _uniform(seed: int, prompt: int, n: int) -> torch.Tensor:
    import torch

    from trainer.distributed.seeds import stable_seed

    generator = torch.Generator().manual_seed(stable_seed("sample", seed, prompt))
    return torch.rand(n, generator=generator, dtype=torch.float64)


def _tokenizer(checkpoint: Path) -> Tokenizer | None:
    from data_pipeline.tokenizer.tokenizer import Tokenizer

    path = checkpoint / TOKENIZER
    return Tokenizer.load(str(path)) if path.is_file() else None


def _prompts(cfg: GenerateConfig, tokenizer: Tokenizer | None) -> list[list[int]]:
    if cfg.prompt_ids is not None:
        return cfg.prompt_ids
    if tokenizer is None:
        raise UserError(f"checkpoint={cfg.checkpoint} carries no tokenizer.json: give prompt_ids=[[...]]")
    if cfg.prompt is not None:
        return [tokenizer.encode(cfg.prompt)]
    try:
        text = sys.stdin.read() if cfg.prompt_file == "-" else Path(str(cfg.prompt_file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"prompt_file={cfg.prompt_file}: {e}") from None
    return [tokenizer.encode(line) for line in text.removesuffix("\n").split("\n")] if text else []


def _check(prompts: list[list[int]], cfg: GenerateConfig, model: ModelConfig) -> None:
    if not prompts:
        raise UserError("no prompt: prompt_ids is an empty list, or prompt_file an empty file: give at least one")
    for i, ids in enumerate(prompts):
        if not ids:
            raise UserError(f"prompt {i} is empty: a model continues at least one token")
        if len(ids) + cfg.max_new_tokens > model.n_ctx:
            raise UserError(
                f"prompt {i} has {len(ids)} tokens, with max_new_tokens={cfg.max_new_tokens} more than "
                f"the model's n_ctx={model.n_ctx}: give a shorter prompt, or max_new_tokens of at most "
                f"{max(0, model.n_ctx - len(ids))}"
            )
        bad = next((t for t in ids if not 0 <= t < model.vocab_size), None)
        if bad is not None:
            raise UserError(f"prompt {i} holds token id {bad}: the model's ids go from 0 to {model.vocab_size - 1}")


if __name__ == "__main__":
    run(GenerateConfig, generate)
