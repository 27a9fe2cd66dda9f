"""Numbers that follow from a model's shape. Standard library only."""

from __future__ import annotations

from trainer.config.attention import DENSE
from trainer.config.model import ModelConfig, Norm

REDUCE_BUCKET = 500_000_000  # elements: of ZeRO-2 and 3, which allocate them, so never more than the model has
LOSS_CHUNK_BYTES = 1 << 26  # of fp32 logits at a time, where no compiler keeps them in registers
FLEX_BLOCK = 128  # FlexAttention: queries and keys that are skipped together, or not
FLEX_HEAD_DIM = 16  # the smallest that its kernels take
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


def flex_attention(T: int, S: int, head_dim: int, dropout: float) -> bool:
    """True if a GPU computes masked attention of T queries over S keys by FlexAttention: there are blocks to skip."""
    return T == S > FLEX_BLOCK and head_dim >= FLEX_HEAD_DIM and dropout == 0.0


def attention_layers(model: ModelConfig) -> float:
    """The number of dense layers that see as many pairs of a full context as this model's: n_layer if all are dense."""
    dense = DENSE.visible_pairs(model.n_ctx)
    return sum(model.pattern(model.kind(i)).visible_pairs(model.n_ctx) / dense for i in range(model.n_layer))


def flops_per_token(model: ModelConfig) -> float:
    """Training FLOPs a token, both passes: 6 N + 12 L C T, N without position embeddings (PaLM, appendix B).

    PaLM counts a dense layer's whole square, future included. A sparse layer counts for its share of what a dense one
    sees, so that the same kernel efficiency gives the same MFU: L is `attention_layers`.
    """
    n = param_count(model) - model.n_ctx * model.n_embd
    return 6.0 * n + 12.0 * attention_layers(model) * model.n_embd * model.n_ctx
