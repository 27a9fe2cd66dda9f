"""nanoGPT's `ckpt.pt`: its model and weights; its optimizer stays behind.

nanoGPT has Hugging Face's names for GPT-2, but linears as [out, in], and GELU by the error function. Without biases
(bias=False) it computes what ours does with biases of zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from trainer.config.model import Gelu, ModelConfig
from trainer.foreign.torch_file import load
from trainer.hf.settings import LIMITS, MASKS, PREFIX, real, show, size

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.tokenizer.tokenizer import Tokenizer

FILE = "ckpt.pt"
ARGS = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias", "dropout"}
WRAPPERS = ("_orig_mod.", "module.")  # torch.compile's and DistributedDataParallel's
HEAD = "lm_head.weight"


class NanoGptFile:
    """A checkpoint of nanoGPT: `cfg` is its model.

    Raises:
        UserError: damaged, not nanoGPT's, or a model that is not ours.
    """

    kind = "nanoGPT's ckpt.pt"

    def __init__(self, path: Path) -> None:
        self.path = path
        body = load(path)
        state, args = (body.get(key) if isinstance(body, dict) else None for key in ("model", "model_args"))
        if not isinstance(state, dict) or not isinstance(args, dict):
            raise UserError(
                f"{path} holds no `model` and `model_args`, as {self.kind} does: if it is of transformers, save it as "
                "safetensors with save_pretrained(DIR), and give DIR"
            )
        self._state = state
        self._step = body.get("iter_num")
        try:
            self.cfg = model_of_args(args, path.resolve().parent.name or "nanogpt")
        except UserError as e:
            raise UserError(f"{path}: model_args: {e}") from None
        self._bias: bool = args["bias"]

    def weights(self) -> dict[str, Tensor]:
        """Our parameters in fp32.

        Raises:
            UserError: a parameter that is missing, of another shape or type, unknown, or not finite.
        """
        import torch

        from trainer.hf.weights import from_linears, to_fp32
        from trainer.model.specs import specs

        state = self._checked_state()
        zero = torch.zeros(())
        if not self._bias:
            biases = {name: spec.shape for name, spec in specs(self.cfg, 1).items() if name.endswith(".bias")}
            if unwanted := sorted(biases.keys() & state.keys()):
                raise UserError(f"{self.path}: model_args has bias=false, but {unwanted[0]} is there: damaged")
            state |= {name: zero.expand(shape) for name, shape in biases.items()}
        ours = from_linears(state, self.cfg, str(self.path))
        return {name: to_fp32(x, f"{self.path}: {name}") for name, x in ours.items()}

    def tokenizer(self) -> Tokenizer | None:
        return None

    def notes(self) -> list[str]:
        step = f" of its step {self._step}" if type(self._step) is int else ""
        lines = [
            f"the weights{step} alone: its optimizer stays behind",
            "GELU by the error function, as in nanoGPT's model.py; its first versions had the tanh form, which their "
            "files do not tell",
        ]
        return lines if self._bias else [*lines, "bias=false: biases of zero, which training would change"]

    def _checked_state(self) -> dict[str, Tensor]:
        """The parameters by their bare names, each no larger than its bytes in the file."""
        import torch

        out: dict[str, Tensor] = {}
        for name, x in self._state.items():
            if not isinstance(name, str) or not isinstance(x, torch.Tensor):
                raise UserError(f"{self.path}: {show(name)} of `model` is no tensor with a name: damaged")
            if name.endswith(MASKS[:1]):  # of its slow attention
                continue
            while name.startswith(WRAPPERS):
                name = name.split(".", 1)[1]
            name = name.removeprefix(PREFIX)
            if name in out:
                raise UserError(f"{self.path}: {show(name)} is there twice: damaged")
            if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise UserError(f"{self.path}: {show(name)} is {x.dtype}: save it as float32, float16 or bfloat16")
            if x.numel() * x.element_size() > x.untyped_storage().nbytes():
                raise UserError(f"{self.path}: {show(name)} is larger than its bytes in the file: damaged")
            out[name] = x
        head = out.pop(HEAD, None)
        if sum(x.numel() * x.element_size() for x in out.values()) > self.path.stat().st_size:
            raise UserError(f"{self.path}: its tensors are larger than the file: damaged")
        if head is not None and not ("wte.weight" in out and torch.equal(head, out["wte.weight"])):
            raise UserError(f"{self.path}: {HEAD} is not the token embedding, and our GPT ties the two")
        return out


def model_of_args(args: Mapping[str, Any], name: str) -> ModelConfig:
    """The model `name` of nanoGPT's model_args.

    Raises:
        UserError: a key that is missing or not nanoGPT's own, or a value that our GPT does not have.
    """
    if unknown := [key for key in args if key not in ARGS]:
        raise UserError(f"{show(unknown[0])} is no setting of nanoGPT's own model, and may change what it computes")
    if not isinstance(args.get("bias"), bool):
        raise UserError(f"bias={show(args.get('bias'))}: give true or false")
    return ModelConfig(
        name=name,
        n_layer=size(args, "n_layer"),
        n_head=size(args, "n_head"),
        n_embd=size(args, "n_embd"),
        n_ctx=size(args, "block_size", LIMITS["n_positions"]),
        vocab_size=size(args, "vocab_size"),
        gelu=Gelu.exact,
        dropout=real(args, "dropout", 0.0),
    )
