"""The peer of `train_speed`: a GPT in plain PyTorch trained by nanoGPT's recipe, written anew from what it says.

One module compiled as a whole, scaled_dot_product_attention by FlashAttention-2 (or the kernel that is asked for),
fp32 weights under autocast to bf16,
TF32 for the rest, a vocabulary padded to a multiple of 64, gradients clipped to a norm of 1, fused AdamW, batches
copied from page-locked memory. No DeepSpeed, nothing of `trainer`.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class PlainBlock(nn.Module):
    def __init__(self, n_embd: int, n_head: int, kernel: SDPBackend, gelu: str) -> None:
        super().__init__()
        self.n_head, self.kernel, self.gelu = n_head, kernel, gelu
        self.ln_1, self.ln_2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.qkv, self.out = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.up, self.down = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)

    def forward(self, x_BTC: Tensor) -> Tensor:
        q, k, v = (z.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for z in self.qkv(self.ln_1(x_BTC)).chunk(3, -1))
        with sdpa_kernel(self.kernel) if x_BTC.is_cuda else nullcontext():
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.out(y.transpose(1, 2).flatten(2))
        return x_BTC + self.down(F.gelu(self.up(self.ln_2(x_BTC)), approximate=self.gelu))


class PlainGPT(nn.Module):
    """The mean loss of a batch."""

    def __init__(
        self,
        n_layer: int,
        n_head: int,
        n_embd: int,
        n_ctx: int,
        vocab_size: int,
        kernel: SDPBackend = SDPBackend.FLASH_ATTENTION,
        gelu: str = "none",
    ) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(-(-vocab_size // 64) * 64, n_embd), nn.Embedding(n_ctx, n_embd)
        self.blocks = nn.ModuleList(PlainBlock(n_embd, n_head, kernel, gelu) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        x_BTC = self.wte(tokens_BT) + self.wpe(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits_BTV = F.linear(self.ln_f(x_BTC), self.wte.weight)
        return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())


class PlainTrainer:
    """`step()` launches one update and returns its loss, not waited for."""

    def __init__(self, model: PlainGPT, device: torch.device, compiled: bool) -> None:
        self.device, self.parameters = device, list(model.parameters())
        decay = [p for p in self.parameters if p.ndim > 1]
        other = [p for p in self.parameters if p.ndim == 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), fused=True)
        self.model = torch.compile(model) if compiled else model
        torch.set_float32_matmul_precision("high")

    def step(self, tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
        tokens_BT, labels_BT = (x.to(self.device, non_blocking=True) for x in (tokens_BT, labels_BT))
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.model(tokens_BT, labels_BT)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return loss.detach()
