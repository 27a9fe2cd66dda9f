"""Entry: `python -m trainer.import_hf source=DIR out=CHECKPOINT`: Hugging Face's GPT-2 or OpenAI GPT as a checkpoint.

The checkpoint holds only weights: a run starts from it (`init_from=`) with a fresh optimizer, `trainer.generate`
samples from it. The files are checked before they are used; transformers is not needed.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import UserError
from conf.schema import run
from data_pipeline.manifest import TOKENIZER
from trainer.config.hf import ImportHfConfig
from trainer.hf.folder import HfFolder, new_folder
from trainer.model.arithmetic import param_count
from trainer.run.folder import STATE, WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.config.model import ModelConfig

LONG = {"F16": "float16", "BF16": "bfloat16"}


def import_hf(cfg: ImportHfConfig) -> None:
    folder = HfFolder(Path(cfg.source))
    tokenizer = folder.tokenizer()
    with new_folder(cfg.out) as staging:
        from trainer.hf.weights import from_hf  # from here on torch

        try:
            weights = from_hf(folder.tensors(), folder.cfg)
        except UserError as e:
            raise UserError(str(e) if str(folder.path) in str(e) else f"source={cfg.source}: {e}") from None
        write_checkpoint(staging, folder.cfg, weights, tokenizer.raw if tokenizer else None)
    model = folder.cfg
    print(f"{cfg.out}: {model.name}, {param_count(model):,} parameters, {model.norm.value}-norm, at step 0")
    for dtype, n in sorted(folder.converted.items()):
        print(f"  {n} tensors of {LONG[dtype]} are converted to float32")
    if folder.unused:
        print(f"  keys of its config.json that are not used: {', '.join(folder.unused)}")
    if tokenizer is None:
        print(f"  no {TOKENIZER} in {cfg.source}: generate needs prompt_ids, and a run's vocabulary cannot be checked")
    elif tokenizer.vocab_size < model.vocab_size:
        print(f"  {TOKENIZER} has {tokenizer.vocab_size} tokens, the model has rows for {model.vocab_size}")


def write_checkpoint(folder: Path, cfg: ModelConfig, weights: dict[str, Tensor], tokenizer: bytes | None) -> None:
    """A checkpoint of step 0 with these weights, in their true shapes, and no moments."""
    from trainer.checkpoint.files import MOMENTS, index_of, write_file, write_safetensors
    from trainer.checkpoint.verify import FORMAT, INDEX, MANIFEST
    from trainer.model.specs import specs, to_local

    names = {prefix: f"{prefix}-00000.safetensors" for prefix in (WEIGHTS, MOMENTS)}
    spec = specs(cfg, 1)
    flat = {f"master/{name}": to_local(x, spec[name], 0, 1).reshape(-1) for name, x in weights.items()}  # padded
    fragments = [[name, 0, flat[f"master/{name}"].numel()] for name in weights]
    index = index_of(spec, 1, [{"tp_rank": 0, **names, "fragments": fragments}])
    state = {
        "format": FORMAT,
        "step": 0,
        "tokens": 0,
        "optimizer_step": 0,
        "model": cfg.as_json(),
        "versions": {name: version(name) for name in ("torch", "safetensors")},
    }
    files = {names[WEIGHTS]: write_safetensors(folder / names[WEIGHTS], flat)}
    text = {INDEX: _json(index), STATE: _json(state)} | ({TOKENIZER: tokenizer} if tokenizer is not None else {})
    files |= {name: write_file(folder / name, [body]) for name, body in text.items()}
    write_file(folder / MANIFEST, [_json({"format": FORMAT, "files": dict(sorted(files.items()))})])


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False).encode()


if __name__ == "__main__":
    run(ImportHfConfig, import_hf)
