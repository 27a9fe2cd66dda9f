"""De-tokenisers: the text of a tokenised corpus as people write it, and the way back to each of its lines.

A perplexity by the words of such a corpus is that of the de-tokenised text (GPT-2, section 3.1), which is fair only
where nothing is lost. So a line whose joined form does not lead back to it stays as the corpus has it, between two
blanks, and is counted. A corpus that puts a blank at each end of a line gets both back, also where a copy lacks them.

WikiText's rules give what those of lm-evaluation-harness (MIT) give for a single line. PTB's are those of Megatron-LM,
with the blank before a number kept. Those of the One Billion Word benchmark undo Moses' tokeniser.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

Rule = Callable[[str], str]
CONTRACTIONS = r"(?:s|t|re|ve|m|d|ll|S|T|RE|VE|M|D|LL)\b"
TITLES = "No|Nos|Col|St|vs|Gen|Dr|Mr|Mrs|Ms|Sr|Lt|Bros|pp|v|Gov|Sen|Rep|Rev|Prof|Capt|Sgt|Maj|Cmdr"
ABBREVIATION = rf"(?:[A-Z]|[A-Za-z](?:\.[A-Za-z])+|{TITLES}|\.+)\.(?!\S)"  # its full stop is part of it


@dataclass(frozen=True)
class Detokeniser:
    """The rules of one corpus, in their order. `ends`: what stands at both ends of each of its lines."""

    ends: str
    join: tuple[Rule, ...]
    split: tuple[Rule, ...]

    def detokenise(self, text: str) -> str:
        """Lines as people write them; a line whose joined form would not lead back stays as it is."""
        return "\n".join(map(self._detokenised, text.split("\n")))

    def tokenise(self, text: str) -> str:
        """The corpus' own lines, from those of `detokenise`. A blank last line after others needs its line end."""
        *before, last = text.split("\n")
        lines = [*before, last] if last or not before else before
        return "\n".join(map(self._restored, lines)) + "\n" * (len(lines) == len(before))

    def kept(self, text: str) -> int:
        """The number of lines that stay as they are."""
        return sum(line.startswith(" ") for line in self.detokenise(text).split("\n"))

    def _detokenised(self, line: str) -> str:
        words = line.strip(" ")
        joined = f" {words} "
        for rule in self.join:
            joined = rule(joined)
        joined = joined.strip(" ")
        return joined if self._tokenised(joined) == words else f" {words} "

    def _tokenised(self, line: str) -> str:
        if line.startswith(" "):
            return line.strip(" ")
        for rule in self.split:
            line = rule(line)
        return re.sub(" +", " ", line).strip(" ")

    def _restored(self, line: str) -> str:
        words = self._tokenised(line)
        return self.ends + words + self.ends if words else self.ends


def words_and_line_ends(text: str) -> int:
    """The units by which the papers divide: words between blanks, and one for each line, the last one too."""
    return len(text.split()) + text.count("\n") + (bool(text) and not text.endswith("\n"))


def _replace(pattern: str, replacement: str) -> Rule:
    return partial(re.compile(pattern).sub, replacement)


def _hug(opening: str, closing: str) -> Rule:
    """Take the blanks away just inside of each pair. Linear: all before the last closing mark is in a pair."""
    pair = re.compile(f"{re.escape(opening)}([^{re.escape(closing)}]*){re.escape(closing)}")

    def rule(text: str) -> str:
        end = text.rfind(closing) + 1
        return pair.sub(lambda found: opening + found[1].strip() + closing, text[:end]) + text[end:]

    return rule


FULL_STOP = _replace(rf"(?<!\S)(?!{ABBREVIATION})(\S*[^\s.])\.(?!\S)", r"\1 .")
MARKS = tuple(_replace(rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,")

WIKITEXT = Detokeniser(
    ends=" ",
    join=(
        _replace("s '", "s'"),
        *(_replace(f" @{re.escape(mark)}@ ", mark) for mark in "-,."),
        *MARKS,
        *(_hug(*pair) for pair in ("()", "[]", "{}", '""', "''")),
        _replace("= = = =", "===="),
        _replace("= = =", "==="),
        _replace("= =", "=="),
        _replace(" ° ", "°"),
        _replace(r"(?<=\S) N (?=\S)", " 1 "),
        _replace(" 's", "'s"),
    ),
    split=(
        _replace(r"(?<=[^\s-])-(?=[^\s-])", " @-@ "),
        _replace(r"(?<=[\d>])([,.])(?=[\d<])", r" @\1@ "),
        _replace("=(?==)", "= "),
        _replace(r'([()\[\]{}"°])', r" \1 "),
        _replace(rf"'({CONTRACTIONS})", r" '\1"),
        _replace(rf"(?<=\S)'(?!{CONTRACTIONS})", " '"),
        _replace(rf"(?<!\S)'(?!{CONTRACTIONS})(?=\S)", "' "),
        _replace(r"([:;!?,])(?=[:;!?,.]{0,3}(?!\S))", r" \1"),
        FULL_STOP,
    ),
)

PTB = Detokeniser(
    ends=" ",
    join=(
        _replace(" '", "'"),
        _replace(r" n't(?!\S)", "n't"),
        _replace(r"(?<!\S)N(?!\S)", "1"),
        _replace(r"([$#]) 1(?!\S)", r"\g<1>1"),
    ),
    split=(
        _replace(r"(?<=\S)n't(?!\S)", " n't"),
        _replace(r"(?<=\S)(?<! n)'", " '"),
        _replace(r"([$#])1(?!\S)", r"\1 1"),
        _replace(r"(?<!\S)1(?!\S)", "N"),
    ),
)

ONE_BILLION_WORDS = Detokeniser(
    ends="",
    join=(
        _replace(" : / / ", "://"),
        *MARKS,
        *(_hug(*pair) for pair in ("()", "[]", '""')),
        _replace(r" '(?=\w)", "'"),
        _replace(r"(?<=s) ' ", "' "),
        _replace(r"([$£€#]) (?=\d)", r"\1"),
        _replace(" % ", "% "),
        _replace(" / ", "/"),
    ),
    split=(
        _replace(r"([^\w\s.'`,-])", r" \1 "),
        _replace(r"(?<=\w)'(?=\w)", " '"),
        _replace(r"(?<=s)'(?!\S)", " '"),
        _replace(r"(?<!\d),|,(?!\d)", " , "),
        FULL_STOP,
    ),
)

DETOKENISERS = {"wikitext": WIKITEXT, "ptb": PTB, "1bw": ONE_BILLION_WORDS}
