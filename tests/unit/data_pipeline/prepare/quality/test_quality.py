"""GPT-3's quality model: its features, its split and sample, its file, and the Pareto rule."""

from __future__ import annotations

import json
import random
import secrets
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, chi2, lomax
from sklearn.feature_extraction.text import HashingVectorizer

from conf.errors import UserError
from conf.schema import load
from data_pipeline.corpus.document import Document
from data_pipeline.prepare.quality import train as training
from data_pipeline.prepare.quality.config import QualityEvaluateConfig, QualityTrainConfig
from data_pipeline.prepare.quality.features import features, stacked
from data_pipeline.prepare.quality.filter import Quality
from data_pipeline.prepare.quality.model import Model, auc, held_out, keeps, uniform
from data_pipeline.prepare.recipe_config import QualityConfig
from data_pipeline.text import hashing
from tests.helpers.plain_words import plain_words, random_text
from tests.helpers.seeds import seeded


def test_features_are_the_counts_of_each_word_by_one_norm() -> None:
    seed = seeded()
    rng = random.Random(seed)
    size = 2**31 - 1  # 30 words: two of them fall together once in 5 million tries
    for n in (0, 1, 5, 200):
        text = random_text(rng, n)
        counts = Counter(word for word, _, _ in plain_words(text, bare=False))
        norm = sum(count**2 for count in counts.values()) ** 0.5
        right = {int(features([word], size).indices[0]): np.float32(count / norm) for word, count in counts.items()}
        _, indices, values = features([text], size)
        assert (indices.dtype, values.dtype) == (np.int32, np.float32)
        assert dict(zip(indices.tolist(), values, strict=True)) == right and (np.diff(indices) > 0).all(), (seed, text)


def test_features_and_score_do_not_depend_on_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A document's features and score do not depend on the documents beside it."""
    seed = seeded()
    rng = random.Random(seed)
    monkeypatch.setattr(hashing, "SIZE", 300)
    texts = [random_text(rng, rng.choice((0, 3, 40, 200))) for _ in range(50)]
    made = model(np.array([rng.gauss(0, 3) for _ in range(1000)]), 0.25)
    alone = [features([text], 1000) for text in texts]
    for together, right in zip(features(texts, 1000), stacked(alone), strict=True):
        assert np.array_equal(together, right), seed
    assert made.score(texts) == [score for text in texts for score in made.score([text])], seed


def test_cosines_are_those_of_sklearns_hashing() -> None:
    """The cosines of all pairs: another hash, the same words and counts. Letters whose lower case is one letter."""
    seed = seeded()
    rng, size = random.Random(seed), 2**31 - 1
    texts = ["".join(rng.choices("aAbBéÉß,.- \n\u00a0", k=120)) for _ in range(6)]
    peer = HashingVectorizer(tokenizer=str.split, token_pattern=None, alternate_sign=False, n_features=size)
    right = cosines([(row.indices, row.data) for row in peer.transform(texts)])
    assert np.allclose(cosines([features([text], size)[1:] for text in texts]), right, atol=1e-5), seed


def cosines(rows: list[tuple[np.ndarray, np.ndarray]]) -> list[list[float]]:
    found = [dict(zip(index.tolist(), values.tolist(), strict=True)) for index, values in rows]
    return [[sum(value * b.get(index, 0) for index, value in a.items()) for b in found] for a in found]


def test_words_spread_evenly_over_the_features() -> None:
    """60,000 different words in 200 features: chi-squared leaves these bounds with a probability under 1e-9."""
    mark = secrets.token_hex(4)
    for different in ([f"{mark}{i}" for i in range(60_000)], [f"{i:05d}{mark}" for i in range(60_000)]):
        values = features([" ".join(different)], 200).values.astype(float)
        counts = values / values.sum() * 60_000
        low, high = chi2(199).ppf(5e-10), chi2(199).isf(5e-10)
        assert len(counts) == 200 and low < ((counts - 300) ** 2 / 300).sum() < high, mark


def test_the_rule_keeps_each_score_as_often_as_the_paper_says() -> None:
    """P = (2 - score)^-alpha, in an exact binomial test of each; one false alarm in a million runs."""
    seed = seeded()
    scores = [*np.linspace(0, 1, 21).tolist(), 0.999]
    for alpha in (9.0, random.Random(seed).uniform(0.5, 12)):
        cfg = QualityConfig("m", alpha, seed)
        for score in scores:
            kept = sum(keeps(cfg, f"{score} {i}", score) for i in range(8_000))
            p = binomtest(kept, 8_000, (2 - score) ** -alpha).pvalue
            assert p > 1e-6 / (2 * len(scores)), (seed, alpha, score, kept)


