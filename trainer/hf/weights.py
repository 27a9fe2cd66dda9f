"""Names and shapes of Hugging Face's GPT-2 (pre-norm) and OpenAI GPT (post-norm), there and back, without transformers.

They keep a linear as [in, out], and `c_attn` as [(q, k, v), head, D] where ours is [head, (q, k, v), D].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from conf.errors import UserError
from trainer.config.model import Gelu, ModelConfig, Norm
from trainer.hf.settings import MASKS, PREFIX, hf_refusal
from trainer.model.specs import specs

POST_NORM_NAMES = {"wte.weight": "tokens_embed.weight", "wpe.weight": "positions_embed.weight"}
HEAD = "lm_head.weight"


def to_hf(state: Mapping[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """Our parameters in their true shapes -> a GPT2LMHeadModel's or OpenAIGPTLMHeadModel's, the tied head left out.

    Parameters of other parts, such as a reward's head or a value trunk, have no place there and are left out.

    Raises:
        UserError: the model's attention is not dense, which these formats cannot express.
    """
    if refusal := hf_refusal(cfg):
        raise UserError(refusal)
    return {_hf_name(name, cfg): _to_hf(name, state[name], cfg).contiguous() for name in specs(cfg, tp=1)}


def from_hf(state: Mapping[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """Our parameters from those of Hugging Face's model, whose names may lack the prefix "transformer.".

    Raises:
        UserError: a parameter that is missing, of another shape, or unknown; a head that is not tied.
    """
    theirs = {name.removeprefix(PREFIX): x for name, x in state.items() if not name.endswith(MASKS)}
    head = theirs.pop(HEAD, None)
    out = _ours(theirs, cfg, "the Hugging Face state", inputs_first=True)
    if head is not None and not torch.equal(head, out["wte.weight"]):
        raise UserError(f"{HEAD} is not the token embedding in the Hugging Face state: model={cfg.name} ties the two")
    return out


def from_linears(state: Mapping[str, Tensor], cfg: ModelConfig, origin: str) -> dict[str, Tensor]:
    """Our parameters from those of a model of torch's linears, [out, in], under Hugging Face's names without prefix.

    Raises:
        UserError: a parameter that is missing, of another shape, or unknown in `origin`.
    """
    return _ours(dict(state), cfg, origin, inputs_first=False)


def to_fp32(x: Tensor, what: str) -> Tensor:
    """`x` in fp32.

    Raises:
        UserError: a value is not finite.
    """
    x = x.to(torch.float32)
    if not bool(torch.isfinite(x).all()):
        raise UserError(f"{what} holds values that are not finite: damaged")
    return x


def hf_config(cfg: ModelConfig, eot_id: int | None = None) -> dict[str, Any]:
    """The content of `config.json`; transformers' own `generate` stops at `eot_id`."""
    shared = {
        "vocab_size": cfg.vocab_size,
        "n_positions": cfg.n_ctx,
        "n_embd": cfg.n_embd,
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": cfg.dropout,
        "resid_pdrop": cfg.dropout,
        "layer_norm_epsilon": cfg.layer_norm_eps,
        "initializer_range": cfg.init_std,
        "tie_word_embeddings": True,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
    }
    if cfg.norm is Norm.post:  # its "gelu" is the tanh form
        return {"model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"], "afn": "gelu", **shared}
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu" if cfg.gelu is Gelu.exact else "gelu_new",
        "n_inner": 4 * cfg.n_embd,
        **shared,
    }


def _ours(theirs: dict[str, Tensor], cfg: ModelConfig, origin: str, inputs_first: bool) -> dict[str, Tensor]:
    out = {}
    for name, spec in specs(cfg, tp=1).items():
        key = _hf_name(name, cfg).removeprefix(PREFIX)
        if key not in theirs:
            raise UserError(f"{origin} has no {key}, which model={cfg.name} needs")
        x = theirs.pop(key)
        transposed = inputs_first and _is_linear(name)
        if x.shape != (spec.shape[::-1] if transposed else spec.shape):
            raise UserError(f"{key} is {list(x.shape)} in {origin}: not of model={cfg.name}")
        x = x.t() if transposed else x
        if "c_attn" in name:
            x = x.unflatten(0, (3, cfg.n_head, cfg.head_dim)).transpose(0, 1).flatten(0, 2)
        out[name] = x.contiguous()
    if theirs:
        more = f" and {len(theirs) - 3} more" if len(theirs) > 3 else ""
        raise UserError(f"{origin} has {', '.join(sorted(theirs)[:3])}{more}, which model={cfg.name} does not have")
    return out


def _hf_name(name: str, cfg: ModelConfig) -> str:
    return PREFIX + (POST_NORM_NAMES.get(name, name) if cfg.norm is Norm.post else name)


def _is_linear(name: str) -> bool:
    return name.startswith("h.") and ".ln_" not in name and name.endswith("weight")


def _to_hf(name: str, x: Tensor, cfg: ModelConfig) -> Tensor:
    if "c_attn" in name:
        x = x.unflatten(0, (cfg.n_head, 3, cfg.head_dim)).transpose(0, 1).flatten(0, 2)
    return x.t() if _is_linear(name) else x
