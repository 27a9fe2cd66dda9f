"""Training and evaluation of the quality classifier."""

from __future__ import annotations

import heapq
import platform
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from conf.errors import UserError, of_nature
from data_pipeline.corpus.corpus_config import CorpusConfig, CorpusFormat
from data_pipeline.corpus.document import Document
from data_pipeline.corpus.inputs import files_at
from data_pipeline.corpus.read import items
from data_pipeline.corpus.report import Report
from data_pipeline.files import own_folder, publish, publish_json
from data_pipeline.prepare.quality.config import QualityEvaluateConfig, QualityTrainConfig
from data_pipeline.prepare.quality.features import features, stacked
from data_pipeline.prepare.quality.model import Model, auc, fit, held_out, keeps, roc, uniform
from data_pipeline.prepare.quality.plot import draw_roc, draw_scores
from data_pipeline.prepare.recipe_config import QualityConfig

BINS = 20  # of the score's histogram


T = TypeVar("T")


def train(cfg: QualityTrainConfig) -> None:
    path, counts = Path(cfg.output), {}
    names, rows, good = _both(cfg, lambda text: features([text], cfg.n_features), lambda name: True)
    out = np.array([held_out(name, cfg.held_out, cfg.seed) for name in names])
    for key, part in (("training", ~out), ("held_out", out)):
        counts[key] = {"positives": int((part & good).sum()), "negatives": int((part & ~good).sum())}
        if not all(counts[key].values()):
            raise UserError(
                f"held_out={cfg.held_out} of {len(names)} documents: {key} gets {counts[key]}, "
                f"it needs some of each: give more documents, or another held_out"
            )
    seen, unseen = (stacked([rows[i] for i in np.flatnonzero(part)]) for part in (~out, out))
    fitted = fit(seen, good[~out], cfg.n_features, cfg.inverse_penalty, cfg.seed)
    scores = np.array(fitted.score_rows(unseen))
    values = {key: getattr(cfg, key) for key in ("n_features", "held_out", "max_documents", "inverse_penalty", "seed")}
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("numpy", "scikit-learn")}}
    about = {"auc": round(auc(good[out], scores), 6), "documents": counts, "values": values, "versions": versions}
    _publish_model(path, Model(fitted.coefficients, fitted.bias, about))
    print(f"{path}: AUC {about['auc']:.4f} on {int(out.sum()):,} held-out documents, trained on {int((~out).sum()):,}")


def evaluate(cfg: QualityEvaluateConfig) -> None:
    model = Model.load(Path(cfg.classifier))
    split = _split_of(model, cfg)
    names, values, good = _both(
        cfg, lambda text: model.score([text])[0], lambda name: not cfg.held_out or held_out(name, *split)
    )
    scores = np.array(values)
    rule = QualityConfig(cfg.classifier, cfg.alpha, cfg.seed)
    kept = np.array([keeps(rule, name, score) for name, score in zip(names, values, strict=True)])
    edges = np.linspace(0, 1, BINS + 1)
    kinds = {"positives": good, "negatives": ~good}
    body: dict[str, Any] = {
        "model": model.about,
        "held_out": cfg.held_out,
        "auc": round(auc(good, scores), 6),
        "rule": {"alpha": cfg.alpha, "seed": cfg.seed},
        "edges": [round(edge, 6) for edge in edges.tolist()],
        **{kind: _summary(scores[part], kept[part], edges, cfg.alpha) for kind, part in kinds.items()},
        "all": _summary(scores, kept, edges, cfg.alpha),
    }
    folder = Path(cfg.output)
    try:
        own_folder(folder, "evaluation", "give another output=")
        publish(folder / "roc.png", draw_roc(*roc(good, scores), body["auc"]))
        positives, negatives = (np.array(body[kind]["histogram"]) for kind in kinds)
        publish(folder / "scores.png", draw_scores(edges, positives, negatives, cfg.alpha))
        publish_json(folder / "evaluation.json", body)
    except OSError as e:
        raise of_nature(e, f"output={cfg.output}: {e.strerror}: give a folder that can be written") from None
    for kind in kinds:
        mine = body[kind]
        print(f"{kind}: {mine['documents']:,} documents, kept {mine['kept']:.4f}, expected {mine['expected']:.4f}")
    print(f"{folder}: AUC {body['auc']:.4f}")


