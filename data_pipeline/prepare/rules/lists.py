"""Lists of words and of domains from files, a line each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from xxhash import xxh3_64_intdigest

from conf.errors import UserError, of_nature


def lines(path: str, knob: str) -> Iterator[bytes]:
    """The lines of a file in lower case, without blanks at their ends, empty lines and lines that begin with #.

    Raises:
        UserError: the file cannot be read; `knob` is the key that names it.
    """
    try:
        with Path(path).open("rb") as file:
            for line in file:
                if (line := line.strip().lower()) and not line.startswith(b"#"):
                    yield line
    except OSError as e:
        raise of_nature(e, f"{knob}={path}: {e.strerror}; give a file with one entry on each line") from None


def words(path: str, knob: str) -> frozenset[str]:
    listed = frozenset(line.decode("utf-8", "replace") for line in lines(path, knob))
    if not listed:
        raise UserError(f"{knob}={path}: no word in it; give a file with one on each line, or leave the rule out")
    return listed


def named(domain: str) -> bytes:
    """A domain of the config as hosts are written: lower case, ASCII.

    Raises:
        UserError: it is no domain.
    """
    try:
        name = domain.strip().lower().strip(".").encode("idna")
    except UnicodeError:
        name = b""
    if not re.fullmatch(rb"[a-z0-9_-]+(\.[a-z0-9_-]+)*", name):
        raise UserError(f"url.domains: {domain!r} is no domain: give one such as example.org")
    return name


class Domains:
    """A set of domains as sorted 64-bit hashes: 8 bytes each, 40 MB for 5 million (all of UT1's lists), where a Python
    set of as many strings takes about 600 MB. A domain that is not listed has the hash of one of 5 million with a
    probability of 3e-13."""

    def __init__(self, domains: Iterable[bytes]) -> None:
        self.hashes = np.unique(np.fromiter(map(xxh3_64_intdigest, domains), np.uint64))

    @classmethod
    def of(cls, own: Iterable[str], files: Iterable[str], knob: str) -> Domains:
        """The domains that the config names, and those of files."""
        return cls(chain(map(named, own), chain.from_iterable(lines(path, knob) for path in files)))

    def cover(self, host: str) -> bool:
        """True if the host, or a domain that it lies below, is in the set: for a.b.c that is a.b.c, b.c or c."""
        if not len(self.hashes):
            return False
        labels = host.encode().split(b".")
        asked = np.array([xxh3_64_intdigest(b".".join(labels[i:])) for i in range(len(labels))], np.uint64)
        index = np.minimum(np.searchsorted(self.hashes, asked), len(self.hashes) - 1)
        return bool((self.hashes[index] == asked).any())
