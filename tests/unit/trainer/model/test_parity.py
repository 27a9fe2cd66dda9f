"""Our GPT against Hugging Face's, in fp32 with random weights and biases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, OpenAIGPTConfig, OpenAIGPTLMHeadModel

from conf.errors import UserError
from data_pipeline.config import IGNORE
from trainer.config.model import ModelConfig, Norm
from trainer.distributed.mesh import Mesh
from trainer.hf.weights import from_hf, hf_config, hf_refusal, to_hf
from trainer.model.gpt import GPT
from trainer.model.specs import specs
from trainer.objective.language_model import lm_loss

SIZES = {
    "narrow": {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_ctx": 32, "vocab_size": 211},
    "wide": {"n_layer": 3, "n_head": 3, "n_embd": 96, "n_ctx": 48, "vocab_size": 320},
}
SPARSE = {
    "DB": {"band": 7},
    "SF": {"stride": 9, "summary": 2},
    "FBD": {"band": 1, "stride": 5, "summary": 5},
    "BS": {"band": 31, "stride": 6},
}


def config(size: str, norm: Norm) -> ModelConfig:
    return ModelConfig(name=size, norm=norm, **SIZES[size])


def theirs(cfg: ModelConfig) -> GPT2LMHeadModel | OpenAIGPTLMHeadModel:
    values = {k: v for k, v in hf_config(cfg).items() if k not in ("model_type", "architectures")}
    if cfg.norm is Norm.pre:
        return GPT2LMHeadModel(GPT2Config(**values))
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(**values))


def random_state(cfg: ModelConfig) -> dict[str, Tensor]:
    """Weights of a trained model's size; biases, gains and all, away from the values they start with."""
    return {
        name: torch.randn(spec.shape) * 0.3 / (spec.shape[-1] ** 0.25 if len(spec.shape) > 1 else 1.0)
        + (1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0)
        for name, spec in specs(cfg, tp=1).items()
    }


def assert_close(a: Tensor, b: Tensor, what: str) -> None:
    error, scale = (a - b).abs().max().item(), b.abs().max().item()
    assert error <= 1e-5 * scale, f"{what}: max|a-b| = {error:.3g} against max|b| = {scale:.3g}"


@pytest.mark.parametrize("norm", Norm, ids=lambda n: n.value)
@pytest.mark.parametrize("size", SIZES)
def test_logits_and_every_gradient_equal_hugging_face(size: str, norm: Norm, mesh: Mesh) -> None:
    assert_parity(config(size, norm), mesh)


@pytest.mark.parametrize("norm", Norm, ids=lambda n: n.value)
@pytest.mark.parametrize("attention", SPARSE)
def test_sparse_patterns_equal_hugging_face_under_masks(attention: str, norm: Norm, mesh: Mesh) -> None:
    """Hugging Face's model gets a mask for each layer."""
    assert_parity(replace(config("wide", norm), attention=attention, **SPARSE[attention]), mesh)


def looks(cfg: ModelConfig, kind: str, i: int, j: int) -> bool:
    """The papers' sets, word for word: does token i look at token j?"""
    if j > i:
        return False
    n, stride, summary = cfg.n_ctx, cfg.stride or 1, cfg.summary or 0
    if kind == "B":
        return j in range(i - (cfg.band or n) + 1, i + 1)
    if kind == "S":
        return j in range(i - stride + 1, i + 1) or j in range(i, -1, -stride)
    if kind == "F":
        return j // stride == i // stride or j % stride in range(stride - summary, stride)
    return True


def mask_each_layer(hf: GPT2LMHeadModel | OpenAIGPTLMHeadModel, cfg: ModelConfig) -> None:
    """Hand each of their layers the additive mask of its letter in place of their own."""
    for layer, block in enumerate(hf.transformer.h):
        sees = torch.tensor([[looks(cfg, cfg.kind(layer), i, j) for j in range(cfg.n_ctx)] for i in range(cfg.n_ctx)])
        bias = torch.zeros(1, 1, cfg.n_ctx, cfg.n_ctx).masked_fill(~sees, torch.finfo(torch.float32).min)
        block.attn.register_forward_pre_hook(
            lambda _m, args, kwargs, bias=bias: (args, {**kwargs, "attention_mask": bias}), with_kwargs=True
        )


