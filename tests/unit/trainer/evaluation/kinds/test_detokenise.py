"""De-tokenisers lead back to every line, and WikiText's gives what lm-evaluation-harness's gives."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from data_pipeline.tokenizer.tokenizer import Tokenizer
from tests.helpers.seeds import seeded
from trainer.evaluation.kinds.detokenise import DETOKENISERS, ONE_BILLION_WORDS, PTB, WIKITEXT, words_and_line_ends

FILES = {  # words and line ends of the original set, lines that stay as they are, tokens of GPT-2 before and after
    "wikitext-2.test.raw.txt": ("wikitext", 245_569, 18, 295_877, 278_428),
    "ptb.test.txt": ("ptb", 82_430, 0, 105_242, 100_649),
}


def lines_of(path: Path) -> list[str]:
    return path.read_bytes().decode().split("\n")


@pytest.mark.parametrize("file", FILES)
def test_every_line_of_a_corpus_comes_back(file: str, shared_data: Path) -> None:
    """The tokens after it: lm-evaluation-harness's rules over all lines at once give 278,365, Megatron's 100,650."""
    name, units, kept, before, after = FILES[file]
    rules, text = DETOKENISERS[name], (shared_data / "tasks/lm" / file).read_bytes().decode()
    assert words_and_line_ends(text) == units
    made = rules.detokenise(text)
    assert rules.tokenise(made) == text and rules.kept(text) == kept
    gpt2 = Tokenizer.load(shared_data / "tokenizers/gpt2")
    assert (len(gpt2.encode(text)), len(gpt2.encode(made))) == (before, after)


def test_a_copy_without_blanks_at_the_ends_gets_them_back(shared_data: Path) -> None:
    lines = lines_of(shared_data / "tasks/lm/wikitext-2.test.tokens.txt")
    assert not any(line.startswith(" ") for line in lines)
    for line in lines:
        assert WIKITEXT.tokenise(WIKITEXT.detokenise(line)) == (f" {line} " if line else " ")


def test_wikitext_gives_what_the_harness_gives_for_a_line(shared_data: Path) -> None:
    """On each line that does not stay as it is."""
    harness = pytest.importorskip(
        "lm_eval.tasks.wikitext.preprocess_wikitext", reason="the eval extra is not installed"
    )
    lines = lines_of(shared_data / "tasks/lm/wikitext-2.test.raw.txt")
    made = {line: WIKITEXT.detokenise(line) for line in lines}
    assert sum(x.startswith(" ") for x in made.values()) < 20
    for line, ours in made.items():
        theirs = harness.wikitext_detokenizer({"page": f"\n{line}\n"}).strip("\n")
        assert ours == theirs or ours.startswith(" ")


@pytest.mark.parametrize(
    "line, made",
    [
        (
            ' He said " hello ( again ) , " Tom \'s 1 @,@ 000 @-@ year plan at 5 @.@ 5 ° north . ',
            'He said "hello (again)," Tom\'s 1,000-year plan at 5.5°north.',
        ),
        (" = = = 2000 – 2005 = = = ", "=== 2000 – 2005 ==="),
        (" ", ""),
        (" The N channel . ", " The N channel . "),  # the harness writes 1, from which nothing leads back
        (" It fell 1,000 times . ", " It fell 1,000 times . "),  # one word here, although ' 1 @,@ 000 ' is usual
    ],
)
def test_wikitext_is_written_as_people_write(line: str, made: str) -> None:
    assert (WIKITEXT.detokenise(line), WIKITEXT.tokenise(made)) == (made, line)
    assert WIKITEXT.kept(line) == made.startswith(" ")


def test_ptb_is_written_as_people_write() -> None:
    line = " mr. <unk> 's plan ca n't raise $ N or c$ N N times the traders ' N # N "
    made = "mr. <unk>'s plan can't raise $1 or c$1 1 times the traders' 1 #1"
    assert (PTB.detokenise(line), PTB.tokenise(made)) == (made, line)


@pytest.mark.parametrize(
    "line, made",
    [
        (
            "It 's not clear how much Mr. Butters of the U.S. paid , they said .",
            "It's not clear how much Mr. Butters of the U.S. paid, they said.",
        ),
        ('" I don \'t know , " he said ( in London ) ; why ?', '"I don\'t know," he said (in London); why?'),
        (
            "See http : / / a.com / b for $ 5.5 million , 1,000 % of the states ' debt .",
            "See http://a.com/b for $5.5 million, 1,000% of the states' debt.",
        ),
        ("The 1990 's -- a must-see !", "The 1990's -- a must-see!"),
    ],
)
def test_one_billion_words_are_written_as_people_write(line: str, made: str) -> None:
    assert (ONE_BILLION_WORDS.detokenise(line), ONE_BILLION_WORDS.tokenise(made)) == (made, line)


@pytest.mark.parametrize("name", DETOKENISERS)
def test_any_words_come_back(name: str) -> None:
    """Also words that no corpus has, in any order."""
    rules, draw = DETOKENISERS[name], random.Random(seeded())
    marks = (
        list(".,:;!?()[]{}\"'=°$#%/-N1")
        + "@-@ @,@ @.@ 's n't 't s Mr. U.S. .. -- 1,000 don't a b,c x.y <unk> é".split()
    )
    for _ in range(2000):
        words = [" ".join(draw.choices(marks, k=draw.randrange(12))) for _ in range(3)]
        text = "".join(f"{rules.ends}{some}{rules.ends}\n" if some else f"{rules.ends}\n" for some in words)
        text = text.removesuffix("\n") if words[-1] and draw.random() < 0.5 else text
        assert rules.tokenise(rules.detokenise(text)) == text


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", DETOKENISERS)
@pytest.mark.parametrize("piece", ["(", '"', "' ", "( ", "!", ".", "a.", " ", "= ", '" '])
def test_a_hostile_line_takes_no_more_than_its_length(name: str, piece: str) -> None:
    """A hundred thousand marks: quadratic time would be minutes."""
    line = DETOKENISERS[name].ends + ("x" + piece * 100_000).strip() + DETOKENISERS[name].ends
    assert DETOKENISERS[name].tokenise(DETOKENISERS[name].detokenise(line)).strip() == line.strip()
