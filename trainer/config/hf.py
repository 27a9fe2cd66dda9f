"""Settings of the conversion of weights from other programs, and to Hugging Face. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import MISSING


@dataclass
class ImportHfConfig:
    """`python -m trainer.import_hf`: a GPT of another program to a checkpoint."""

    source: str = MISSING  # a folder of Hugging Face's, nanoGPT's ckpt.pt or the folder that holds it, or llm.c's .bin
    out: str = MISSING  # the checkpoint's folder, which is not there yet
    tokenizer: str | None = None  # if the source has none: gpt2, a tokenizer.json, or a folder with a vocabulary


@dataclass
class ExportHfConfig:
    """`python -m trainer.export_hf`: a checkpoint to a folder that transformers opens."""

    checkpoint: str = MISSING  # a run folder (its latest), or one checkpoint
    out: str = MISSING  # a folder which is not there yet
    compare: bool = True  # with transformers' model, opened from the written folder; false needs no transformers
