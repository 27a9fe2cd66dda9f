"""Numbers that follow from a model's shape. Standard library only."""

from __future__ import annotations

from trainer.config import ModelConfig, Norm

VOCAB_MULTIPLE = 64  # GEMMs want a vocabulary that is a multiple of 64: 50,257 -> 50,304


def param_count(model: ModelConfig) -> int:
    """Parameters, the tied head counted once: V C + T C + L (12 C² + 13 C), and 2 C for pre-norm's last LayerNorm."""
    c = model.n_embd
    blocks = model.n_layer * (12 * c * c + 13 * c)
    return (model.vocab_size + model.n_ctx) * c + blocks + (2 * c if model.norm is Norm.pre else 0)


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary as it lies on `tp` ranks: a multiple of 64 on each."""
    return -(-vocab_size // (VOCAB_MULTIPLE * tp)) * VOCAB_MULTIPLE * tp


def padded_n_head(n_head: int, tp: int) -> int:
    """The heads as they lie on `tp` ranks, the same number on each (GPT-2 XL's 25 become 26 at tp 2)."""
    return -(-n_head // tp) * tp


def flops_per_token(model: ModelConfig) -> float:
    """Training FLOPs a token, both passes: 6 N + 12 L C T, N without position embeddings (PaLM, appendix B)."""
    n = param_count(model) - model.n_ctx * model.n_embd
    return 6.0 * n + 12.0 * model.n_layer * model.n_embd * model.n_ctx
