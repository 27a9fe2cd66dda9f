"""`python -m data_pipeline.order` against the order dealt by hand and the tokens that lie in the tars."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.errors import UserError
from conf.schema import load
from data_pipeline.config import OrderConfig
from data_pipeline.manifest import Manifest
from data_pipeline.order.lookup import order
from tests.helpers.fixtures import make_source
from tests.helpers.order_twin import Leg, deal
from tests.helpers.ranks import ROOT
from tests.helpers.seeds import seeded

SEED, LONGEST = 1337, 4096
Line = dict[str, Any]


@dataclass
class Case:
    """Sources whose every token says which token of which document it is: document * LONGEST + offset."""

    root: Path
    manifests: dict[str, Manifest]
    texts: dict[str, list[np.ndarray]]  # of each shard, as its tar holds it

    def lines(self, legs: Sequence[Leg], lanes: int, steps: int) -> list[Line]:
        """What `order` must say of these steps, from the tokens of windows that were dealt by hand."""
        tokens = {name: [len(text) for text in texts] for name, texts in self.texts.items()}
        windows, taken = deal(tokens, legs, lanes=lanes, seed=SEED, steps=steps)
        names, out = sorted(tokens), []
        for step, positions in enumerate(taken):
            n_ctx = [leg for leg in legs if leg.step <= step][-1].n_ctx
            for index, position in enumerate(positions):
                source, shard, start = windows[position]
                name = names[source]
                spans: list[list[Any]] = []
                for token in self.texts[name][shard][start : start + n_ctx + 1].tolist():
                    document, at = f"{shard}-{token // LONGEST}", token % LONGEST
                    if not spans or spans[-1][0] != document:
                        spans.append([document, at, at])
                    assert spans[-1][2] == at
                    spans[-1][2] += 1
                tar = self.manifests[name].shards[shard].name
                out.append({"step": step, "index": index, "source": name, "shard": tar, "spans": spans})
        return out

    def run_folder(self, legs: Sequence[Leg], lanes: int, done: int) -> Path:
        """A run's folder as far as `order` reads it."""
        run = self.root / "run"
        (run / "checkpoints" / "step-00000007.gen-0001").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints" / "latest").write_text("step-00000007.gen-0001\n")
        found = {name: {"path": str(m.root), "sha256": m.sha256} for name, m in self.manifests.items()}
        data = {"seed": SEED, "lanes": lanes, "sources": found, "ledger": [leg._asdict() for leg in legs]}
        body = json.dumps({"step": done, "data": data})
        (run / "checkpoints" / "step-00000007.gen-0001" / "state.json").write_text(body)
        return run


def make_case(root: Path, lengths: Mapping[str, Sequence[Sequence[int]]]) -> Case:
    """Sources of documents of these lengths; their tars are read and then deleted: `order` must not miss them."""
    case = Case(root, {}, {})
    for name, shards in lengths.items():
        docs = [[np.arange(n) + d * LONGEST for d, n in enumerate(shard)] for shard in shards]
        case.manifests[name] = make_source(root / name / "train", docs, "uint32", block_tokens=16)
        case.texts[name] = []
        for shard in case.manifests[name].shards:
            path = root / name / "train" / shard.name
            with tarfile.open(path) as tar:
                members = [m for m in tar.getmembers() if m.name.endswith(".npy")]
                blocks = [np.load(io.BytesIO(tar.extractfile(m).read())) for m in members]  # type: ignore[union-attr]
            case.texts[name].append(np.concatenate(blocks))
            path.unlink()
    return case


def ask(capsys: pytest.CaptureFixture[str], *overrides: str) -> tuple[list[Line], str]:
    """The lines of `order … json=true`, and what it says on stderr."""
    return answer(capsys, load(OrderConfig, overrides))


def answer(capsys: pytest.CaptureFixture[str], cfg: OrderConfig, **changes: Any) -> tuple[list[Line], str]:
    capsys.readouterr()
    order(replace(cfg, json=True, **changes))
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def holding(lines: Sequence[Line], document: str) -> list[Line]:
    return [line for line in lines if any(span[0] == document for span in line["spans"])]