def _summary(scores: np.ndarray, kept: np.ndarray, edges: np.ndarray, alpha: float) -> dict[str, Any]:
    """Documents by score, and the shares of them that the rule keeps and is expected to keep, over all and by score."""
    expected = (2 - scores) ** -alpha
    bins = np.minimum(np.searchsorted(edges, scores, side="right"), len(edges) - 1) - 1
    documents, held, hoped = (np.bincount(bins, w, len(edges) - 1) for w in (np.ones_like(scores), kept, expected))
    return {
        "documents": len(scores),
        "kept": round(float(kept.mean()), 6),
        "expected": round(float(expected.mean()), 6),
        "histogram": documents.astype(int).tolist(),
        "kept_by_score": held.astype(int).tolist(),
        "expected_by_score": hoped.round(3).tolist(),
    }


def _both(
    cfg: QualityTrainConfig | QualityEvaluateConfig, make: Callable[[str], T], wanted: Callable[[str], bool]
) -> tuple[list[str], list[T], np.ndarray]:
    """Ids of the documents of both kinds, the values of `make` for their texts, and marks of the good ones, [n]."""
    names: list[str] = []
    made: list[T] = []
    counts = []
    for key in ("positives", "negatives"):
        chosen = lowest(_documents(getattr(cfg, key), key), cfg.max_documents, cfg.seed, make, wanted)
        if not chosen:
            raise UserError(f"{key}={getattr(cfg, key)}: none of the documents there is to be looked at: give more")
        names += [name for name, _ in chosen]
        made += [value for _, value in chosen]
        counts.append(len(chosen))
    return names, made, np.repeat([True, False], counts)


def lowest(
    documents: Iterator[Document], limit: int, seed: int, make: Callable[[str], T], wanted: Callable[[str], bool]
) -> list[tuple[str, T]]:
    """(id, value of `make`) of the `limit` wanted documents whose ids have the lowest hashes: a fair choice, the same
    for any order of the files; only the chosen ones are held."""

    heap: list[tuple[float, int, str, T]] = []  # the highest hash first; the second number orders equal ids
    for number, doc in enumerate(doc for doc in documents if wanted(doc.id)):
        rank = -uniform(doc.id, seed, "sample")
        if len(heap) < limit:
            heapq.heappush(heap, (rank, -number, doc.id, make(doc.text)))
        elif (rank, -number) > heap[0][:2]:
            heapq.heapreplace(heap, (rank, -number, doc.id, make(doc.text)))
    return [(name, value) for _, _, name, value in sorted(heap, key=lambda item: item[:2], reverse=True)]


def _documents(paths: Sequence[str], key: str) -> Iterator[Document]:
    """The documents of JSON lines; prints at the end what was dropped."""

    report = Report()
    for path in paths:
        corpus = CorpusConfig(name=key, format=CorpusFormat.jsonl, path=path)
        yield from report.kept(items(corpus, files_at(path, key)))
    if not report.given.documents:
        raise UserError(f"{key}={list(paths)}: no document there ({report.summary()}): give JSON lines with text")
    report.print()


def _split_of(model: Model, cfg: QualityEvaluateConfig) -> tuple[float, int]:
    """(share held out, seed of the hashes) of the training."""
    try:
        values = model.about["values"]
        return float(values["held_out"]), int(values["seed"])
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(
            f"classifier={cfg.classifier}: it does not say what it was trained on ({e!r}): train it again"
        ) from None


def _publish_model(path: Path, model: Model) -> None:
    data = model.to_bytes()
    try:
        if path.exists() and path.read_bytes() != data:
            raise UserError(
                f"{path} holds another model, which documents may have been scored with: give another output="
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        publish(path, data)
    except OSError as e:
        raise of_nature(e, f"output={path}: {e.strerror}: give the name of a file that can be written") from None
