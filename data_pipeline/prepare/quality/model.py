"""GPT-3's quality model: logistic regression on hashed words, and the Pareto rule (Brown et al. 2020, appendix A).

A document of score s stays if a draw of numpy's `pareto(alpha)` is above 1 - s, so with probability (2 - s)^-alpha:
at alpha = 9 each with score 1, 42% at 0.9, 0.2% at 0. The draw is a function of the seed and the document's id alone.

A model is one .safetensors file: `coefficients` [n_features] and `bias` [1], float32, and a JSON of its training.
Scores are those of balanced classes: documents as often of one kind as of the other. sklearn is used here alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import UserError, of_nature
from data_pipeline.prepare.quality.features import Features, features
from data_pipeline.prepare.recipe_config import QualityConfig

FORMAT = 1
DIGITS = 6  # of a score; the rule is applied to what is written down
MAX_BYTES = 1 << 30  # of a model file
_CURE = "give a model that `python -m data_pipeline.quality train` made"


def keeps(cfg: QualityConfig, name: str, score: float) -> bool:
    """True if the document with the id `name` stays.

    The inverse of the Lomax distribution's CDF makes the draw (1 - u)^(-1/alpha) - 1 of its random number u; both
    sides of draw > 1 - score are compared by their logarithms, which cannot overflow.
    """
    return -math.log1p(-uniform(name, cfg.seed, "pareto")) > cfg.alpha * math.log1p(1 - score)


def uniform(name: str, seed: int, purpose: str) -> float:
    """A pseudo-random number in (0, 1), a function of these three."""
    digest = blake2b(f"{purpose} {seed} {name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return ((int.from_bytes(digest, "little") >> 11) + 0.5) * 2.0**-53


@dataclass(frozen=True)
class Model:
    """`about` describes the training: its values, documents, versions, AUC on held-out documents."""

    coefficients: np.ndarray  # [n_features] float32
    bias: float
    about: dict[str, Any]

    def score(self, texts: Sequence[str]) -> list[float]:
        """The probability that each text is good, in 0..1; it does not depend on the other texts."""
        return self.score_rows(features(texts, len(self.coefficients)))

    def score_rows(self, rows: Features) -> list[float]:
        n = len(rows.ends) - 1
        of = np.repeat(np.arange(n), np.diff(rows.ends))
        sums = np.bincount(of, self.coefficients[rows.indices] * rows.values.astype(np.float64), n)
        return [round(0.5 * (1 + math.tanh(0.5 * (logit + self.bias))), DIGITS) for logit in sums.tolist()]

    def to_bytes(self) -> bytes:
        """The file: the same bytes for the same model."""
        from safetensors.numpy import save

        tensors = {"bias": np.array([self.bias], np.float32), "coefficients": self.coefficients}
        about = json.dumps({"format": FORMAT, **self.about}, sort_keys=True)
        return save(tensors, {"quality": about})  # one key: of several safetensors would choose the order by chance

    @classmethod
    def load(cls, path: Path) -> Model:
        """The model at `path`; raises UserError if there is none."""
        from safetensors import SafetensorError, safe_open

        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"{path.stat().st_size} bytes, at most {MAX_BYTES} are read")
            with safe_open(path, framework="np") as file:
                about = json.loads((file.metadata() or {})["quality"])
                if about.pop("format") != FORMAT:
                    raise ValueError(f"not of format {FORMAT}")
                tensors = {name: file.get_tensor(name) for name in ("coefficients", "bias")}
        except OSError as e:
            raise of_nature(e, f"{path}: {e.strerror or e}: {_CURE}") from None
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise UserError(f"{path}: no quality model, or a damaged one ({e!r}): {_CURE}") from None
        coefficients, bias = tensors["coefficients"], tensors["bias"]
        shapes = f"coefficients {coefficients.dtype} {coefficients.shape}, bias {bias.dtype} {bias.shape}"
        if {coefficients.dtype, bias.dtype} != {np.dtype(np.float32)} or coefficients.ndim != 1 or bias.shape != (1,):
            raise UserError(f"{path}: {shapes}: not float32 [n] and [1]: {_CURE}")
        if not len(coefficients) or not np.isfinite(coefficients).all() or not np.isfinite(bias[0]):
            raise UserError(f"{path}: {shapes}: none, or one that is no finite number: {_CURE}")
        return cls(coefficients, float(bias[0]), about)


def fit(rows: Features, good: np.ndarray, n_features: int, inverse_penalty: float, seed: int) -> Model:
    """Logistic regression with an L2 penalty, both classes given the same weight; `good` [documents] bool."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    matrix = csr_matrix((rows.values, rows.indices, rows.ends), shape=(len(good), n_features))
    learner = LogisticRegression(
        C=inverse_penalty, class_weight="balanced", solver="lbfgs", max_iter=1000, random_state=seed
    )
    with threadpool_limits(1):  # sums in one order, whatever the cores
        learner.fit(matrix, good)
    return Model(learner.coef_[0].astype(np.float32), float(np.float32(learner.intercept_[0])), {})


def auc(good: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a good document scores above a raw one; `good` and `scores` are [n]."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(good, scores))


def roc(good: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates [points]."""
    from sklearn.metrics import roc_curve

    false, true, _ = roc_curve(good, scores)
    return false, true


def held_out(name: str, fraction: float, seed: int) -> bool:
    """True if models are not trained on the document with the id `name`."""
    return uniform(name, seed, "held out") < fraction
