"""One random GPT-2 or OpenAI GPT twice: transformers' model, and ours with its weights on any layout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.helpers.hf_models import hf_model
from trainer.config.model import ModelConfig
from trainer.distributed.mesh import Mesh
from trainer.hf.weights import from_hf
from trainer.model.gpt import GPT
from trainer.model.specs import specs, to_local

CFG = ModelConfig(name="twin", n_layer=3, n_head=4, n_embd=64, n_ctx=64, vocab_size=500)


def theirs(cfg: ModelConfig, seed: int) -> Any:
    """transformers' model in eval mode, a pure function of the seed."""
    torch.manual_seed(seed)
    sizes = {key: getattr(cfg, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    return hf_model(cfg.norm, n_positions=cfg.n_ctx, **sizes)


def ours(cfg: ModelConfig, seed: int, mesh: Mesh, sequence_parallel: bool = False) -> GPT:
    """The same weights in our model, this rank's part of them."""
    model = GPT(cfg, mesh, sequence_parallel=sequence_parallel).to(mesh.device)
    layout = specs(cfg, mesh.tp)
    state = from_hf(theirs(cfg, seed).state_dict(), cfg)
    model.load_state_dict({n: to_local(x, layout[n], mesh.tp_rank, mesh.tp) for n, x in state.items()})
    return model


def greedy(hf: Any, prompt: list[int], n: int, eot: int | None = None) -> list[int]:
    """transformers' own greedy text, of one prompt alone."""
    ids = torch.tensor([prompt])
    out = hf.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, eos_token_id=eot, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


def log_p(hf: Any, context: list[int], continuation: list[int]) -> tuple[Tensor, Tensor]:
    """transformers' log-probability of each token of the continuation, and whether it is the likeliest, of one pair."""
    ids = torch.tensor([context + continuation])
    with torch.no_grad():
        every = hf(ids[:, :-1]).logits[0, len(context) - 1 :].log_softmax(-1)
    return every.gather(-1, ids[0, len(context) :, None])[:, 0], every.argmax(-1) == ids[0, len(context) :]


def random_texts(lengths: list[int], vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths]
