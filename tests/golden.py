"""Records what the commands make today, and checks later that they still make the same, bit for bit.

    python -m tests.golden record FILE [only=NAME,NAME]
    python -m tests.golden check FILE [only=NAME,NAME]

`record` runs short trainings, writes shards and cleans a small web archive, and writes to FILE what came out. `check`
does it again and prints a line for each item: `equal  NAME`, or `DIFFERS  NAME: what`. It exits with 1 where one
differs. Both use the checkout in the current folder, and take about 6 minutes on two cores. A recording holds for the
machine and the packages that it was made with.

It starts the commands that users start and reads the files that they write, and imports nothing of this project. So it
does not change when the packages' insides do.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from random import Random
from typing import Any

TINY = (
    "model=test",
    "optim=small",
    "optim.schedule.warmup=1",
    "data.lanes=4",
    "tokens_per_step=512",
    "micro_batch_size=2",
    "max_steps=8",
    "eval.every=4",
    "eval.windows=8",
    "checkpoint.every_steps=4",
    "tracking=none",
)
TINY_SIZES = ("model.n_layer=2", "model.n_head=4", "model.n_embd=64", "model.n_ctx=64", "model.vocab_size=1024")
RUNS: dict[str, tuple[int, tuple[str, ...]]] = {
    "fp32": (1, ("precision=fp32",)),
    "bf16": (2, ("precision=bf16",)),
    "zero2": (2, ("precision=fp32", "parallel=zero2")),
    "zero3": (2, ("precision=bf16", "parallel=zero3")),
    "tp2": (2, ("precision=fp32", "parallel=tp2", "parallel.sequence_parallel=false")),
    "tp2_sequence_parallel": (2, ("precision=bf16", "parallel=tp2")),
    "dropout": (2, ("precision=fp32", "model.dropout=0.1")),
    "document_mask": (1, ("precision=fp32", "data.document_mask=true")),
    "banded": (1, ("precision=fp32", "model.attention=DB", "model.band=16", "batch_ramp={start: 256, over: 2048}")),
    "gpt1": (1, ("precision=fp32", "model=gpt1", "optim=gpt1", "parallel.recompute=full", *TINY_SIZES)),
    "muon": (2, ("precision=fp32", "optim=muon")),
}
"""Ranks and settings of each run on one source."""
MIXTURE = (
    "data=mix",
    "data.sources={words: {path: words, weight: 1}, pydocs: {path: pydocs, weight: 3}}",
    "data.stages=[{step: 4, weights: {words: 2}, n_ctx: 32}]",
)
KILL_AT, RESUMED_TO = 30, 36  # steps; the next checkpoint, at 60, is too far off to be there before the kill
COMPARED = re.compile(r"(train|val)/loss.*|optim/(lr|grad_norm)|data/.*")

TEXT = """
the a river house stone window letter garden winter captain morning evening harbour market village mountain school
doctor story answer question number history kitchen bridge engine paper water forest island road and of to in that with
have be was were said found walked opened carried remembered waited turned looked heard quiet bright narrow heavy early
distant careful simple strange ordinary little great sudden broken golden
"""
WORDS = TEXT.split()


class Work:
    """A folder to work in, and what several items need there, made when the first asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def tokenizer(self) -> Path:
        """A vocabulary of 1,024, learnt from Python's own prose."""
        out = self.folder / "vocabulary"
        command("data_pipeline.bpe", "train", "corpus=pydocs", "vocab_size=1024", f"output={out}")
        return out

    @cached_property
    def pydocs(self) -> Path:
        """Shards of Python's own prose."""
        sizes = ("val_fraction=0.05", "shard_tokens=100000", "block_tokens=8192", "workers=1")
        return self._write("pydocs", "corpus=pydocs", *sizes)

    @cached_property
    def words(self) -> Path:
        """Shards of made prose."""
        texts = self.folder / "texts"
        texts.mkdir()
        for i in range(80):
            (texts / f"{i:03d}.txt").write_text("\n\n".join(prose(Random(f"words {i}"))) + "\n", encoding="utf-8")
        sizes = ("val_fraction=0.1", "shard_tokens=5000", "block_tokens=1024", "workers=1")
        return self._write("words", "corpus=text", f"corpus.path={texts}", *sizes)

    @cached_property
    def fp32(self) -> Path:
        """The folder of the run of this name."""
        return self.train("fp32", *RUNS["fp32"])

    def train(self, name: str, ranks: int, overrides: Sequence[str]) -> Path:
        """The folder of a run that has ended."""
        run = self.folder / "runs" / name
        finish(self.start(run, ranks, overrides))
        return run

    def start(self, run: Path, ranks: int, overrides: Sequence[str]) -> list[subprocess.Popen[str]]:
        """A process for each rank, each the leader of its own process group, with torchrun's environment."""
        port = str(free_port())
        argv = [sys.executable, "-m", "trainer.pretrain", *TINY, f"run.dir={run}", f"data.path={self.pydocs}"]
        processes = []
        for rank in range(ranks):
            world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            processes.append(begin([*argv, *overrides], world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}))
        return processes

    def _write(self, name: str, *words: str) -> Path:
        out = self.folder / "data" / name
        command("data_pipeline.shards", "write", *words, f"tokenizer={self.tokenizer}", f"output={out}")
        return out