def test_the_rule_follows_the_lomax_distribution() -> None:
    """numpy's `pareto` draws from scipy's `lomax`."""
    seed = seeded()
    names, scores = [f"{seed} {i}" for i in range(20_000)], np.random.default_rng(seed).random(20_000)
    draws = lomax(9).ppf([uniform(name, 5, "pareto") for name in names])
    ours = [keeps(QualityConfig("m", 9.0, 5), name, score) for name, score in zip(names, scores, strict=True)]
    assert ours == (draws > 1 - scores).tolist(), seed
    even = np.sort([uniform(name, 5, "pareto") for name in names])
    most = np.abs(even - (np.arange(20_000) + 0.5) / 20_000).max()
    assert most < (np.log(2 / 1e-9) / 2 / 20_000) ** 0.5 + 1e-4, seed  # Dvoretzky-Kiefer-Wolfowitz: 1 in 10^9


def test_a_document_has_its_own_luck_whatever_comes_before_it(tmp_path: Path) -> None:
    seed = seeded()
    (tmp_path / "m.safetensors").write_bytes(model(np.zeros(64), 0.8).to_bytes())  # all score 0.69: kept 9%

    def kept(ids: list[str], seed: int) -> set[str]:
        step = Quality(QualityConfig(str(tmp_path / "m.safetensors"), 9.0, seed))
        found = {doc.id for doc in step.run([Document("some text", name) for name in ids])}
        passage = step.report
        assert passage.taken.documents == len(ids) == passage.given.documents + passage.dropped["quality"].documents
        return found

    ids = [f"{seed}-{i}" for i in range(1500)]
    first = kept(ids, 1)
    assert kept(random.Random(seed).sample(ids, 1500), 1) == first and kept(ids[:700], 1) == first & set(ids[:700])
    assert kept(ids, 2) != first


def test_the_step_writes_the_score_of_the_logistic_function(tmp_path: Path) -> None:
    seed = seeded()
    rng, size = random.Random(seed), 1000
    made = model(np.array([rng.gauss(0, 3) for _ in range(size)]), 0.25)
    (tmp_path / "m.safetensors").write_bytes(made.to_bytes())
    docs = [Document(random_text(rng, n), str(n)) for n in (0, 1, 10, 300)]
    step = Quality(QualityConfig(str(tmp_path / "m.safetensors"), 1e-9))  # keeps all
    for doc in step.run(docs):
        counts = Counter(int(features([word], size).indices[0]) for word, _, _ in plain_words(doc.text, bare=False))
        norm = sum(count**2 for count in counts.values()) ** 0.5 or 1
        logit = 0.25 + sum(float(made.coefficients[i]) * count / norm for i, count in counts.items())
        assert abs(doc.metadata["score"] - 1 / (1 + np.exp(-logit))) < 2e-6, seed
    assert step.report.given.documents == 4


def model(coefficients: np.ndarray, bias: float) -> Model:
    return Model(coefficients.astype(np.float32), bias, {"values": {"held_out": 0.5, "seed": 1}})


def topic(rng: random.Random, words: str) -> str:
    return " ".join(rng.choice(words.split()) for _ in range(rng.randint(20, 60)))


COMMON = "the of and to in it was for on are with his they at be this from have or by one had"


def corpus(folder: Path, seed: int, n: int = 300) -> dict[str, list[str]]:
    """Two topics that share most of their words, in several files each; their ids."""
    rng, ids = random.Random(seed), {}
    for kind, own in {
        "positives": "chapter garden letter evening sea",
        "negatives": "click cookie login cart menu",
    }.items():
        (folder / kind).mkdir(parents=True)
        ids[kind] = [f"{kind}-{i}" for i in range(n)]
        bodies = [json.dumps({"id": name, "text": topic(rng, f"{COMMON} {own}")}) for name in ids[kind]]
        for part in range(3):
            (folder / kind / f"{part}.jsonl").write_text("\n".join(bodies[part::3]) + "\n")
    return ids


def command(folder: Path, name: str, *more: str) -> None:
    argv = [*(f"{kind}=[{folder / kind}]" for kind in ("positives", "negatives")), *more]
    if name == "train":
        training.train(load(QualityTrainConfig, argv))
    else:
        training.evaluate(load(QualityEvaluateConfig, argv))


