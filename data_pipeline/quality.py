"""Entry: train, evaluate. GPT-3's quality model, which a recipe's `quality` step applies (prepare/quality/).

    python -m data_pipeline.quality train positives=[books/documents,wiki/documents] negatives=[raw/documents] \
        output=model.safetensors
    python -m data_pipeline.quality evaluate classifier=model.safetensors positives=[...] negatives=[...] \
        output=evaluation
"""

from __future__ import annotations

from conf.schema import run_one_of
from data_pipeline.prepare.quality.config import QualityEvaluateConfig, QualityTrainConfig
from data_pipeline.prepare.quality.train import evaluate, train

if __name__ == "__main__":
    run_one_of({"train": (QualityTrainConfig, train), "evaluate": (QualityEvaluateConfig, evaluate)})
