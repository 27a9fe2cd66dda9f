"""Answers to many requests of one model: each is computed once, by one data-parallel rank, and kept in a journal."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from trainer.evaluation.answers import Likelihood, Writing
from trainer.evaluation.journal import Journal, Row
from trainer.inference.beam import Beam, beam_search
from trainer.inference.requests import Pair
from trainer.inference.sampler import OnTexts, Stop, sample
from trainer.inference.scorer import Scores, score, windows
from trainer.model.gpt import GPT

QUIET_S = 30.0  # between two lines of progress in a file


class Scoring:
    """One model's answers. Collective: all ranks give the same requests, and get all the answers."""

    def __init__(
        self,
        model: GPT,
        journal: Journal,
        batch_size: int,
        decode: Callable[[list[int]], str],
        on_progress: Callable[[], None] | None = None,
    ) -> None:
        """`on_progress` is called at each batch, and at each token of a text that the model writes; where it is given,
        no bar is shown."""
        self.model = model
        self.journal = journal
        self.batch_size = batch_size
        self.decode = decode
        self._has_bar = on_progress is None
        self._on_progress = on_progress or (lambda: None)

    def likelihoods(self, what: str, pairs: Sequence[Pair]) -> list[Likelihood]:
        """The probability of each continuation after its context; `what`: for the line of progress.

        A continuation of more than n_ctx tokens is scored over windows, and its context cut to one token.
        """
        n_ctx = self.model.cfg.n_ctx
        parts = [[pair] if len(pair[1]) <= n_ctx else windows(pair[0][-1:] + pair[1], n_ctx) for pair in pairs]
        answers = iter(self._likelihoods(what, [pair for some in parts for pair in some]))
        joined = [_joined([next(answers) for _ in some]) for some in parts]
        cut = [
            len(pair[0]) - 1 if len(some) > 1 else answer.cut
            for pair, some, answer in zip(pairs, parts, joined, strict=True)
        ]
        return [replace(answer, cut=n) for answer, n in zip(joined, cut, strict=True)]

    def texts(self, what: str, texts: Sequence[list[int]], context: int = 1) -> list[Likelihood]:
        """The probability of all tokens of each text but the first, over windows that see `context` tokens or more."""
        parts = [windows(ids, self.model.cfg.n_ctx, context) for ids in texts]
        answers = iter(self._likelihoods(what, [pair for some in parts for pair in some]))
        return [_joined([next(answers) for _ in some]) for some in parts]

    def continuations(self, what: str, prompts: Sequence[list[int]], how: Writing, eot: int | None) -> list[list[int]]:
        """The new tokens of each prompt; each one's draws depend on the prompt and the seed alone."""

        def compute(own: list[list[int]], done: Callable[[dict[int, Row]], None]) -> None:
            def ends(index: int, new: list[int]) -> bool:
                self._on_progress()
                text = self.decode(new)
                return any(stop in text for stop in how.stop)

            self._write(own, how, eot, ends, lambda some: done({i: {"ids": ids} for i, ids in some}))

        rule = json.dumps(asdict(how), sort_keys=True)
        rows = self._answers(what, prompts, [("write", rule, eot, ids) for ids in prompts], compute, lambda ids: ids)
        return [row["ids"] for row in rows]

    def _write(self, prompts: list[list[int]], how: Writing, eot: int | None, ends: Stop, done: OnTexts) -> None:
        """Continue the prompts: one call, for under ZeRO-3 the ranks have different numbers of them."""
        same: dict[str, Any] = {"max_new_tokens": how.tokens, "eot": eot, "stop": ends, "batch_size": self.batch_size}
        if how.beams > 1:
            beam_search(self.model, prompts, Beam(how.beams, how.length_penalty), on_batch=done, **same)
            return
        keys = [int(_sha("draws", ids)[:15], 16) for ids in prompts]
        sample(self.model, prompts, how.sampling, seed=how.seed, keys=keys, on_batch=done, **same)

    def _likelihoods(self, what: str, pairs: Sequence[Pair]) -> list[Likelihood]:
        def compute(own: list[Pair], done: Callable[[dict[int, Row]], None]) -> None:
            score(self.model, own, batch_size=self.batch_size, on_batch=lambda some: done(_rows(some)))

        rows = self._answers(what, pairs, [("score", *pair) for pair in pairs], compute, lambda pair: pair[0])
        return [Likelihood(**row) for row in rows]

    def _answers(
        self,
        what: str,
        requests: Sequence[Any],
        names: Iterable[tuple[Any, ...]],
        compute: Callable[[list[Any], Callable[[dict[int, Row]], None]], None],
        kept_together: Callable[[Any], Any],
    ) -> list[Row]:
        """The row of each request: of the journal, or computed by the rank whose share it is in.

        `compute(own, done)` calls `done` with the rows of each batch by index. Requests of which `kept_together` is
        equal are in one share, longest first.
        """
        mesh = self.model.mesh
        shas = [_sha(*name) for name in names]
        by_sha = dict(zip(shas, requests, strict=True))
        rows = self._from_main(lambda: self.journal.read(by_sha.keys()))
        groups: dict[str, list[str]] = {}
        for sha in by_sha.keys() - rows.keys():
            groups.setdefault(_sha(kept_together(by_sha[sha])), []).append(sha)
        longest_first = sorted(groups.items(), key=lambda g: (-max(_length(by_sha[s]) for s in g[1]), g[0]))
        own = [sha for _, some in longest_first[mesh.dp_rank :: mesh.dp] for sha in sorted(some)]
        computed: dict[str, Row] = {}
        with self._progress(what, len(shas), len(rows), len(own)) as bar:

            def done(some: dict[int, Row]) -> None:
                batch = {own[i]: row for i, row in some.items()}
                computed.update(batch)
                if mesh.tp_rank == 0:
                    self.journal.add(batch)
                bar.update(len(batch))
                self._on_progress()

            compute([by_sha[sha] for sha in own], done)
        rows |= self._of_all(computed)
        return [rows[sha] for sha in shas]

    def _progress(self, what: str, requests: int, known: int, own: int) -> tqdm[Any]:
        hidden = not self._has_bar or not self.model.mesh.world.is_main or own == 0
        if not hidden and known:
            print(f"{what}: {known} of {requests} answers are in the journal", file=sys.stderr, flush=True)
        every = 0.5 if sys.stderr.isatty() else QUIET_S
        return tqdm(total=own, unit="text", desc=what, mininterval=every, disable=hidden, leave=False)

    def _from_main(self, read: Callable[[], dict[str, Row]]) -> dict[str, Row]:
        """The rows that rank 0 reads, on all ranks: a rank that is ahead may already be writing."""
        if self.model.mesh.world.world_size == 1:
            return read()
        held: list[Any] = [None]
        if self.model.mesh.world.is_main:
            held = [read()]
        dist.broadcast_object_list(held, 0)
        return dict(held[0])

    def _of_all(self, rows: dict[str, Row]) -> dict[str, Row]:
        if self.model.mesh.world.world_size == 1:
            return rows
        parts: list[Any] = [None] * self.model.mesh.world.world_size
        dist.all_gather_object(parts, rows if self.model.mesh.tp_rank == 0 else {})
        return {sha: row for part in parts for sha, row in part.items()}


def _rows(scores: list[tuple[int, Scores]]) -> dict[int, Row]:
    return {
        i: asdict(
            Likelihood(
                log_p=s.log_p.double().sum().item(),
                tokens=len(s.log_p),
                greedy=bool(s.greedy.all()),
                last=bool(s.greedy[-1:].all()),
                cut=s.cut,
            )
        )
        for i, s in scores
    }


def _joined(parts: list[Likelihood]) -> Likelihood:
    return Likelihood(
        log_p=sum(p.log_p for p in parts),
        tokens=sum(p.tokens for p in parts),
        greedy=all(p.greedy for p in parts),
        last=all(p.last for p in parts[-1:]),
        cut=sum(p.cut for p in parts),
    )


def _length(request: Any) -> int:
    return sum(map(len, request)) if isinstance(request, tuple) else len(request)


def _sha(*parts: Any) -> str:
    """A hash that is the same in every process."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=12).hexdigest()