def test_a_model_tells_topics_apart_on_held_out_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model tells topics apart on documents that it was not trained on."""
    seed = seeded()
    ids = corpus(tmp_path, seed)
    command(tmp_path, "train", f"output={tmp_path}/a/m.safetensors", "held_out=0.3", "n_features=4096")
    about = Model.load(tmp_path / "a/m.safetensors").about
    assert f"AUC {about['auc']:.4f} on" in capsys.readouterr().out and about["auc"] > 0.9, seed
    command(tmp_path, "evaluate", f"classifier={tmp_path}/a/m.safetensors", f"output={tmp_path}/e", "alpha=2", "seed=3")
    body = json.loads((tmp_path / "e/evaluation.json").read_text())
    assert (body["auc"], body["model"]) == (about["auc"], about)  # the same held-out documents
    for kind, names in ids.items():
        out = np.array([held_out(name, 0.3, 1337) for name in names])
        counts = {part: about["documents"][part][kind] for part in ("training", "held_out")}
        assert counts == {"training": int((~out).sum()), "held_out": int(out.sum())}, seed
        assert body[kind]["documents"] == sum(body[kind]["histogram"]) == out.sum()
        p = binomtest(sum(body[kind]["kept_by_score"]), int(out.sum()), body[kind]["expected"]).pvalue
        assert p > 1e-9, (seed, body)  # a sum of unlike draws varies less than a binomial
    for name in ("roc.png", "scores.png"):
        assert (tmp_path / "e" / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_the_order_of_documents_does_not_change_a_model(tmp_path: Path) -> None:
    """The same documents give the same model in any order."""
    seed = seeded()
    corpus(tmp_path, seed, 120)
    command(tmp_path, "train", f"output={tmp_path}/a.safetensors", "held_out=0.3", "max_documents=80", "n_features=999")
    for kind in ("positives", "negatives"):
        lines = [line for path in (tmp_path / kind).iterdir() for line in path.read_text().splitlines()]
        for path in (tmp_path / kind).iterdir():
            path.unlink()
        random.Random(seed).shuffle(lines)
        (tmp_path / kind / "all.jsonl").write_text("\n".join(lines))
    command(tmp_path, "train", f"output={tmp_path}/b.safetensors", "held_out=0.3", "max_documents=80", "n_features=999")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes(), seed
    about = Model.load(tmp_path / "a.safetensors").about
    for kind in ("positives", "negatives"):
        assert sum(part[kind] for part in about["documents"].values()) == 80
    with pytest.raises(UserError, match=r"a\.safetensors holds another model"):
        command(tmp_path, "train", f"output={tmp_path}/a.safetensors", "held_out=0.4")


def test_a_sample_is_of_the_lowest_hashes() -> None:
    seed = seeded()
    rng = random.Random(seed)
    docs = [Document(str(i), f"{rng.randrange(150)}") for i in range(300)]  # ids come twice, and more often
    found = training.lowest(iter(docs), 70, seed, str.upper, lambda name: name != "7")
    ranked = sorted((doc for doc in docs if doc.id != "7"), key=lambda doc: uniform(doc.id, seed, "sample"))
    assert found == [(doc.id, doc.text) for doc in ranked[:70]], seed


def test_auc_is_how_often_a_good_document_scores_above_another() -> None:
    rng = np.random.default_rng(seeded())
    good, scores = rng.random(80) < 0.4, rng.integers(0, 12, 80) / 12
    pairs = [(a > b) + (a == b) / 2 for a in scores[good] for b in scores[~good]]
    assert abs(auc(good, scores) - np.mean(pairs)) < 1e-12


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    seed = seeded()
    rng, path = random.Random(seed), tmp_path / "m.safetensors"
    from safetensors.numpy import save

    whole = model(np.ones(32), 0.5).to_bytes()
    about = {"quality": '{"format": 1}'}
    right = {"coefficients": np.ones(8, np.float32), "bias": np.ones(1, np.float32)}
    foreign = [
        b"",
        b"text",
        b"\x80\x04K\x01.",
        whole + b"\0",
        *(whole[: rng.randrange(len(whole))] for _ in range(50)),
        save(right),
        save(right, {"quality": "5"}),
        save(right, {"quality": '{"format": 2}'}),
        save(right, {"quality": "{"}),
        save({"coefficients": right["coefficients"]}, about),
        save(right | {"coefficients": np.ones(8, np.float64)}, about),
        save(right | {"coefficients": np.ones((2, 4), np.float32)}, about),
        save(right | {"coefficients": np.ones(0, np.float32)}, about),
        save(right | {"coefficients": np.full(8, np.nan, np.float32)}, about),
        save(right | {"coefficients": np.array([np.inf, -np.inf], np.float32)}, about),
        save(right | {"bias": np.ones(2, np.float32)}, about),
    ]
    for data in foreign:
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"m\.safetensors: .*: give a model that `python -m") as caught:
            Model.load(path)
        assert "\n" not in str(caught.value), seed
    path.write_bytes(save(right, about))
    assert Model.load(path).score([""]) == [0.731059]
    for other in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="give a model that `python -m"):
            Model.load(other)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["positives=[{0}/absent]"], r"positives=.*/absent: no such file or folder"),
        (["negatives=[{0}/empty]"], r"negatives=\['.*/empty'\]: no document there \(0 kept; dropped: none\)"),
        (["held_out=1e-9"], r"held_out=1e-09 of 24 documents: held_out gets \{'positives': 0, 'negatives': 0\}"),
        (["held_out=0"], r"held_out=0.0: give a share"),
        (["n_features=0"], r"n_features=0: give 1 to"),
        (["max_documents=0"], r"max_documents=0: give at least 1"),
        (["inverse_penalty=0"], r"inverse_penalty=0.0: give a number above 0"),
        (["output=m.bin"], r"output=m\.bin: give the name of a file that ends in \.safetensors"),
    ],
)
def test_a_mistake_ends_in_one_line(tmp_path: Path, more: list[str], line: str) -> None:
    corpus(tmp_path, 1, 12)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=line):
        command(tmp_path, "train", f"output={tmp_path}/m.safetensors", *(text.format(tmp_path) for text in more))
    with pytest.raises(UserError, match=r"alpha=-1\.0: give a number above 0"):
        QualityConfig("m", -1.0)
