"""Heavy packages that a model alone does not load."""

from __future__ import annotations

import subprocess
import sys


def test_a_model_loads_neither_deepspeed_nor_megatron() -> None:
    """A forward, a backward and logits at tp = 1 work without a process group, DeepSpeed or megatron-core."""
    program = """
import sys, torch
import trainer.checkpoint.load
from trainer.config.model import ModelConfig
from trainer.distributed.mesh import single_rank_mesh
from trainer.distributed.world import World
from trainer.model.gpt import GPT
from trainer.model.init import initialise
from trainer.objective.language_model import lm_loss
cfg = ModelConfig(name="t", n_layer=1, n_head=2, n_embd=8, n_ctx=8, vocab_size=50)
model = GPT(cfg, single_rank_mesh(World(0, 1, 0)))
initialise(model, cfg, 1)
tokens = torch.arange(8)[None]
lm_loss(model, tokens, tokens).backward()
assert model.logits(tokens).shape == (1, 8, 50) and not torch.distributed.is_initialized()
print(sorted({"deepspeed", "megatron"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
