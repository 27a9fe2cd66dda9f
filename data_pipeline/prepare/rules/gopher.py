"""The rules of Gopher's MassiveText (Rae et al. 2021, section A.1), with FineWeb's values and datatrove's decisions and
names."""

from __future__ import annotations

from data_pipeline.corpus.document import Document
from data_pipeline.prepare.recipe_config import GopherQualityConfig, GopherRepetitionConfig
from data_pipeline.prepare.step import Step
from data_pipeline.prepare.text.repetition import Grams, repeated
from data_pipeline.prepare.text.words import Text, read


class GopherRepetition(Step):
    """Drops documents that repeat their own lines, paragraphs or n-grams."""

    def __init__(self, config: GopherRepetitionConfig) -> None:
        super().__init__("gopher_repetition")
        self.config = config

    def reason(self, doc: Document) -> str | None:
        c, text = self.config, doc.text
        if not text:
            return "empty"
        stripped = text.strip().split("\n\n")  # a third line break is before the text that follows, or alone
        paragraphs = [p for p in (part.lstrip("\n") for part in stripped) if p] or [""]
        count, characters = repeated(paragraphs)
        if count / len(paragraphs) > c.dup_para_frac:
            return "dup_para_frac"
        if characters / len(text) > c.dup_para_char_frac:
            return "dup_para_char_frac"
        lines = [line for line in text.split("\n") if line]
        lines += [""] * (text.startswith("\n") + text.endswith("\n"))  # datatrove's, which count as a repeated one
        count, characters = repeated(lines)
        if count / len(lines) > c.dup_line_frac:
            return "dup_line_frac"
        if characters / len(text) > c.dup_line_char_frac:
            return "dup_line_char_frac"
        return self.reason_of_grams(Grams(read(text)), len(text))

    def reason_of_grams(self, grams: Grams, size: int) -> str | None:
        for n, share in self.config.top_n_grams.items():
            if grams.most_frequent(n, share * size) / size > share:
                return f"top_{n}_gram"
        enough = min(self.config.dup_n_grams.values(), default=0.0) * size
        bounds: list[tuple[int, int]] = []  # a repeated n-gram is made of shorter repeated ones
        for n, share in self.config.dup_n_grams.items():
            if any(m <= n and bound / size <= share for m, bound in bounds):
                continue
            bounds.append((n, grams.covered(n, enough)))
            if bounds[-1][1] / size > share and grams.duplicated(n) / size > share:
                return f"duplicated_{n}_n_grams"
        return None


class GopherQuality(Step):
    """Drops documents that do not look like prose: by number and length of words, symbols, bullets, stop words."""

    def __init__(self, config: GopherQualityConfig) -> None:
        super().__init__("gopher_quality")
        self.config = config
        self.stop_words = frozenset(config.stop_words)
        self.whole_stop_words = frozenset(word for word in config.stop_words if Text(word).words == [word])

    def reason(self, doc: Document) -> str | None:
        c, text = self.config, read(doc.text)
        total = len(text.kinds)
        words = int(text.is_word.sum())
        if words < c.min_words or not words:
            return "gopher_short_doc"
        if words > c.max_words:
            return "gopher_long_doc"
        mean = int(text.lengths[text.is_word].sum()) / words
        if mean < c.min_mean_word_length:
            return "gopher_below_avg_threshold"
        if mean > c.max_mean_word_length:
            return "gopher_above_avg_threshold"
        if text.text.count("#") / total > c.max_symbol_word_ratio:
            return "gopher_too_many_hashes"
        if (text.text.count("...") + text.text.count("…")) / total > c.max_symbol_word_ratio:
            return "gopher_too_many_ellipsis"
        lines = text.text.splitlines()
        if sum(line.lstrip().startswith(("•", "-")) for line in lines) / len(lines) > c.max_bullet_lines:
            return "gopher_too_many_bullets"
        if sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines) > c.max_ellipsis_lines:
            return "gopher_too_many_end_ellipsis"
        if int(text.has_letter.sum()) / total < c.min_alpha_words:
            return "gopher_below_alpha_threshold"
        whole = self.whole_stop_words.intersection(text.runs)  # most texts have enough that stand alone
        if len(whole) < c.min_stop_words and len(self.stop_words.intersection(text.words)) < c.min_stop_words:
            return "gopher_enough_stop_words"
        return None
