"""Entry: `python -m trainer.import_hf source=PATH out=CHECKPOINT`: a GPT of another program as a checkpoint.

The source is a folder of Hugging Face's GPT-2 or OpenAI GPT, nanoGPT's ckpt.pt, or llm.c's .bin: by what is there. The
checkpoint holds only weights: a run starts from it (`init_from=`) with a fresh optimizer, `trainer.generate` samples
from it. The files are checked before they are used, nothing in them runs, and the other programs are not needed.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from conf.errors import UserError
from conf.schema import run
from data_pipeline.files import open_regular
from data_pipeline.manifest import TOKENIZER
from data_pipeline.tokenizer.tokenizer import Tokenizer
from trainer.config.hf import ImportHfConfig
from trainer.config.model import ModelConfig
from trainer.foreign import llmc, nanogpt
from trainer.hf.folder import CONFIG, HfFolder, new_folder
from trainer.model.arithmetic import param_count
from trainer.run.folder import STATE, WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

SOURCES = f"a folder with Hugging Face's {CONFIG} and model.safetensors, nanoGPT's {nanogpt.FILE}, or llm.c's .bin"


class Source(Protocol):
    """A model of another program. `notes`: lines for the user, once `weights` are read."""

    kind: str
    cfg: ModelConfig

    def weights(self) -> dict[str, Tensor]: ...

    def tokenizer(self) -> Tokenizer | None: ...

    def notes(self) -> list[str]: ...


def import_hf(cfg: ImportHfConfig) -> None:
    with new_folder(cfg.out) as staging:
        source = open_source(Path(cfg.source))
        tokenizer = _tokenizer(source, cfg)
        write_checkpoint(staging, source.cfg, source.weights(), tokenizer.raw if tokenizer else None)
    model = source.cfg
    print(f"{cfg.out}: {model.name}, {param_count(model):,} parameters, {model.norm.value}-norm, at step 0")
    print("\n".join(f"  {line}" for line in [f"from {source.kind}, {cfg.source}", *source.notes()]))
    if tokenizer is None:
        print(f"  no {TOKENIZER} in {cfg.source}: generate needs prompt_ids, and a run's vocabulary cannot be checked")
        print("  if you have its vocabulary, give tokenizer=")
    elif tokenizer.vocab_size < model.vocab_size:
        print(f"  {TOKENIZER} has {tokenizer.vocab_size} tokens, the model has rows for {model.vocab_size}")


def open_source(path: Path) -> Source:
    """The model at a path, of the kind that is there.

    Raises:
        UserError: none of the kinds, two of them, or a damaged one.
    """
    if path.is_dir():
        checkpoint = path / nanogpt.FILE
        if not checkpoint.is_file():
            return HfFolder(path)
        if (path / CONFIG).is_file():
            raise UserError(f"source={path} holds {CONFIG} and {nanogpt.FILE}: give source={checkpoint}, or remove it")
        return nanogpt.NanoGptFile(checkpoint)
    if not path.exists():
        raise UserError(f"source={path}: no such file or folder: give {SOURCES}")
    with open_regular(path, f"give {SOURCES}") as f:
        start = f.read(4)
    if start == b"PK\3\4":
        return nanogpt.NanoGptFile(path)
    if int.from_bytes(start, "little") == llmc.MAGIC:
        return llmc.LlmcFile(path)
    raise UserError(f"source={path}: neither a zip as nanoGPT's nor llm.c's first number: give {SOURCES}")


def _tokenizer(source: Source, cfg: ImportHfConfig) -> Tokenizer | None:
    """The source's own vocabulary, or the one that the user gives.

    Raises:
        UserError: both, or one with more tokens than the model.
    """
    own = source.tokenizer()
    if cfg.tokenizer is None:
        return own
    if own is not None:
        raise UserError(f"source={cfg.source} holds a {TOKENIZER}: leave tokenizer={cfg.tokenizer} out, or remove it")
    given, model = Tokenizer.load(cfg.tokenizer), source.cfg
    if given.vocab_size > model.vocab_size:
        raise UserError(
            f"tokenizer={cfg.tokenizer} has {given.vocab_size} tokens, the model of source={cfg.source} has "
            f"vocab_size={model.vocab_size}: give the model's own vocabulary, or none"
        )
    return given


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