def assert_parity(cfg: ModelConfig, mesh: Mesh) -> None:
    seed = torch.seed()  # fresh weights and tokens on every run
    ours, hf = GPT(cfg, mesh).eval(), theirs(cfg).eval()
    state, dense = random_state(cfg), replace(cfg, attention="D", band=None, stride=None, summary=None)
    if cfg != dense:
        mask_each_layer(hf, cfg)
    missing, unexpected = hf.load_state_dict(to_hf(state, dense), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected
    padding = GPT(cfg, mesh).state_dict()["wte.weight"].shape[0] - cfg.vocab_size
    ours.load_state_dict(state | {"wte.weight": F.pad(state["wte.weight"], (0, 0, 0, padding))})
    tokens, labels = torch.randint(cfg.vocab_size, (2, 3, cfg.n_ctx))
    labels[0, :5] = IGNORE

    with torch.no_grad():
        ours_logits = ours.logits(tokens)
    hf_logits = hf(input_ids=tokens).logits
    assert_close(ours_logits, hf_logits, f"logits, seed={seed}")

    loss = ours(lm_loss, tokens, labels)
    hf_loss = F.cross_entropy(hf_logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert_close(loss, hf_loss, f"loss, seed={seed}")
    loss.backward()
    hf_loss.backward()
    hf_grads = from_hf({n: p.grad for n, p in hf.named_parameters() if p.grad is not None}, dense)
    grads = {n: p.grad for n, p in ours.named_parameters()}
    assert grads["wte.weight"][cfg.vocab_size :].eq(0).all()
    grads["wte.weight"] = grads["wte.weight"][: cfg.vocab_size]
    assert grads.keys() == hf_grads.keys()
    for name, grad in grads.items():
        assert_close(grad, hf_grads[name], f"gradient of {name}, seed={seed}")


@pytest.mark.parametrize("norm", Norm, ids=lambda n: n.value)
def test_hugging_face_names_are_a_round_trip(norm: Norm) -> None:
    cfg = config("wide", norm)
    state = random_state(cfg)
    back = from_hf(to_hf(state, cfg), cfg)
    assert list(back) == list(state) and all(torch.equal(back[n], state[n]) for n in state)
    bare = {name.removeprefix("transformer."): x for name, x in to_hf(state, cfg).items()}
    assert all(torch.equal(x, state[n]) for n, x in from_hf(bare, cfg).items())


def test_a_hugging_face_state_that_does_not_fit_is_refused() -> None:
    cfg = config("narrow", Norm.pre)
    good = to_hf(random_state(cfg), cfg)
    qkv = "transformer.h.1.attn.c_attn.weight"
    with pytest.raises(UserError, match=r"has no h\.1\.attn\.c_attn\.weight"):
        from_hf({n: x for n, x in good.items() if n != qkv}, cfg)
    with pytest.raises(UserError, match=r"h\.1\.attn\.c_attn\.weight is \[192, 64\]"):
        from_hf(good | {qkv: good[qkv].t()}, cfg)
    with pytest.raises(UserError, match=r"has h\.2\.ln_1\.bias"):
        from_hf(good | {"transformer.h.2.ln_1.bias": torch.zeros(64)}, cfg)
    with pytest.raises(UserError, match=r"lm_head\.weight is not the token embedding"):
        from_hf(good | {"lm_head.weight": good["transformer.wte.weight"] + 1}, cfg)


@pytest.mark.parametrize("norm", Norm, ids=lambda n: n.value)
def test_attention_that_hugging_face_cannot_say_is_not_exported(norm: Norm) -> None:
    cfg = replace(config("narrow", norm), attention="DB", band=31)
    state = random_state(cfg)
    with pytest.raises(UserError, match=r"model=narrow has attention=DB, band=31 in n_ctx=32: .* dense") as caught:
        to_hf(state, cfg)
    assert str(caught.value) == hf_refusal(cfg) and "\n" not in str(caught.value)
    as_dense = replace(cfg, band=32)  # a band as wide as the context hides nothing
    assert hf_refusal(as_dense) is None and to_hf(state, as_dense).keys() == to_hf(state, config("narrow", norm)).keys()
