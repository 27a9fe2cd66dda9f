"""Entry: `python -m trainer.export_hf checkpoint=RUN out=DIR`: a checkpoint to a folder that transformers opens.

`out` appears only if transformers opens the folder and gives the logits of our model, on CPU in fp32, and its tokens.
The one file that imports transformers.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from conf.schema import run
from data_pipeline.examples.examples_config import Template
from data_pipeline.examples.templates import end_token, jinja
from data_pipeline.manifest import TOKENIZER
from trainer.checkpoint.find import find_checkpoint, model_of
from trainer.config.hf import ExportHfConfig
from trainer.hf.folder import CONFIG, WEIGHTS, new_folder
from trainer.hf.settings import hf_refusal
from trainer.model.arithmetic import param_count
from trainer.run.folder import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.tokenizer.tokenizer import Tokenizer
    from trainer.config.model import ModelConfig

HEAD = "head.safetensors"
TOLERANCE = 1e-5  # of the largest logit
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and it's 7:30 on a Tuesday.",
    "def mean(xs: list[float]) -> float:\n    return sum(xs) / len(xs)\n",
    "Ἐν ἀρχῇ ἦν ὁ λόγος. 日本語の文 — naïve café, 3½ €",
)


def export_hf(cfg: ExportHfConfig) -> None:
    checkpoint = find_checkpoint(cfg.checkpoint)
    model = model_of(checkpoint, RunFolder.state(checkpoint))
    refusal = hf_refusal(model)
    if refusal is not None:
        raise UserError(f"{checkpoint}: {refusal}")
    if cfg.compare and not importlib.util.find_spec("transformers"):
        raise UserError(
            "compare=true needs transformers, which is not installed: pip install 'gradus[hf]', or give compare=false "
            "and compare on a machine that has it"
        )
    tokenizer = read_tokenizer(checkpoint)
    with new_folder(cfg.out) as staging:
        write(staging, checkpoint, model, tokenizer)
        done = compare(staging, checkpoint, model, tokenizer) if cfg.compare else "not compared (compare=false)"
    print(f"{cfg.out}: {model.name}, {param_count(model):,} parameters, from {checkpoint}\n  {done}")
    if (Path(cfg.out) / HEAD).is_file():
        print(f"  {HEAD}: head.weight and head.bias on the last hidden state; transformers does not read it")
    if tokenizer is None:
        print(f"  {checkpoint} has no {TOKENIZER}: none is written, and AutoTokenizer cannot be used")


def read_tokenizer(checkpoint: Path) -> Tokenizer | None:
    from data_pipeline.tokenizer.tokenizer import Tokenizer

    path = checkpoint / TOKENIZER
    return Tokenizer.load(path) if path.is_file() else None


def write(folder: Path, checkpoint: Path, cfg: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Write config.json, model.safetensors and, for a vocabulary, tokenizer.json and tokenizer_config.json.

    The head of a reward model or of a fine-tuned one, of which transformers' model knows nothing, is a file beside it.
    """
    from trainer.checkpoint.files import write_file, write_safetensors
    from trainer.checkpoint.load import assemble
    from trainer.hf.weights import hf_config, to_hf

    weights = dict(assemble(checkpoint))
    write_safetensors(folder / WEIGHTS, to_hf(weights, cfg))
    if head := {name: x for name, x in weights.items() if name.startswith("head.")}:
        write_safetensors(folder / HEAD, head)
    config = {**hf_config(cfg, tokenizer.eot_id if tokenizer else None), "dtype": "float32"}
    text = {CONFIG: config}
    if tokenizer is not None:
        own = tokenizer_config(cfg, tokenizer, template_of(checkpoint))
        config["eos_token_id"] = tokenizer.special_ids.get(own.get("eos_token", ""), config["eos_token_id"])
        write_file(folder / TOKENIZER, [tokenizer.raw])
        text["tokenizer_config.json"] = own
    for name, body in text.items():
        write_file(folder / name, [_json(body)])


def template_of(checkpoint: Path) -> Template | None:
    """The template of the conversations that a model was tuned on; None if it was not."""
    name = RunFolder.state(checkpoint).get("data", {}).get("template")
    return Template(name) if name in {template.value for template in Template} else None


def tokenizer_config(cfg: ModelConfig, tokenizer: Tokenizer, template: Template | None = None) -> dict[str, Any]:
    """Settings that make AutoTokenizer use tokenizer.json as it is: its class has no vocabulary of its own.

    With a template transformers renders conversations as they were in tuning, and stops where an answer ends.
    """
    special = {"eos_token": tokenizer.eot_id, "bos_token": tokenizer.eot_id, "unk_token": tokenizer.unk_id}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": cfg.n_ctx,
        "clean_up_tokenization_spaces": False,
        **{name: tokenizer.token(i) for name, i in special.items() if i is not None},
        **({"eos_token": end_token(template), "chat_template": jinja(template)} if template else {}),
    }


def compare(folder: Path, checkpoint: Path, cfg: ModelConfig, tokenizer: Tokenizer | None) -> str:
    """Compare logits and tokens with transformers'; returns a summary in words.

    Raises:
        UserError: logits that differ by more than TOLERANCE, or another tokenisation of TEXTS.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"  # both on CPU, in fp32: a GPU's kernels differ by more
    import torch

    seed = torch.seed()
    rows = [torch.randint(cfg.vocab_size, (1, cfg.n_ctx))]
    if tokenizer is not None:
        rows += [torch.tensor([ids[: cfg.n_ctx]]) for ids in _same_tokens(folder, tokenizer) if ids]
    ours, theirs = our_logits(checkpoint, cfg, rows), _their_logits(folder, rows)
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        worst = max(worst, float((mine - other).abs().max()) / float(other.abs().max()))
    text = sum(row.numel() for row in rows[1:])
    what = f"{cfg.n_ctx} random tokens (seed {seed}) and {text} of text"
    if not worst <= TOLERANCE:
        raise UserError(
            f"transformers' logits differ by {worst:.3g} of the largest, more than {TOLERANCE}, on {what}: nothing is "
            f"written; the cause is {checkpoint} or the versions of torch and transformers"
        )
    same = f"; AutoTokenizer gives the same tokens for {len(TEXTS)} texts" if tokenizer is not None else ""
    return f"transformers' logits differ by {worst:.2g} of the largest at most, on {what}{same}"


def _same_tokens(folder: Path, tokenizer: Tokenizer) -> list[list[int]]:
    from transformers import AutoTokenizer

    theirs, out = AutoTokenizer.from_pretrained(folder), []
    for text in TEXTS:
        ids = tokenizer.encode(text)
        their_ids = theirs(text, add_special_tokens=False)["input_ids"]
        if ids != their_ids:
            raise UserError(
                f"AutoTokenizer gives {len(their_ids)} tokens for {text!r} that are not our {len(ids)}: nothing is "
                f"written; transformers does not support all of the checkpoint's {TOKENIZER}"
            )
        out.append(ids)
    return out


def our_logits(checkpoint: Path, cfg: ModelConfig, rows: list[Tensor]) -> list[Tensor]:
    import torch

    from trainer.generate import load_model

    model = load_model(checkpoint, cfg)
    with torch.inference_mode():
        return [model.logits(row) for row in rows]


def _their_logits(folder: Path, rows: list[Tensor]) -> list[Tensor]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(row).logits for row in rows]


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, indent=2).encode()


if __name__ == "__main__":
    run(ExportHfConfig, export_hf)
