"""Settings of the conversion from and to Hugging Face. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import MISSING


@dataclass
class ImportHfConfig:
    """`python -m trainer.import_hf`: a folder of Hugging Face's GPT-2 or OpenAI GPT to a checkpoint."""

    source: str = MISSING  # holds config.json, model.safetensors (or its parts and their index), perhaps tokenizer.json
    out: str = MISSING  # the checkpoint's folder, which is not there yet


@dataclass
class ExportHfConfig:
    """`python -m trainer.export_hf`: a checkpoint to a folder that transformers opens."""

    checkpoint: str = MISSING  # a run folder (its latest), or one checkpoint
    out: str = MISSING  # a folder which is not there yet
    compare: bool = True  # with transformers' model, opened from the written folder; false needs no transformers
