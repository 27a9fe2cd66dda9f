"""Settings of a recipe: its steps and their thresholds.

A step that is null is left out. The values and their sources are in conf/rules/ and conf/corpus/. Standard library
only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from conf.errors import MISSING, UserError


class Extractor(Enum):
    fast = "fast"  # resiliparse: F1 0.94 on the gold pages, about 12 times as fast as the other
    best = "best"  # trafilatura, favouring precision: F1 0.97


@dataclass
class LimitsConfig:
    """Limits of one record; a record beyond them is dropped and counted."""

    page_mib: float = 16.0  # of a page, decompressed
    ratio: float = 200.0  # decompressed to compressed bytes, of what is larger than 1 MiB
    seconds: float = 10.0  # of extraction
    memory_gib: float = 1.0  # of the process that extracts

    def __post_init__(self) -> None:
        _check_positive("limits", self, "page_mib", "ratio", "seconds", "memory_gib")


@dataclass
class LinksConfig:
    """WebText's links to its pages, which people voted for."""

    min_score: int = 3  # karma of the submission
    pages: str | None = None  # WARC files that hold the pages: a file, a folder or a glob; null = fetch them
    until: str | None = None  # no submission of a later day: YYYY-MM-DD
    skip_hosts: list[str] = field(default_factory=list)  # with their subdomains
    skip_endings: list[str] = field(default_factory=list)  # of a URL's path: files that are no page of text
    over_18: bool = False  # take links that are marked as for adults


@dataclass
class FetchPagesConfig:
    """Settings of the fetcher, which asks each host for one page at a time."""

    agent: str = ""  # NAME (ADDRESS) under which pages are asked for; robots.txt is read for it; must be given to fetch
    files: int = 16  # WARC files to make, each by one task; the hosts are divided among them
    per_host_s: float = 2.0  # between two requests to one host, or more if its robots.txt says so
    timeout_s: float = 20.0  # for one page
    page_mib: float = 10.0  # a larger page is not kept
    retries: int = 2  # of a page that did not answer
    connections: int = 32  # hosts that one task asks at a time
    private: bool = False  # also ask addresses that are not public, such as your own mirror

    def __post_init__(self) -> None:
        _check_lowest("fetch", self, files=1, retries=0, connections=1)
        _check_positive("fetch", self, "per_host_s", "timeout_s", "page_mib")


@dataclass
class UrlConfig:
    """The addresses to refuse."""

    domains: list[str] = field(default_factory=list)  # with their subdomains
    blocklists: list[str] = field(default_factory=list)  # files with a domain on each line, as UT1's
    words: list[str] = field(default_factory=list)  # files with a word on each line; a URL that has one is refused


@dataclass
class LanguageConfig:
    keep: list[str] = field(default_factory=lambda: ["en"])  # ISO 639 codes of fastText's lid.176
    min_score: float = MISSING  # fastText's probability, at least

    def __post_init__(self) -> None:
        _check_share("language.min_score", self.min_score)


@dataclass
class GopherRepetitionConfig:
    """Rae et al. 2021, table A1. A share above the threshold drops the document; n-gram tables are {n: share}."""

    dup_line_frac: float = MISSING  # of the lines were there before, at most
    dup_para_frac: float = MISSING  # of the paragraphs were there before, at most
    dup_line_char_frac: float = MISSING  # of the characters are in such lines, at most
    dup_para_char_frac: float = MISSING  # of the characters are in such paragraphs, at most
    top_n_grams: dict[int, float] = MISSING  # n: share of the characters in the most frequent n-gram, at most
    dup_n_grams: dict[int, float] = MISSING  # n: share of the characters in n-grams that come twice, at most


@dataclass
class GopherQualityConfig:
    """Rae et al. 2021, section A.1."""

    min_words: int = MISSING  # that are more than punctuation
    max_words: int = MISSING  # the same
    min_mean_word_length: float = MISSING  # characters
    max_mean_word_length: float = MISSING  # characters
    max_symbol_word_ratio: float = MISSING  # of # to words, and of ellipses to words
    max_bullet_lines: float = MISSING  # share of the lines that begin with a bullet
    max_ellipsis_lines: float = MISSING  # share of the lines that end with an ellipsis
    min_alpha_words: float = MISSING  # share of the words that have a letter
    min_stop_words: int = MISSING  # different ones of stop_words
    stop_words: list[str] = MISSING  # that a text of English has


@dataclass
class C4Config:
    """Raffel et al. 2020, section 2.2. The first group of rules drops lines, the second documents."""

    terminal_punctuation: bool = MISSING  # drop lines that end without a stop, ! or ?
    min_words_per_line: int = MISSING  # drop lines of fewer
    max_word_length: int = MISSING  # characters; drop lines with a longer word
    citations: bool = MISSING  # remove Wikipedia's [1]
    javascript: bool = MISSING  # drop lines that say so
    policy: bool = MISSING  # drop lines on cookies and terms of use
    min_sentences: int = MISSING  # drop documents of fewer
    lorem_ipsum: bool = MISSING  # drop documents that say so
    curly_bracket: bool = MISSING  # drop documents with one, for code has them


@dataclass
class FineWebConfig:
    """Penedo et al. 2024, section 3.6."""

    line_punct_thr: float = MISSING  # share of the lines that end with a stop, at least
    short_line_thr: float = MISSING  # share of the lines that are short, at most
    short_line_length: int = MISSING  # characters of a short line, at most
    char_duplicates_ratio: float = MISSING  # share of the characters in lines that were there before, at most
    new_line_ratio: float = MISSING  # line breaks to words, at most


@dataclass
class BadWordsConfig:
    """C4's list; documents with one of its words are dropped, except for a share."""

    file: str = MISSING  # a word on each line
    keep: float = 0.0  # of those that have one

    def __post_init__(self) -> None:
        _check_share("bad_words.keep", self.keep)


