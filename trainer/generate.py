"""Entry: `python -m trainer.generate checkpoint=RUN prompt=TEXT`: continue prompts with a checkpoint of any layout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import UserError, of_nature
from conf.schema import run
from data_pipeline.manifest import TOKENIZER
from trainer.checkpoint.find import find_checkpoint, model_of
from trainer.config.generate import GenerateConfig
from trainer.config.model import ModelConfig
from trainer.distributed.world import read_world
from trainer.run.folder import RunFolder

if TYPE_CHECKING:
    from data_pipeline.tokenizer.tokenizer import Tokenizer
    from trainer.model.gpt import GPT


def generate(cfg: GenerateConfig) -> None:
    checkpoint = find_checkpoint(cfg.checkpoint)
    model_cfg = model_of(checkpoint, RunFolder.state(checkpoint))
    tokenizer = _tokenizer(checkpoint)
    prompts = _prompts(cfg, tokenizer)
    _check(prompts, cfg, model_cfg)
    ids = _continue(cfg, checkpoint, model_cfg, prompts, tokenizer.eot_id if tokenizer else None)
    text = [tokenizer.decode(row) if tokenizer else "" for row in ids]
    if cfg.json:
        print(json.dumps({"ids": ids, "text": text}, ensure_ascii=False))
    else:
        print("\n---\n".join(text) if tokenizer else "\n".join(map(str, ids)))


def _continue(
    cfg: GenerateConfig, checkpoint: Path, model_cfg: ModelConfig, prompts: list[list[int]], eot: int | None
) -> list[list[int]]:
    """Each prompt with its continuation."""
    from trainer.inference.sampler import Sampling, sample

    sampling = Sampling(cfg.temperature, cfg.top_k, cfg.top_p)
    model = load_model(checkpoint, model_cfg)
    new = sample(model, prompts, sampling, max_new_tokens=cfg.max_new_tokens, seed=cfg.seed, eot=eot)
    return [prompt + ids for prompt, ids in zip(prompts, new, strict=True)]


def load_model(checkpoint: Path, cfg: ModelConfig) -> GPT:
    """The checkpoint's weights on one device, whatever layout wrote them, ready to sample from."""
    from trainer.checkpoint.load import load_weights
    from trainer.distributed.mesh import single_rank_mesh
    from trainer.model.gpt import GPT

    mesh = single_rank_mesh(read_world())
    model = GPT(cfg, mesh).to(mesh.device).eval()
    load_weights(checkpoint, model, mesh)
    return model


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
        raise of_nature(e, f"prompt_file={cfg.prompt_file}: {e}") from None
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
