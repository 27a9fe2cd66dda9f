"""Words of English text, cut as spaCy's English tokenizer cuts it, whose words datatrove's rules count.

`pieces` takes marks off both ends of a run of non-blanks, one by one, until what is left is a special case, or has no
mark at its ends; that is then cut at the marks inside it, unless it is a URL. The special cases are contractions
("don't" is do + n't), abbreviations ("Mr." is one word) and faces.

Of 801,000 runs of web pages, novels and Wikipedia, all are cut as by spaCy; of 168,000 in 388 languages, 17 are not,
because letters are Unicode's here and a list of blocks there. A URL of more than 2,000 characters is cut like a word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import product

import regex

LONGEST_URL = 2000
LONGEST_SUFFIX = 16  # characters: the longest unit, and what it looks back at

QUOTES = "'\"”“`‘´’‚,„»«「」『』（）〔〕【】《》〈〉〈〉⟦⟧"
MARKS = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
CURRENCY = "$£€¥฿₽﷼₠-₿"
UNITS = (
    "[kdcm]?m[²³]? ha [µn]m yd in ft k?g [mµ]g t lb oz m/s km/h kmh mph h?Pa mbar [mkgt]b [MKGT]B [TGMK] % "
    "[кдс]?м[²³]? мм[²³]? нм [км]?г м/с км/ч к?Па мбар [КМГТ]б [КМГ]Б ТБ [кмг]б тбكم "
    "ك?م[²³]? كم[²³] [سم]م[²³]? غرام جرام جم كغ ملغ كوب اكواب"
)
SCRIPTS = "Arabic Bengali Devanagari Ethiopic Han Hangul Hebrew Hiragana Kannada Katakana Sinhala Tamil Telugu"
UNCASED = "".join(rf"\p{{{script}}}" for script in SCRIPTS.split()) + r"\u3001-\u303f"  # with CJK punctuation
LOWER, UPPER, LETTER = rf"\p{{Ll}}{UNCASED}", rf"\p{{Lu}}{UNCASED}", rf"\p{{Ll}}\p{{Lu}}{UNCASED}"


def chars(text: str) -> str:
    return regex.escape(text, special_only=False)


MARK = rf"(?:[{chars(QUOTES + MARKS)}]|\.\.+|\p{{So}})"
PREFIX = regex.compile(rf"[§%=—–{CURRENCY}]|\+(?![0-9])|(?:US|[CA])\$|{MARK}")
SUFFIX = regex.compile(
    rf"(?:……|{MARK}|['’][sS]|[—–]|(?<=[0-9])(?:\+|[{CURRENCY}]|(?:US|[CA])\$|{'|'.join(UNITS.split())})"
    rf"|(?<=°[FfCcKk]|[0-9{LOWER}%²+|{chars(QUOTES + MARKS)}-]|[{UPPER}][{UPPER}])\.)$"
)
INFIX = regex.compile(
    rf"\.\.+|…|\p{{So}}|(?<=[0-9])[-+*^](?=[0-9-])"
    rf"|(?<=[{LOWER}{chars(QUOTES)}])\.(?=[{UPPER}{chars(QUOTES)}])|(?<=[{LETTER}]),(?=[{LETTER}])"
    rf"|(?<=[{LETTER}0-9])(?:-{{1,3}}|—{{1,2}}|[–~:<>=/])(?=[{LETTER}])"
)
HOST = "[A-Za-z0-9\u00a1-\uffff]"
PRIVATE = r"10\.|127\.|169\.254\.|192\.168\.|172\.(?:1[6-9]|2\d|3[01])\."
URL = regex.compile(
    rf"(?:[\w+.-]{{2,}}://)?(?:\S+@)?(?:(?!{PRIVATE})(?:[1-9]\d?|1\d\d|2[01]\d|22[0-3])(?:\.(?:1?\d?\d|2[0-4]\d|25[0-5])){{3}}"
    rf"|(?:{HOST}(?:[A-Za-z0-9\u00a1-\uffff_-]{{0,62}}{HOST})?\.)+[{LOWER}]{{2,63}})(?::\d{{2,5}})?(?:[/?#]\S*)?"
)
LATIN = "[A-Za-zÀ-ÖØ-öø-ÿ]+"
PLAIN = re.compile(rf"""(["“‘(]?)({LATIN}|[0-9]+)(['’][sS])?([.,;:!?)"”]?|[.,;:!?]["”’'])""")
HYPHENATED = re.compile(rf"({LATIN}(?:-{LATIN})+)([,;:!?]?)")
DIGIT = re.compile("[0-9]")


def pieces(run: str) -> tuple[str, ...]:
    """The words of a run of non-blanks, in order; joined they are `run`."""
    if run in SPECIAL:
        return SPECIAL[run]
    if run.isalpha():
        return (run,)
    if plain := PLAIN.fullmatch(run):  # most other runs: a word with a mark or two
        before, word, s, after = plain.groups("")
        owner = word + s
        mark = after[:1]
        special = (before and before + word in SPECIAL) or (
            mark and (owner + mark in SPECIAL or before + owner + mark in SPECIAL)
        )
        if not special and (mark != "." or owner[-1].islower() or owner[-1].isdigit() or owner[-2:-1].isupper()):
            return tuple(filter(None, (before, *SPECIAL.get(word, (word,)), s, *after)))
    if compound := HYPHENATED.fullmatch(run):
        return (*re.split("(-)", compound[1]), *compound[2])
    return tuple(rejoined(cut(run, SPECIAL)))


def cut(run: str, special: dict[str, tuple[str, ...]]) -> list[str]:
    before: list[str] = []
    after: list[str] = []
    a, b = 0, len(run)

    def known(a: int, b: int) -> bool:
        return 0 < b - a <= LONGEST_SPECIAL and run[a:b] in special

    while a < b and not known(a, b):
        p = prefix(run, a, b)
        s = suffix(run, a + p, b)
        if p and known(a + p, b):
            s = 0
        elif s and known(a, b - s):
            p = 0
        if not p and not s:
            break
        if p:
            before.append(run[a : a + p])
        if s:
            after.append(run[b - s : b])
        a, b = a + p, b - s
    return [*before, *(middle(run[a:b], special) if a < b else ()), *reversed(after)]


def prefix(run: str, a: int, b: int) -> int:
    """The number of first characters of run[a:b] to take off."""
    if run[a].isalnum() and run[a] not in "UCA":  # US$, C$, A$
        return 0
    mark = PREFIX.match(run, a, b)
    return mark.end() - a if mark else 0


def suffix(run: str, a: int, b: int) -> int:
    """The number of last characters of run[a:b] to take off."""
    tail = run[max(a, b - LONGEST_SUFFIX) : b]
    if "0" <= tail[-1:] <= "9" or (tail[-1:].isalpha() and tail[-2:-1] not in "'’" and not DIGIT.search(tail)):
        return 0
    if tail.endswith(".."):
        return next((b - 1 - i for i in range(b - 1, a - 1, -1) if run[i] != "."), b - a)
    mark = SUFFIX.search(tail)
    return mark.end() - mark.start() if mark else 0


def middle(word: str, special: dict[str, tuple[str, ...]]) -> Iterator[str]:
    if word in special:
        yield from special[word]
        return
    if word.isalnum():
        yield word
        return
    if "." in word and len(word) <= LONGEST_URL and URL.fullmatch(word):
        yield word
        return
    start = 0
    for mark in INFIX.finditer(word):
        if mark.start() == 0:
            continue
        if mark.start() > start:
            yield word[start : mark.start()]
        yield mark.group()
        start = mark.end()
    if start < len(word):
        yield word[start:]


def rejoined(words: list[str]) -> list[str]:
    """`words` with each special case that the cutting took apart put together again, the longest first."""
    starts = scattered()
    if len(words) < 2 or starts.keys().isdisjoint(words):
        return words
    whole_cases = [
        (-len(parts), i, whole)
        for i, word in enumerate(words)
        if word in starts
        for parts, whole in starts[word]
        if tuple(words[i : i + len(parts)]) == parts
    ]
    taken: set[int] = set()
    put: dict[int, tuple[int, tuple[str, ...]]] = {}
    for length, i, whole in sorted(whole_cases):
        if taken.isdisjoint((i, i - length - 1)):
            put[i] = (-length, whole)
        taken.update(range(i, i - length))
    out: list[str] = []
    i = 0
    while i < len(words):
        step, whole = put.get(i, (1, (words[i],)))
        out += whole
        i += step
    return out


@cache
def scattered() -> dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]]:
    """First word: [(the words into which a special case falls by marks alone, its own words)]."""
    by_first: dict[str, list[tuple[tuple[str, ...], tuple[str, ...]]]] = {}
    for text, words in SPECIAL.items():
        parts = tuple(cut(text, {}))
        if len(parts) > 1 and parts != words:
            by_first.setdefault(parts[0], []).append((parts, words))
    return by_first