def of_rank(lines: Sequence[Line], rank: int, dp: int, lanes: int) -> list[Line]:
    """Steps begin at multiples of lanes here, so the index in a step says the lane."""
    return [line for line in lines if line["index"] % lanes * dp // lanes == rank]


@pytest.mark.parametrize("_", range(3))
def test_order_of_a_run_is_that_dealt_by_hand(_: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Several epochs of random sources, through stages, a jump, a lost shard and another n_ctx; find for documents."""
    seed = seeded()
    rng = random.Random(seed)
    lengths = {
        name: [[rng.choice([0, 1, 2, rng.randrange(40)]) for _ in range(rng.randrange(2, 9))] + [9] for _ in range(4)]
        for name in ("web", "books")
    }
    lanes, n_ctx, w = 6, rng.randrange(2, 6), 12
    even, odd = {"books": 1, "web": 2}, {"books": 3, "web": 1}
    legs = [
        Leg(0, 0, w, n_ctx, even, {}),
        Leg(3, 3 * w, 2 * w, n_ctx, odd, {}),
        Leg(6, 9 * w + 5 * lanes, w, n_ctx, odd, {}),  # jumps over five windows of each lane
        Leg(8, 11 * w + 5 * lanes, w, n_ctx, odd, {"web": [2]}),
        Leg(10, 13 * w + 5 * lanes, w, n_ctx + 1, even, {"web": [2]}),
    ]
    case = make_case(tmp_path, lengths)
    expected = case.lines(legs, lanes, 14)
    run = load(OrderConfig, [f"checkpoint={case.run_folder(legs, lanes, done=12)}"])
    assert answer(capsys, run, steps="0:14")[0] == expected, f"seed {seed}"
    for rank, dp in ((0, 1), (0, 3), (1, 3), (2, 3)):
        of_steps = [line for line in expected if 2 <= line["step"] < 11]
        some, _err = answer(capsys, run, steps="2:11", dp=dp, rank=rank)
        assert some == of_rank(of_steps, rank, dp, lanes), f"seed {seed}, rank {rank} of {dp}"
    made = [line for line in expected if line["step"] < 12]
    documents = {f"{s}-{d}" for web in lengths.values() for s, shard in enumerate(web) for d in range(len(shard))}
    for document in documents:  # some ids are in both sources: both are meant
        found, err = answer(capsys, run, find=document)
        assert found == holding(made, document), f"seed {seed}, document {document}"
        assert ("in no window" in err) == (not found), f"seed {seed}, document {document}: {err}"
        found, _err = answer(capsys, run, find=document, steps="4:9", dp=2, rank=1)
        of_steps = [line for line in expected if 4 <= line["step"] < 9]
        assert found == of_rank(holding(of_steps, document), 1, 2, lanes), f"seed {seed}, document {document}"


def test_order_of_a_config_is_that_of_its_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = make_case(tmp_path, {"a": [[30, 41], [17, 60]], "b": [[25, 33, 8]]})
    legs = [Leg(0, 0, 8, 6, {"a": 3, "b": 1}, {}), Leg(4, 32, 16, 4, {"a": 1, "b": 2}, {})]
    config = [
        "data=mix",
        f"data.path={tmp_path}",
        "data.lanes=4",
        "data.sources={a: {path: a, weight: 3}, b: {path: b}}",
        "data.stages=[{step: 4, n_ctx: 4, tokens_per_step: 64, weights: {a: 0.5}}]",
        "n_ctx=6",
        "tokens_per_step=48",
    ]
    expected = case.lines(legs, 4, 8)
    assert ask(capsys, *config, "steps=0:8")[0] == expected
    assert ask(capsys, *config, "steps=5")[0] == [line for line in expected if line["step"] == 5]
    assert ask(capsys, *config)[0] == expected[:8]  # nothing said: step 0
    assert ask(capsys, *config, "steps=0:8", "find=0-1")[0] == holding(expected, "0-1")


ONE = ("data.lanes=2", "n_ctx=8", "tokens_per_step=16")


def test_a_document_is_found_in_each_of_its_windows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """65 tokens, 8 windows of 9 that share a token: what is seen of each document in one epoch, told by hand."""
    make_case(tmp_path / "one", {".": [[1, 7, 30, 0, 26, 1]]})
    config = (f"data.path={tmp_path}/one", *ONE, "steps=0:4")

    def spans(document: str) -> list[list[int]]:
        return sorted(
            span[1:]
            for line in ask(capsys, *config, f"find={document}")[0]
            for span in line["spans"]
            if span[0] == document
        )

    assert spans("0-0") == [[0, 1]]  # the shard's first token
    assert spans("0-1") == [[0, 7]]
    assert spans("0-2") == [[0, 1], [0, 9], [8, 17], [16, 25], [24, 30]]  # longer than a window
    assert spans("0-5") == [[0, 1]]  # the shard's last token, a label alone
    found, err = ask(capsys, *config, "find=0-3")
    assert not found and "in no window" in err and "it has no token" in err


def test_a_document_that_no_window_holds_is_said_to_be_in_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = make_case(tmp_path / "one", {".": [[17, 5], [30], [4]]})
    config = (f"data.path={tmp_path}/one", *ONE)
    found, err = ask(capsys, *config, "steps=0:9", "find=0-1")
    assert not found and "in no window, of the steps 0 to 8" in err
    assert "in shards/00000.tar: tokens 17 to 21 of 22, in a tail too short for a window of n_ctx=8" in err
    assert "in a tail too short" in ask(capsys, *config, "steps=0:9", "find=2-0")[1]
    found, err = ask(capsys, *config, "steps=0:9", "find=1-0")
    assert found and f"{len(found)} windows of" in err and "no window" not in err and "tail" not in err
    run = Case(tmp_path, {"shards": case.manifests["."]}, {}).run_folder([Leg(0, 0, 2, 8, {"shards": 1}, {})], 2, 0)
    found, err = ask(capsys, f"checkpoint={run}", "find=1-0")
    assert not found and "in no window" in err  # a run that has made no step has seen nothing
    lost = [Leg(0, 0, 2, 8, {"shards": 1}, {"shards": [1]})]
    run = Case(tmp_path, {"shards": case.manifests["."]}, {}).run_folder(lost, 2, 9)
    found, err = ask(capsys, f"checkpoint={run}", "find=1-0")
    assert not found and "in no window" in err and "a shard that is lost by then" in err


def test_of_a_source_afar_only_indexes_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A question must not push the shards of a run out of its node's cache: tokens get no room in it."""
    make_case(tmp_path / "one", {".": [[300, 40], [50, 60]]})
    ways = (f"data.path={tmp_path}/one", f"data.path=file://{tmp_path}/one")
    cache = (f"data.cache.dir={tmp_path}/cache", "data.cache.limit_gib=1e-6")  # 1 KiB: the first shard would not fit
    for question in (("steps=0:3",), ("steps=0:99", "find=0-1"), ("steps=0:99", "find=1-1")):
        here, afar = (ask(capsys, way, *ONE, *cache, *question) for way in ways)
        assert here == afar and here[0]
    assert {f.name for f in (tmp_path / "cache" / "shards").glob("*/*")} == {"use", "index.json"}
    with pytest.raises(UserError, match=r"not a local folder: give data\.cache\.dir"):
        ask(capsys, ways[1], *ONE)


def test_what_cannot_be_answered_is_one_line_with_its_cure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = make_case(tmp_path / "one", {".": [[40, 40]]})
    named = Case(tmp_path, {"shards": case.manifests["."]}, {})
    legs = [Leg(0, 0, 2, 8, {"shards": 1}, {})]
    config = (f"data.path={tmp_path}/one", *ONE)

    def refused(match: str, *overrides: str) -> None:
        with pytest.raises(UserError, match=match) as error:
            ask(capsys, *overrides)
        assert "\n" not in str(error.value)

    refused("find=nobody: none of the 2 documents in shards has this id", *config, "steps=0:9", "find=nobody")
    refused("find=0-0: say in which steps, .*steps=0:5000.*checkpoint=DIR", *config, "find=0-0")
    refused("dp=3 does not divide data.lanes=2: give one of dp=1, 2", *config, "dp=3")
    refused("step 3: n_ctx=-1: give at least 1", *config, "data.stages=[{step: 3, n_ctx: -1}]")
    refused("give earlier steps", *config, "tokens_per_step=16000000", "steps=999999999999")
    cfg = load(OrderConfig, config)
    for steps in ("3:2", "4:4", "-1", "a:b", "1:", ":", "1:2:3", "9" * 5000):
        with pytest.raises(UserError, match=r"^steps=.*give FIRST:END with FIRST below END"):
            replace(cfg, steps=steps)
    for knobs in ({"dp": 2, "rank": 2}, {"dp": 0}, {"n_ctx": 0}):
        with pytest.raises(UserError, match=r"^(dp|n_ctx)=.*give"):
            replace(cfg, **knobs)
    refused("holds no checkpoint", f"checkpoint={tmp_path}")
    run = named.run_folder(legs, 2, 9)
    state = run / "checkpoints" / "step-00000007.gen-0001" / "state.json"
    whole = json.loads(state.read_text())
    for broken in ("{", "[]", "{}", json.dumps({**whole, "step": "x"})):
        state.write_text(broken)
        refused(r"state.json: .*use another checkpoint", f"checkpoint={run}")
    state.write_text(json.dumps({**whole, "data": {**whole["data"], "lanes": 0}}))
    refused(r"state.json: damaged .*lanes=0", f"checkpoint={run}")
    state.unlink()
    refused("latest names 'step-00000007.gen-0001', which is not there", f"checkpoint={run}")
    state.write_text(json.dumps(whole))
    assert ask(capsys, f"checkpoint={state.parent}")[0] == ask(capsys, *config)[0]  # one checkpoint is named
    make_source(tmp_path / "one" / "train", [[np.arange(90)]])
    refused("shards of sha256 .* the run was trained on .*put them back", f"checkpoint={run}")


def test_head_ends_order_without_a_word(tmp_path: Path) -> None:
    make_case(tmp_path, {".": [[900, 900]]})
    argv = [sys.executable, "-m", "data_pipeline.order", f"data.path={tmp_path}", *ONE, "steps=0:100000"]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"step 0 index 0: shards/00000.tar: 0-")
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0
