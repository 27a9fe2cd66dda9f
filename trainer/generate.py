"""Entry: `python -m trainer.generate checkpoint=RUN prompt=TEXT`: continue prompts with a checkpoint of any layout."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import UserError, of_nature
from conf.schema import run
from data_pipeline.manifest import TOKENIZER
from data_pipeline.tokenizer.vocabularies import EOT, INFILL
from trainer.checkpoint.find import find_checkpoint, model_of
from trainer.config.inference import GenerateConfig
from trainer.config.model import ModelConfig
from trainer.distributed.world import read_world
from trainer.inference.growing_text import GrowingText
from trainer.run.folder import RunFolder

if TYPE_CHECKING:
    from data_pipeline.tokenizer.tokenizer import Tokenizer
    from trainer.model.gpt import GPT


def generate(cfg: GenerateConfig) -> None:
    checkpoint = find_checkpoint(cfg.checkpoint)
    model_cfg = model_of(checkpoint, RunFolder.state(checkpoint))
    tokenizer = _tokenizer(checkpoint)
    if tokenizer is None and (cfg.stop or cfg.stream):
        raise UserError(
            f"checkpoint={cfg.checkpoint} carries no tokenizer.json, which stop and stream need: leave both out"
        )
    prompts = _prompts(cfg, tokenizer)
    _check(prompts, cfg, model_cfg, tokenizer)
    samples = [
        _sample(tokenizer, prompt, cfg, key=i + (j << 32))  # the j-th sample of a prompt is the same for any number
        for i, prompt in enumerate(prompts)
        for j in range(cfg.num_samples)
    ]
    _draw(cfg, load_model(checkpoint, model_cfg), samples)
    if cfg.json:
        print(json.dumps({"ids": [s.ids for s in samples], "text": [s.text.text for s in samples]}, ensure_ascii=False))
    elif not cfg.stream:
        print("\n---\n".join(s.text.text for s in samples) if tokenizer else "\n".join(str(s.ids) for s in samples))


@dataclass
class _Sample:
    key: int  # of its draws
    ids: list[int]  # its prompt, with what comes after
    text: GrowingText
    eot: int | None


def _sample(tokenizer: Tokenizer | None, prompt: list[int], cfg: GenerateConfig, key: int) -> _Sample:
    if tokenizer is None:
        return _Sample(key, prompt, GrowingText(lambda _: "", [], []), None)
    start = [] if prompt else [int(str(tokenizer.eot_id))]
    text = GrowingText(tokenizer.decode, prompt, cfg.stop)
    if cfg.suffix is not None:  # the middle alone
        text = GrowingText(tokenizer.decode, [], [*cfg.stop, EOT])
    return _Sample(key, start + prompt, text, tokenizer.eot_id)


def _draw(cfg: GenerateConfig, model: GPT, samples: list[_Sample]) -> None:
    """Continue the samples: all at once, or one after the other as they are printed."""
    from trainer.inference.requests import Sampling
    from trainer.inference.sampler import sample

    def follow(index: int, new: list[int]) -> bool:
        text = batch[index].text
        stopped = text.update(new)
        if cfg.stream:
            print(text.certain(), end="", flush=True)
        return stopped

    for batch in [[one] for one in samples] if cfg.stream else [samples]:
        new = sample(
            model,
            [s.ids for s in batch],
            Sampling(cfg.temperature, cfg.top_k, cfg.top_p),
            max_new_tokens=cfg.max_new_tokens,
            seed=cfg.seed,
            keys=[s.key for s in batch],
            eot=batch[0].eot,
            stop=follow if cfg.stop or cfg.stream else None,
            slide=cfg.slide,
        )
        for s, ids in zip(batch, new, strict=True):
            s.ids = s.ids + ids
            s.text.update(ids)
        if cfg.stream:
            print(batch[0].text.rest(), end="\n" if batch[0] is samples[-1] else "\n---\n", flush=True)


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
    texts = [text for text in (cfg.prompt, cfg.suffix) if text is not None]
    lines = texts if texts else _lines(str(cfg.prompt_file))
    for i, line in enumerate(lines):
        if not cfg.special_tokens and (found := tokenizer.special_in(line)):
            _note(f"prompt {i} holds {', '.join(found)}, taken as letters: special_tokens=true takes the token")
    ids = [tokenizer.encode(line, special=cfg.special_tokens) for line in lines]
    return ids if cfg.suffix is None else [_between(cfg, tokenizer, *ids)]


def _between(cfg: GenerateConfig, tokenizer: Tokenizer, before: list[int], after: list[int]) -> list[int]:
    """The ids that ask for what stands between two texts. Raises UserError if the vocabulary has no tokens for it."""
    if lacks := [token for token in (*INFILL, EOT) if token not in tokenizer.special_ids]:
        raise UserError(
            f"suffix={cfg.suffix}: checkpoint={cfg.checkpoint} knows no {', '.join(lacks)}, by which a middle is asked "
            "for: give one that was trained with data.fim_rate (pretrain) or fim_rate (sft), or no suffix"
        )
    prefix, suffix, middle, end = (tokenizer.special_ids[token] for token in (*INFILL, EOT))
    return [end, prefix, *before, suffix, *after, middle]


def _lines(file: str) -> list[str]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise of_nature(e, f"prompt_file={file}: {e}") from None
    return text.removesuffix("\n").split("\n") if text else []


def _check(prompts: list[list[int]], cfg: GenerateConfig, model: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Raises UserError for what no model continues, and tells of texts that grow beyond n_ctx."""
    if not prompts:
        raise UserError("no prompt: prompt_ids is an empty list, or prompt_file an empty file: give at least one")
    if cfg.slide > model.n_ctx:
        raise UserError(f"slide={cfg.slide}: give at most the model's n_ctx={model.n_ctx}")
    for i, ids in enumerate(prompts):
        if not ids and (tokenizer is None or tokenizer.eot_id is None):
            raise UserError(
                f"prompt {i} is empty, but checkpoint={cfg.checkpoint} has no end-of-text token to start a text with: "
                "give a prompt of at least one token"
            )
        bad = next((t for t in ids if not 0 <= t < model.vocab_size), None)
        if bad is not None:
            raise UserError(f"prompt {i} holds token id {bad}: the model's ids go from 0 to {model.vocab_size - 1}")
    longest = max(max(1, len(ids)) for ids in prompts) + cfg.max_new_tokens
    if longest > model.n_ctx + 1:
        seen = f"{model.n_ctx - cfg.slide + 1} to {model.n_ctx}" if cfg.slide > 1 else str(model.n_ctx)
        _note(
            f"a text of up to {longest} tokens is longer than n_ctx={model.n_ctx}: its later tokens see the last "
            f"{seen} alone, through a sliding window"
        )


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(GenerateConfig, generate)
