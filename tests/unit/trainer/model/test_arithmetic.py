"""Parameter counts against the published ones and against a sum over the tensors; padding and FLOPs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from trainer.config.model import ModelConfig, Norm
from trainer.model.arithmetic import attention_layers, flops_per_token, padded_n_head, padded_vocab_size, param_count


def model(n_layer: int, n_head: int, n_embd: int, n_ctx: int, vocab_size: int, norm: Norm = Norm.pre) -> ModelConfig:
    return ModelConfig("m", n_layer, n_head, n_embd, n_ctx, vocab_size, norm)


PUBLISHED = {
    "gpt2": (model(12, 12, 768, 1024, 50257), 124_439_808),
    "gpt2-medium": (model(24, 16, 1024, 1024, 50257), 354_823_168),
    "gpt2-large": (model(36, 20, 1280, 1024, 50257), 774_030_080),
    "gpt2-xl": (model(48, 25, 1600, 1024, 50257), 1_557_611_200),
    "gpt3-small": (model(12, 12, 768, 2048, 50257), 125_226_240),
    "gpt3-medium": (model(24, 16, 1024, 2048, 50257), 355_871_744),
    "gpt3-large": (model(24, 16, 1536, 2048, 50257), 760_300_032),
    "gpt3-xl": (model(24, 16, 2048, 2048, 50257), 1_315_723_264),
    "gpt1": (model(12, 12, 768, 512, 40478, Norm.post), 116_534_784),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    cfg, count = PUBLISHED[name]
    assert param_count(cfg) == count


def matrices(cfg: ModelConfig) -> list[tuple[int, ...]]:
    """The shape of every tensor of a GPT, written out; the head shares wte."""
    c = cfg.n_embd
    linear = [[(3 * c, c), (3 * c,)], [(c, c), (c,)], [(4 * c, c), (4 * c,)], [(c, 4 * c), (c,)]]
    block = [(c,), (c,), (c,), (c,), *(shape for pair in linear for shape in pair)]  # two LayerNorms, four linears
    ln_f = [(c,), (c,)] if cfg.norm is Norm.pre else []
    return [(cfg.vocab_size, c), (cfg.n_ctx, c), *(block * cfg.n_layer), *ln_f]


@pytest.mark.parametrize("norm", Norm)
def test_parameter_count_is_the_sum_over_the_tensors(norm: Norm) -> None:
    cfg = model(3, 4, 48, 40, 999, norm)
    assert param_count(cfg) == sum(math.prod(shape) for shape in matrices(cfg))


def test_flops_are_three_forwards_of_matrices_and_attention() -> None:
    cfg = model(3, 4, 48, 40, 999)
    per_token = 2 * sum(math.prod(s) for s in matrices(cfg) if s != (cfg.n_ctx, cfg.n_embd))  # a multiply and an add
    per_token += cfg.n_layer * 2 * (2 * cfg.n_ctx * cfg.n_embd)  # scores and their weighted sum, over the full context
    assert flops_per_token(cfg) == 3 * per_token  # backward costs two forwards


def test_sparse_layers_count_for_their_share_of_pairs() -> None:
    """The pairs of tokens that they see, of those that a dense layer sees."""
    dense = model(4, 4, 48, 40, 999)
    cfg = replace(dense, attention="DB", band=8)
    pairs = sum(min(i + 1, 8) for i in range(40))
    attention = 12 * 48 * 40  # of a dense layer
    assert flops_per_token(dense) - flops_per_token(cfg) == pytest.approx(2 * attention * (1 - pairs / (40 * 41 / 2)))
    assert flops_per_token(replace(cfg, band=40)) == flops_per_token(dense)
    assert attention_layers(dense) == 4 and attention_layers(replace(cfg, attention="B")) == pytest.approx(pairs / 205)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
def test_padding_is_the_least_that_gives_every_rank_the_same(tp: int) -> None:
    for n in range(1, 200):
        assert padded_n_head(n, tp) == min(m for m in range(n, n + tp) if m % tp == 0)
    for n in (1, 64, 65, 1024, 40478, 50257):
        assert padded_vocab_size(n, tp) == min(m for m in range(n, n + 64 * tp) if m % (64 * tp) == 0)
