"""Parameter shapes, their split over tensor-parallel ranks, and the counts that papers print."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from tests.helpers.ranks import ROOT
from trainer.config.model import ModelConfig, Norm
from trainer.distributed.mesh import Mesh
from trainer.hf.weights import hf_config
from trainer.model.arithmetic import param_count
from trainer.model.gpt import GPT
from trainer.model.specs import ParamSpec, from_local, specs, to_local

COUNTS = {
    "gpt1": 116_534_784,
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
}


def named(name: str) -> ModelConfig:
    values = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml"))
    return ModelConfig(**{**values, "norm": Norm[values["norm"]]})


@pytest.mark.parametrize("name", COUNTS)
def test_named_sizes_have_exactly_their_parameter_count(name: str, mesh: Mesh) -> None:
    cfg = named(name)
    assert param_count(cfg) == COUNTS[name]
    assert sum(math.prod(s.shape) for s in specs(cfg, tp=1).values()) == COUNTS[name]
    with torch.device("meta"):
        model = GPT(cfg, mesh)
    pad = model.wte.weight.shape[0] - cfg.vocab_size
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name] + pad * cfg.n_embd


@pytest.mark.parametrize("name", COUNTS)
def test_named_sizes_count_as_hugging_face_counts(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the test extra is not installed")
    values = hf_config(named(name))
    kind = "GPT2" if values.pop("model_type") == "gpt2" else "OpenAIGPT"
    assert values.pop("architectures") == [f"{kind}LMHeadModel"]
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}LMHeadModel")(getattr(transformers, f"{kind}Config")(**values))
        model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


@pytest.mark.parametrize("name", ["test", "gpt1", "gpt2_xl"])
def test_specs_name_every_parameter_of_the_model_in_its_order(name: str, mesh: Mesh) -> None:
    cfg = named(name)
    with torch.device("meta"):
        model = GPT(cfg, mesh)
    padded = {n: s.padded for n, s in specs(cfg, tp=1).items()}
    assert [(n, tuple(p.shape)) for n, p in model.named_parameters()] == list(padded.items())
    assert list(model.state_dict()) == list(padded)  # nothing of megatron-core's own in it


def test_gpt2_xl_lies_on_two_ranks_with_one_head_of_padding() -> None:
    layout = specs(named("gpt2_xl"), tp=2)
    assert layout["h.47.attn.c_attn.weight"] == ParamSpec((3 * 1600, 1600), (3 * 26 * 64, 1600), 0)
    assert layout["h.47.attn.c_attn.bias"] == ParamSpec((3 * 1600,), (3 * 26 * 64,), 0)
    assert layout["h.47.attn.c_proj.weight"] == ParamSpec((1600, 1600), (1600, 26 * 64), 1)
    assert layout["wte.weight"] == ParamSpec((50257, 1600), (50304, 1600), 0)


@pytest.mark.parametrize("tp", [1, 2, 3, 4, 5, 7])
def test_every_split_goes_back_to_the_whole(tp: int) -> None:
    cfg = replace(named("test"), n_head=7, n_embd=56, vocab_size=130)
    for name, spec in specs(cfg, tp).items():
        if spec.tp_dim is not None and spec.padded[spec.tp_dim] % tp:
            assert name.startswith("h.") and ".mlp." in name and 4 * cfg.n_embd % tp  # refused by check_layout
            continue
        full = torch.randn(spec.shape)
        parts = [to_local(full, spec, rank, tp) for rank in range(tp)]
        assert all(p.is_contiguous() and p.shape == parts[0].shape for p in parts), name
        assert torch.equal(from_local(parts, spec), full), name
        if spec.tp_dim is not None:
            whole = torch.cat(parts, spec.tp_dim)
            assert whole.shape == spec.padded, name
            assert whole.count_nonzero() == full.count_nonzero(), name  # the rest is zeros


def test_heads_are_whole_on_their_rank_and_padding_is_zero() -> None:
    cfg = replace(named("test"), n_head=5, n_embd=20)
    layout = specs(cfg, tp=2)
    c_attn = torch.arange(5.0)[:, None, None, None].expand(5, 3, 4, 20).flatten(0, 2) + 1  # head h is all h + 1
    c_proj = (torch.arange(5.0)[:, None].expand(5, 4).flatten() + 1).expand(20, 20)
    for rank, heads in enumerate([[1, 2, 3], [4, 5, 0]]):
        rows = to_local(c_attn, layout["h.0.attn.c_attn.weight"], rank, 2).unflatten(0, (3, 12))
        columns = to_local(c_proj, layout["h.0.attn.c_proj.weight"], rank, 2).unflatten(1, (3, 4))
        for h, value in enumerate(heads):
            assert rows[h].eq(value).all() and columns[:, h].eq(value).all()