NEGATED = "could do does did had may might must need ought sha should wo would ca"
NEGATED_ONLY = "ai are dare has have is was were"
ENDINGS = {  # of a contraction, by the words that take them
    "i": "d d+ve ll ll+ve m m+a ve",
    "you we they": "d d+ve ll ll+ve re ve",
    "he she it that this": "d d+ve ll ll+ve s",
    "these those": "d d+ve ll ll+ve re ve",
    "who what when where why how there": "d d+ve ll ll+ve re s ve",
    "could might must not should would": "ve",
}
NOT_CONTRACTED = {"ill", "its", "hell", "shell", "shed", "were", "well", "whore"}
SHORT = """Adm. Ak. Ala. Apr. Ariz. Ark. Aug. Bros. Calif. Co. Colo. Conn. Corp. D.C. Dec. Del. Dr. E.G. E.g. Feb. Fla.
Ga. Gen. Gov. I.E. I.e. Ia. Id. Ill. Inc. Ind. Jan. Jr. Jul. Jun. Kan. Kans. Ky. La. Ltd. Mar. Mass. Md. Messrs. Mich.
Minn. Miss. Mo. Mont. Mr. Mrs. Ms. Mt. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. Oct. Okla. Ore. Pa. Ph.D.
Prof. Rep. Rev. S.C. Sen. Sep. Sept. St. Tenn. Va. Wash. Wis. a.m. and/or co. e.g. i.e. p.m. v.s. vs. w/o C++ ä. ö. ü.
\\t \\n <space>"""
CUT = "Cause Cos Coz Cuz S bout cause cos coz cuz d em ll nuff re s"  # words that have lost their beginning
FACES = """:1 :() :o) ;) ;-) ;-D ;D ;_; 8) 8-) 8-D 8D =( =) =/ =3 =D =[ =] =| ]= (-8 (-: (-; (: (; (= (o: )-: ): [-: [:
[= -_- -__- ._. 0.0 0.o 0_0 0_o O.O O.o O_O O_o o.0 o.O o.o o_0 o_O o_o V.V V_V v.v v_v ^_^ ^__^ ^___^ @_@ >.< >.> <.<
(*_*) (-_-) (._.) (>_<) (^_^) (¬_¬) (ಠ_ಠ) ಠ_ಠ ಠ︵ಠ (╯°□°）╯︵┻━┻ ¯\\(ツ)/¯ </3 <3 <33 <333 >:( >:o ><(((*> XD XDD xD xDD
\\")"""
MOUTHS = "( (( ((( ) )) ))) * / 0 3 > D O P X ] o p x | }"