@dataclass
class LengthConfig:
    min_chars: int = 0  # of a document
    max_chars: int | None = None  # null = no limit
    min_tokens: int = 0  # of the recipe's tokenizer

    def __post_init__(self) -> None:
        given = f"length.min_chars={self.min_chars}, max_chars={self.max_chars} and min_tokens={self.min_tokens}"
        longest = self.min_chars if self.max_chars is None else self.max_chars
        if not 0 <= self.min_chars <= longest or self.min_tokens < 0:
            raise UserError(f"{given}: give 0 or more, and max_chars of at least min_chars")


@dataclass
class QualityConfig:
    """GPT-3's filter: keep where pareto(alpha) > 1 - score (Brown et al. 2020, appendix A)."""

    model: str = MISSING  # what `python -m data_pipeline.quality train` made
    alpha: float = 9.0  # of the Pareto rule: the larger, the fewer documents of a low score are kept
    seed: int = 1337  # of the rule's random numbers

    def __post_init__(self) -> None:
        check_alpha("quality.alpha", self.alpha)


class TextMatch(Enum):
    """The texts that count as one."""

    exact = "exact"  # of the same characters
    words = "words"  # of the same words: case, punctuation and spaces do not count, so that "C" and "C++" are one


@dataclass
class MinHashConfig:
    """bands x rows hashes of word n-grams; documents that agree in a whole band are duplicates."""

    bands: int = MISSING  # groups of hashes: documents that share one whole group are near-duplicates
    rows: int = MISSING  # hashes in a group
    ngram: int = MISSING  # words
    numbers: bool = False  # tell numbers (and accents) apart; false: any number is one word, as FineWeb has it
    min_jaccard: float | None = None  # of the n-gram sets, compared exactly where a band agrees; null = not compared
    seed: int = 1  # of the hashes

    def __post_init__(self) -> None:
        given = {key: getattr(self, key) for key in ("bands", "rows", "ngram")}
        if any(isinstance(value, int) and value < 1 for value in given.values()):
            raise UserError(f"minhash: {', '.join(f'{k}={v}' for k, v in given.items())}: give at least 1 of each")
        if self.min_jaccard is not None and not 0 < self.min_jaccard <= 1:
            raise UserError(f"minhash.min_jaccard={self.min_jaccard}: give a similarity above 0, 1 at most, or null")


@dataclass
class DedupConfig:
    """Of similar documents one is kept: with the best quality score, then the oldest, then the first."""

    url: bool = False  # the same address
    text: TextMatch | None = None  # the same text: exact or words; null = texts are not compared
    minhash: MinHashConfig | None = None
    against: list[str] = field(default_factory=list)  # outputs of other recipes: their documents are removed from this
    memory_gib: float = 3.0  # of the decision; past it, keys are read from disk in several rounds

    def __post_init__(self) -> None:
        _check_positive("dedup", self, "memory_gib")


@dataclass
class DecontaminateConfig:
    """GPT-3's appendix C: text of the evaluation sets is cut out of the documents."""

    sets: list[str] = MISSING  # each a file, a folder or a glob: JSON lines or text, also compressed
    text_keys: list[str] = field(default_factory=lambda: ["text"])  # of the JSON lines, if present
    ngram: int = 13  # words
    window: int = 200  # characters that are cut with it on each side
    min_chars: int = 200  # a shorter piece is dropped
    max_pieces: int = 10  # a document in more is dropped
    max_documents: int = 10  # an n-gram in more documents is a common phrase

    def __post_init__(self) -> None:
        _check_lowest("decontaminate", self, ngram=1, window=0, min_chars=0, max_pieces=1, max_documents=1)
        if not self.sets or not self.text_keys:
            raise UserError(
                f"decontaminate: sets={self.sets} and text_keys={self.text_keys}: give at least one of each"
            )


@dataclass
class PiiConfig:
    """The personal data to mask, as FineWeb masks it."""

    email: bool = True  # mask addresses
    ip: bool = True  # mask public addresses
    phone: bool = False  # mask numbers


@dataclass
class RecipeConfig:
    """The steps, in the order of their execution."""

    links: LinksConfig | None = None
    fetch: FetchPagesConfig | None = None
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    url: UrlConfig | None = None
    extractor: Extractor | None = None  # of pages; null = the input is text
    language: LanguageConfig | None = None
    gopher_repetition: GopherRepetitionConfig | None = None
    gopher_quality: GopherQualityConfig | None = None
    c4: C4Config | None = None
    fineweb: FineWebConfig | None = None
    bad_words: BadWordsConfig | None = None
    length: LengthConfig | None = None
    quality: QualityConfig | None = None
    dedup: DedupConfig | None = None
    decontaminate: DecontaminateConfig | None = None
    pii: PiiConfig | None = None


def check_alpha(key: str, alpha: float) -> None:
    if not 0 < alpha < float("inf"):
        raise UserError(f"{key}={alpha}: give a number above 0; 9 is GPT-3's")


def _check_positive(section: str, cfg: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(cfg, key)
        if isinstance(value, int | float) and not 0 < value < float("inf"):  # in YAML a value may still be ???
            raise UserError(f"{section}.{key}={value}: give a number above 0")


def _check_lowest(section: str, cfg: Any, **lowest: int) -> None:
    for key, low in lowest.items():
        value = getattr(cfg, key)
        if isinstance(value, int) and value < low:
            raise UserError(f"{section}.{key}={value}: give at least {low}")


def _check_share(key: str, share: float) -> None:
    if isinstance(share, int | float) and not 0 <= share <= 1:
        raise UserError(f"{key}={share}: give 0 to 1")
