"""Models of transformers' own with weights like a trained one's, and the folders it writes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from trainer.config.model import Norm

SIZE = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 64, "vocab_size": 1000}
# model=test, but for a vocabulary that is padded
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")


def hf_model(norm: Norm, **changes: Any) -> GPT2LMHeadModel | OpenAIGPTLMHeadModel:
    """In eval mode; biases and gains are away from where they start, so that none may be dropped or mixed up."""
    values = {**SIZE, **dict.fromkeys(DROPOUTS, 0.0), "bos_token_id": None, "eos_token_id": None, **changes}
    model = (
        GPT2LMHeadModel(GPT2Config(**values)) if norm is Norm.pre else OpenAIGPTLMHeadModel(OpenAIGPTConfig(**values))
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = ".ln_" in name and name.endswith("weight")
            p.copy_(torch.randn_like(p) * 0.1 + (1.0 if gain else 0.0))
    return model.eval()


def save(model: Any, folder: Path, **how: Any) -> Path:
    model.save_pretrained(folder, **how)
    return folder