def special_cases() -> dict[str, tuple[str, ...]]:
    """{text: its words}."""
    cases: dict[str, tuple[str, ...]] = {}

    def add(*words: str) -> None:
        for first in {words[0], words[0][:1].upper() + words[0][1:]}:
            cases["".join((first, *words[1:]))] = (first, *words[1:])

    for q in ("'", "’", ""):
        for verb in f"{NEGATED} {NEGATED_ONLY}".split():
            add(verb, f"n{q}t")
            if verb in NEGATED.split():
                add(verb, f"n{q}t", f"{q}ve")
        for heads, endings in ENDINGS.items():
            for head, ending in product(heads.split(), endings.split()):
                first, *rest = ending.split("+")
                if q or (head + "".join((first, *rest))) not in NOT_CONTRACTED:
                    add(head, q + first, *(q + more if more == "ve" else more for more in rest))
        for ing in ("doin", "goin", "havin", "lovin", "nothin", "nuthin", "somethin", "ol"):
            add(ing + q)
    for q in ("'", "’"):
        add("how", f"{q}d", f"{q}y")
        add("let", f"{q}s")
        add(f"c{q}m", "on")
        add(f"o{q}clock")
        add(f"ma{q}am")
        cases |= {f"y{q}all": (f"y{q}", "all")}
        for word in CUT.split():
            cases[q + word] = (q + word,)
        cases |= {f":{q}{nose}{mouth}": (f":{q}{nose}{mouth}",) for nose, mouth in product(("", "-"), "()")}
    cases |= {f"‘{s}": (f"‘{s}",) for s in "sS"} | {"yall": ("y", "all")}
    for words in (("can", "not"), ("gon", "na"), ("got", "ta")):
        add(*words)
    cases |= {f"°{letter}.": ("°", letter, ".") for letter in "CFKcfk"}
    for hour, half in product(range(1, 13), "ap"):
        cases |= {f"{hour}{form}": (str(hour), form) for form in (f"{half}m", f"{half}.m.")}
    one = [
        *SHORT.split(),
        *FACES.split(),
        *(f":{nose}{m}" for nose, m in product(("", "-"), MOUTHS.split())),
        "''",
        "’’",
        "'",
        "’",
        "—",
    ]
    one += [f"{letter}." for letter in "abcdefghijklmnopqrstuvwxyz"] + ["em", "ll", "nuff"]
    return cases | {text: (text,) for text in one}


SPECIAL = special_cases()
LONGEST_SPECIAL = max(map(len, SPECIAL))