def environment() -> dict[str, str]:
    """Ours, without a world that a launcher has set, with one thread and the current folder's packages."""
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONSAFEPATH")
    ours = {name: value for name, value in os.environ.items() if name not in left_out}
    return {**ours, "PYTHONPATH": str(Path.cwd()), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def begin(argv: list[str], more: dict[str, str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    env = {**environment(), **more}
    return subprocess.Popen(argv, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def finish(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Waits for all. Exits with what one has printed where it failed."""
    try:
        for process in processes:
            printed, _ = process.communicate(timeout=300)
            if process.returncode:
                sys.exit(f"{process.args!r}\nended with {process.returncode}:\n{printed[-4000:]}")
    finally:
        kill(processes)


def kill(processes: Sequence[subprocess.Popen[str]]) -> None:
    """SIGKILL to each process group that is still there."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def command(module: str, *words: str) -> str:
    """What `python -m module words` printed. Exits with its message where it failed."""
    done = subprocess.run([sys.executable, "-m", module, *words], env=environment(), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"python -m {module} {' '.join(words)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done.stdout


def free_port() -> int:
    """A port of the loopback address, below those that the kernel gives to outgoing connections."""
    while True:
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port := secrets.choice(range(16384, 32768))))
            return port


def prose(rng: Random, paragraphs: int = 8) -> list[str]:
    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(7, 16))).capitalize() + "."

    return [" ".join(sentence() for _ in range(rng.randint(2, 5))) for _ in range(paragraphs)]


def digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def files(folder: Path) -> dict[str, str]:
    """The sha256 of each file below `folder`, but for progress.json, which tells paths and times of this machine."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "progress.json"]
    return {str(path.relative_to(folder)): digest(path.read_bytes()) for path in found}


def rows(run: Path, since: int = 0) -> list[list[Any]]:
    """[step, numbers] of the journal's lines, from the one on that says that the run was resumed at step `since`."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if since:
        lines = lines[next(i for i, line in enumerate(lines) if line.get("resumed_at") == since) :]
    picked = [[x["step"], {k: v for k, v in x["metrics"].items() if COMPARED.fullmatch(k)}] for x in lines]
    return [row for row in picked if row[1]]


def tensors(path: Path) -> dict[str, str]:
    """Type, shape and sha256 of each tensor of a safetensors file."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, about in sorted(header.items()):
        first, end = about["data_offsets"]
        found[name] = f"{about['dtype']} {about['shape']} {digest(raw[start + first : start + end])}"
    return found


def latest(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


def outcome(run: Path, since: int = 0) -> dict[str, Any]:
    """Of a run that has ended: its journal, and its last checkpoint."""
    checkpoint = latest(run)
    state = json.loads((checkpoint / "state.json").read_text())
    data = {**state["data"], "sources": {name: at["sha256"] for name, at in state["data"]["sources"].items()}}
    keys = ("step", "tokens", "val_loss", "best_val_loss", "optimizer", "optimizer_step", "layout", "model")
    return {
        "rows": rows(run, since),
        "checkpoint": checkpoint.name,
        "state": {**{key: state[key] for key in keys}, "data": data},
        "index": json.loads((checkpoint / "index.json").read_text()),
        "tensors": {path.name: tensors(path) for path in sorted(checkpoint.glob("*.safetensors"))},
    }


def one_run(name: str, work: Work) -> Any:
    return outcome(work.fp32 if name == "fp32" else work.train(name, *RUNS[name]))


def mixture(work: Work) -> Any:
    """A run on two sources, with other weights and shorter windows from step 4 on; and the order of its windows."""
    root = work.words.parent
    run = work.train("mixture", 1, ["precision=fp32", *MIXTURE, f"data.path={work.pydocs.parent}"])
    asked = [f"data.path={root}", "data.lanes=4", "n_ctx=64", "tokens_per_step=512", "steps=0:8", "json=true"]
    told = command("data_pipeline.order", *MIXTURE, *asked)
    return {**outcome(run), "order": [digest(line.encode()) for line in told.splitlines()]}


def kill_and_resume(work: Work) -> Any:
    """A run of two ranks that is killed, and resumed on one: what follows the checkpoint."""
    run = work.folder / "runs" / "killed"
    common = ["precision=bf16", "model.dropout=0.1", "eval.every=0", f"checkpoint.every_steps={KILL_AT}"]
    common += ["optim.schedule.end=100"]
    processes = work.start(run, 2, [*common, "max_steps=100"])
    wait_until(lambda: (run / "checkpoints" / "latest").exists(), processes)
    kill(processes)
    if latest(run).name != f"step-{KILL_AT:08d}.gen-0001":
        sys.exit(f"{latest(run)} is not the checkpoint of step {KILL_AT}: the kill came too late, start again")
    finish(work.start(run, 1, [*common, f"max_steps={RESUMED_TO}"]))
    return outcome(run, KILL_AT)


def wait_until(true: Callable[[], bool], processes: Sequence[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        if time.monotonic() > deadline or any(p.poll() is not None for p in processes):
            kill(processes)
            sys.exit("a run ended, or 300 seconds passed, before its first checkpoint")
        time.sleep(0.002)


def shards(work: Work) -> Any:
    """The files of two sources, and what becomes of one's tokens on the way out and in again."""
    there = {"vocabulary": files(work.tokenizer), "pydocs": files(work.pydocs), "words": files(work.words)}
    for name in ("pydocs", "words"):
        command("data_pipeline.shards", "verify", f"path={work.folder / 'data' / name}")
    out, back = work.folder / "tokens" / "words.bin", work.folder / "data_again"
    out.parent.mkdir()
    command("data_pipeline.shards", "export", f"path={work.words / 'train'}", f"output={out}", "format=megatron")
    given = ("format=megatron", f"input={out.with_suffix('')}", f"tokenizer={work.tokenizer}", f"output={back}")
    command("data_pipeline.shards", "import", *given)
    return {**there, "tokens": files(out.parent), "imported": files(back)}


def sample(work: Work) -> Any:
    asked = ("prompt=The module", "max_new_tokens=24", "temperature=0.8", "top_k=40", "seed=3", "json=true")
    return json.loads(command("trainer.generate", f"checkpoint={work.fp32}", *asked))["text"]


def pages(archive: int) -> Iterator[tuple[str, str, int, str]]:
    """(type of record, URL, HTTP status, HTML): pages, copies and near copies of them, bad ones, and no pages."""
    earlier: list[list[str]] = []
    for i in range(40):
        rng = Random(f"page {archive} {i}")
        text = prose(rng, 10)
        kinds = ("good", "good", "good", "copy", "near", "short", "repeated", "code", "missing", "request", "address")
        kind, url = kinds[i % len(kinds)], f"http://example.org/{archive}/{i}"
        if kind == "copy":
            text = earlier[-1]
        elif kind == "near":  # one word of about 400 is another
            rest = earlier[-2][0].partition(" ")[2]
            text = ["However " + rest, *earlier[-2][1:]]
        elif kind == "short":
            text = text[:1]
        elif kind == "repeated":
            text = text[:1] * 12
        elif kind == "code":
            text = [*text, "function f() { return 1; }"]
        elif kind == "address":
            text = [*text, "Letters find the captain at captain@harbour.example or at 8.8.4.4 in the morning."]
            url = "http://example.org/again" if i > 20 else url
        else:
            earlier.append(text)
        body = "".join(f"<p>{paragraph}</p>" for paragraph in text)
        html = f"<html><head><title>A page</title></head><body><article>{body}</article></body></html>"
        yield "request" if kind == "request" else "response", url, 404 if kind == "missing" else 200, html


def write_archives(folder: Path) -> None:
    """Three WARC files: gzip with a member for each record, plain, and gzip of one member."""
    folder.mkdir()
    for number in range(3):
        records = []
        for i, (kind, url, status, html) in enumerate(pages(number)):
            http = f"HTTP/1.1 {status} Reason\r\nContent-Type: text/html; charset=UTF-8\r\n\r\n{html}".encode()
            head = ["WARC/1.0", f"WARC-Type: {kind}", f"WARC-Record-ID: <urn:uuid:{number}-{i}>"]
            head += [f"WARC-Target-URI: {url}", "WARC-Date: 2024-05-17T23:31:22Z", f"Content-Length: {len(http)}"]
            records.append("\r\n".join([*head, "", ""]).encode() + http + b"\r\n\r\n")
        if number == 0:
            (folder / "0.warc.gz").write_bytes(b"".join(gzip.compress(record, mtime=0) for record in records))
        else:
            whole = b"".join(records)
            name, whole = ("1.warc", whole) if number == 1 else ("2.warc.gz", gzip.compress(whole, mtime=0))
            (folder / name).write_bytes(whole)


def prepared(out: Path, *words: str) -> Any:
    """What `data_pipeline.prepare.run` made: each document that was kept, and what became of the others."""
    import zstandard  # of the installation; the standard library reads no .zst before Python 3.14

    fixed = ("tokenizer=null", "part_mib=0.05", "task_mib=0.001", "executor.workers=2", f"output={out}")
    command("data_pipeline.prepare.run", *words, *fixed)
    found = {}
    for path in sorted((out / "documents").iterdir()):
        with zstandard.ZstdDecompressor().stream_reader(path.read_bytes()) as stream:
            lines = stream.read().decode().splitlines()
        found[path.name] = [[body["id"], digest(body["text"].encode())] for body in map(json.loads, lines)]
    return {"documents": found, "funnel": json.loads((out / "report.json").read_text())["funnel"]}


def recipe_crawl(work: Work) -> Any:
    """FineWeb's recipe over three archives. Near copies are so near that other hashes find them too."""
    write_archives(archives := work.folder / "archives")
    exam = work.folder / "exam.txt"
    exam.write_text("\n\n".join(prose(Random("page 0 1"), 10)[:2]), encoding="utf-8")
    given = ["corpus.recipe.extractor=fast", "corpus.recipe.language.min_score=0.2", f"input={archives}"]
    given += [f"corpus.recipe.decontaminate.sets=[{exam}]"]
    return prepared(work.folder / "crawl", "corpus=common_crawl", *given)


def recipe_books(work: Work) -> Any:
    """The recipe for books, with near copies that are compared exactly, as GPT-3's are, by 3 words instead of 1."""
    (shelf := work.folder / "shelf").mkdir()
    for i in range(12):
        rng = Random(f"book {i % 9}")  # three come twice, with another end
        text = prose(rng, 60) + ([f"The end of edition {i}."] if i >= 9 else [])
        (shelf / f"{i:02d}.txt").write_text("\n\n".join(text), encoding="utf-8")
    (shelf / "leaflet.txt").write_text("\n\n".join(prose(Random("leaflet"))), encoding="utf-8")
    near = "corpus.recipe.dedup.minhash={bands: 10, rows: 1, ngram: 3, min_jaccard: 0.8}"
    return prepared(work.folder / "books", "corpus=books", near, f"input={shelf}")


ITEMS: dict[str, Callable[[Work], Any]] = {
    "shards": shards,
    **{name: partial(one_run, name) for name in RUNS},
    "mixture": mixture,
    "kill_and_resume": kill_and_resume,
    "sample": sample,
    "recipe_crawl": recipe_crawl,
    "recipe_books": recipe_books,
}


def differences(before: Any, now: Any, at: str = "") -> Iterator[str]:
    """Where two JSON values differ, and how. A NaN equals a NaN."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from differences(before.get(key, "(not there)"), now.get(key, "(not there)"), f"{at}/{key}")
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, pair in enumerate(zip(before, now, strict=True)):
            yield from differences(*pair, f"{at}[{i}]")
    elif json.dumps(before) != json.dumps(now):
        yield f"{at} was {shown(before)}, is {shown(now)}"


def shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:150]}... ({len(text)} characters)"


def made(names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(name, what came out) of each item, as soon as it is known."""
    find = "import importlib.util; print(importlib.util.find_spec('trainer').origin)"
    done = subprocess.run([sys.executable, "-c", find], env=environment(), capture_output=True, text=True)
    if not Path(done.stdout.strip()).is_relative_to(Path.cwd()):
        sys.exit(f"trainer comes from {done.stdout.strip() or 'nowhere'}: start this in the folder of a checkout")
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        work = Work(Path(folder))
        for name in names:
            yield name, json.loads(json.dumps(ITEMS[name](work)))


def main(argv: Sequence[str]) -> int:
    only = [word.removeprefix("only=").split(",") for word in argv[2:] if word.startswith("only=")]
    if len(argv) != 2 + len(only) or len(only) > 1 or argv[0] not in ("record", "check"):
        sys.exit(f"{__doc__}\nNAME is of: {', '.join(ITEMS)}")
    names = only[0] if only else list(ITEMS)
    if unknown := [name for name in names if name not in ITEMS]:
        sys.exit(f"only={unknown[0]}: give names of: {', '.join(ITEMS)}")
    action, file = argv[0], Path(argv[1])
    before = json.loads(file.read_text(encoding="utf-8")) if action == "check" else {}
    found, differ, started = {}, False, time.monotonic()
    for name, now in made(names):
        found[name] = now
        differing = list(differences(before.get(name), now)) if action == "check" else []
        differ = differ or bool(differing)
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        line = f"DIFFERS  {name}: {differing[0]}{more}" if differing else f"equal  {name}"
        print(line if action == "check" else f"recorded  {name}  after {time.monotonic() - started:.0f} s", flush=True)
    if action == "record":
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
