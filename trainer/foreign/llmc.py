"""llm.c's checkpoints of GPT-2, `.bin`: a header of 256 numbers, then the weights with nothing between them.

Parameters come name by name, each for all layers, linears as [out, in]. The embedding has more rows than the
vocabulary, up to a multiple of 128; llm.c computes nothing with them, so they stay behind.
"""

from __future__ import annotations

import struct
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import UserError, of_nature
from data_pipeline.files import open_regular
from trainer.config.model import ModelConfig
from trainer.hf.settings import LIMITS, size

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.tokenizer.tokenizer import Tokenizer

MAGIC = 20240326
HEADER = struct.Struct("<256i")
BYTES = {3: 4, 5: 2}  # of a number in each version: fp32, bf16
KEYS = ("max_seq_len", "vocab_size", "num_layers", "num_heads", "channels", "padded_vocab_size")  # from the third on


class LlmcFile:
    """A checkpoint of llm.c's GPT-2: `cfg` is its model.

    Raises:
        UserError: damaged, another version, or a size that our GPT does not have.
    """

    kind = "llm.c's .bin"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path, "give llm.c's file") as f:
                header, self._size = f.read(HEADER.size), f.seek(0, 2)
        except OSError as e:
            raise of_nature(e, f"{path}: {(e.strerror or str(e)).lower()}: give llm.c's file") from None
        if len(header) < HEADER.size:
            raise UserError(
                f"{path}: {len(header)} bytes, less than llm.c's header of {HEADER.size}: download it again"
            )
        magic, self._version, *numbers = HEADER.unpack(header)
        if magic != MAGIC:
            raise UserError(
                f"{path}: its first number is {magic}, that of llm.c's GPT-2 is {MAGIC}: give its model file"
            )
        if self._version not in BYTES:
            raise UserError(f"{path}: version {self._version} of llm.c's file: 3 (fp32) and 5 (bf16) are read")
        given = dict(zip(KEYS, numbers, strict=False))
        try:
            self._rows = size(given, "padded_vocab_size", LIMITS["vocab_size"])
            self.cfg = ModelConfig(
                name=path.stem,
                n_layer=size(given, "num_layers", LIMITS["n_layer"]),
                n_head=size(given, "num_heads", LIMITS["n_head"]),
                n_embd=size(given, "channels", LIMITS["n_embd"]),
                n_ctx=size(given, "max_seq_len", LIMITS["n_positions"]),
                vocab_size=size(given, "vocab_size", self._rows),
            )
        except UserError as e:
            raise UserError(f"{path}: its header: {e}") from None

    def weights(self) -> dict[str, Tensor]:
        """Our parameters in fp32.

        Raises:
            UserError: the file has not the size that its header says, or a number that is not finite.
        """
        import torch

        from trainer.hf.weights import from_linears, to_fp32
        from trainer.model.specs import specs

        shapes = {name: spec.shape for name, spec in specs(self.cfg, 1).items()}
        shapes["wte.weight"] = (self._rows, self.cfg.n_embd)
        wanted = HEADER.size + BYTES[self._version] * sum(map(prod, shapes.values()))
        if self._size != wanted:
            raise UserError(
                f"{self.path}: {self._size:,} bytes, its header says {wanted:,}: damaged or cut: download it again"
            )
        mapped = torch.from_file(str(self.path), shared=False, size=self._size, dtype=torch.uint8)[HEADER.size :]
        flat = mapped.view(torch.float32 if self._version == 3 else torch.bfloat16)
        order = _order(list(shapes), self.cfg.n_layer)
        parts = flat.split([prod(shapes[name]) for name in order])
        state = {name: part.view(shapes[name]) for name, part in zip(order, parts, strict=True)}
        state["wte.weight"] = state["wte.weight"][: self.cfg.vocab_size]
        ours = from_linears(state, self.cfg, str(self.path))
        return {name: to_fp32(x, f"{self.path}: {name}") for name, x in ours.items()}

    def tokenizer(self) -> Tokenizer | None:
        return None

    def notes(self) -> list[str]:
        lines = ["the numbers of bfloat16 are converted to float32"] if self._version == 5 else []
        spare = self._rows - self.cfg.vocab_size
        return [*lines, f"{spare} rows of padding of its embedding stay behind"] if spare else lines


def _order(names: list[str], n_layer: int) -> list[str]:
    """llm.c's order of our names: a block's parameters one after the other, each for all layers."""
    block = [name.removeprefix("h.0.") for name in names if name.startswith("h.0.")]
    return [*names[:2], *(f"h.{layer}.{name}" for name in block for layer in range(n_layer)), *names[-2:]]
