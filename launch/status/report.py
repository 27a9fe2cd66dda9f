"""Report of a run from the files of its folder, part by part. Reads bounded amounts and no network, imports no torch.

A part that cannot be read is `{"unreadable": why}`; the others are reported all the same. A time is the clock of the
machine that wrote it; an age is this machine's clock less that time, negative where the two clocks disagree.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from conf.errors import UserError
from conf.frozen import peek
from data_pipeline.files import open_regular, read_json
from data_pipeline.order.ledger import Ledger
from launch.job import SUBMITTED
from launch.status.state import judge
from trainer.checkpoint.ranking import best
from trainer.run.folder import RunFolder

TAIL_BYTES = 8 << 20  # of a file of rows, which may be of any size: its end is read
HEAD_CHARS = 4000  # of a hang report
EVENT = {"time": float, "event": str}
BEAT = {"rank": int, "generation": int, "time": float, "phase": str}
ROW = {"step": int, "generation": int, "time": float, "metrics": dict}
STEP_KEYS = ("train/loss", "optim/lr", "optim/grad_norm", "speed/tokens_per_s", "speed/mfu", "data/tokens")
NOT_FINITE = ("nan", "inf", "-inf")  # as the journal writes them
DAMAGED = "the rest is shown"

Report = dict[str, Any]


def gather(root: Path, now: float) -> Report:
    """Everything, and the state that follows from it. Values are plain JSON; `now`: seconds since 1970.

    Raises:
        UserError: there is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"run_dir={root}: no such folder")
    parts: dict[str, Callable[[], Any]] = {
        "config": lambda: _config(root),
        "starts": lambda: _starts(root),
        "supervisor": lambda: _supervisor(root),
        "heartbeats": lambda: _heartbeats(root, now),
        "hangs": lambda: _hangs(root),
        "journal": lambda: _journal(root),
        "checkpoints": lambda: _checkpoints(root, now),
        "latest": lambda: _latest(root),
        "submissions": lambda: _submissions(root),
    }
    report: Report = {"run_dir": str(root.absolute()), "time": now}
    for name, part in parts.items():
        report[name] = _whole(part)
    report["tracking"] = _whole(lambda: _tracking(root, report["journal"]))
    report["progress"] = _whole(lambda: _progress(report, now))
    report["state"] = _whole(lambda: judge(report, now))
    plain: Report = _plain(report)
    return plain


def _whole(part: Callable[[], Any]) -> Any:
    """The part, or the reason why it cannot be read: a damaged file hides no other part."""
    try:
        return part()
    except Exception as e:
        why = str(e) if isinstance(e, UserError | OSError) else f"{type(e).__name__}: {e}"
        return {"unreadable": " ".join(why.split())}


def _config(root: Path) -> Report:
    """The values of the last start's frozen config that the other parts need; empty without a config."""
    path = RunFolder(root).config
    if not path.exists():
        return {}
    body = peek(path)
    watch = body.get("watch") or {}
    keys = ("max_steps", "tokens_per_step", "micro_batch_size", "precision")
    return {
        "name": body["run"]["name"],
        "model": body["model"]["name"],
        **{k: body.get(k) for k in keys},
        **{f"watch.{k}": watch.get(k) for k in ("beat_s", "hang_factor", "hang_min_s", "start_s")},
    }


def _starts(root: Path) -> list[Report]:
    """Each start that took a generation: number, and host, pid and time of its rank 0."""
    starts = []
    for path in sorted(RunFolder(root).generations.glob("*")):
        if path.name.isdecimal():
            body = _whole(partial(read_json, path, DAMAGED))
            starts.append({"generation": int(path.name), **body})
    return starts


def _supervisor(root: Path) -> Report:
    """The rows of supervise.jsonl, or of its end; `damaged` counts lines that are none."""
    rows, damaged, whole = _rows(root / "supervise.jsonl", EVENT)
    return {"events": rows, "damaged": damaged, "all": whole}


def _heartbeats(root: Path, now: float) -> list[Report]:
    """Each rank's last beat, by rank, with its age in seconds; of starts before the newest that beat: none."""

    def beat(path: Path) -> Report:
        body = read_json(path, DAMAGED)
        if not _has(body, BEAT):
            raise UserError(f"{path}: no heartbeat: {DAMAGED}")
        return {**body, "age_s": now - body["time"]}

    beats = [_whole(partial(beat, path)) for path in sorted((root / "heartbeats").glob("rank-*.json"))]
    newest = max((b["generation"] for b in beats if "generation" in b), default=None)
    return [b for b in beats if b.get("generation", newest) == newest]


def _hangs(root: Path) -> list[Report]:
    """The newest three reports of hangs: which start, and how each begins."""
    paths = sorted((root / "hangs").glob("gen-*/report.txt"))[-3:]
    return [{"file": str(p.relative_to(root)), "begins": _read(p, HEAD_CHARS)[1].splitlines()[:6]} for p in paths]


def _journal(root: Path) -> Report:
    """The last training row and the last validation, those superseded by a later start left out."""
    path = RunFolder(root).metrics
    rows, damaged, whole = _rows(path, ROW)
    kept: list[Report] = []
    for row in rows:
        if row.get("resumed_at") is not None:
            kept = [r for r in kept if r["step"] <= row["step"]]
        row["metrics"] = {k: float(v) if v in NOT_FINITE else v for k, v in row["metrics"].items()}
        kept.append(row)
    report: Report = {"bytes": path.stat().st_size if path.exists() else 0, "rows": len(rows) if whole else None}
    for name, key in (("train", "train/loss"), ("val", "val/loss")):
        report[name] = next((r for r in reversed(kept) if key in r["metrics"]), None)
    report["last"] = rows[-1] if rows else None
    return {**report, "damaged": damaged}


def _tracking(root: Path, journal: Report) -> Report:
    """MLflow's run, and the part of the journal that is not sent: bytes, and rows if they are few enough to count."""
    path = root / "tracking.json"
    if not path.exists():
        return {}
    state = read_json(path, DAMAGED)
    waiting = max(0, journal["bytes"] - state["offset"])
    rows = None
    if waiting <= TAIL_BYTES:
        rows = _read(RunFolder(root).metrics, TAIL_BYTES, state["offset"])[1].count("\n") if waiting else 0
    return {"uri": state["uri"], "run_id": state["run_id"], "bytes_waiting": waiting, "rows_waiting": rows}


def _checkpoints(root: Path, now: float) -> Report:
    """The published checkpoints, in order, the best of them, and the unfinished ones."""
    folder = RunFolder(root)
    checkpoints = [_whole(partial(_checkpoint, path, now)) for path in folder.published()]
    return {
        "published": checkpoints,
        "best": best((c["name"], c) for c in checkpoints if "name" in c),
        "unpublished": sorted(p.name for p in folder.checkpoints.glob(".step-*")),
        "set_aside": sorted(p.name for p in folder.checkpoints.glob("damaged-step-*")),
    }


def _latest(root: Path) -> Report:
    """The checkpoint to resume from, with its guard's history, its ledger and the shards lost by then."""
    folder = RunFolder(root)
    path = folder.latest()
    if path is None:
        return {}
    state = RunFolder.state(path)
    ledger = Ledger.from_json(state["data"]["ledger"])
    return {
        "name": path.name,
        "problem": folder.pointer_problem(),
        "step": state["step"],
        "best_val_loss": state.get("best_val_loss"),
        "lost_shards": {name: list(shards) for name, shards in ledger.segments[-1].lost.items() if shards},
        "guard": {k: v for k, v in (state.get("guard") or {}).items() if k != "recent"},
        "ledger": ledger.to_json(),
    }


def _checkpoint(path: Path, now: float) -> Report:
    files = [f.stat() for f in path.iterdir()]
    state = RunFolder.state(path)
    size, age = sum(f.st_size for f in files), now - path.stat().st_mtime
    validated = {key: state.get(key) for key in ("val_loss", "measured")}
    return {"name": path.name, "step": state["step"], "bytes": size, "age_s": age, **validated}


def _submissions(root: Path) -> list[Report]:
    """Each `launch.submit`, with the version of the code that it froze; `submitted`: None if it started nothing."""
    submissions = []
    for folder in sorted(p for p in (root / "submit").glob("*") if p.name.isdecimal()):
        code = _whole(partial(read_json, folder / "code.json", DAMAGED))
        path = folder / SUBMITTED
        submitted = _whole(partial(read_json, path, DAMAGED)) if path.exists() else None
        submissions.append({**code, "number": folder.name, "submitted": submitted})
    return submissions


def _progress(report: Report, now: float) -> Report:
    """The run's step, loss and remaining time by its journal; without one, by its last checkpoint."""
    journal, latest, cfg = report["journal"], report["latest"], report["config"]
    progress: Report = {"step": latest.get("step"), "max_steps": cfg.get("max_steps")}
    if row := journal.get("train"):
        metrics = {k: row["metrics"][k] for k in STEP_KEYS if k in row["metrics"]}
        progress |= {"step": row["step"], "age_s": now - row["time"], **metrics}
    if row := journal.get("val"):
        progress |= {"val_step": row["step"], "val/loss": row["metrics"]["val/loss"]}
    progress["best_val_loss"] = latest.get("best_val_loss")
    speed, step, last = progress.get("speed/tokens_per_s"), progress["step"], progress["max_steps"]
    if speed and step is not None and last:
        if "ledger" in latest:
            ledger = Ledger.from_json(latest["ledger"])
            left = ledger.tokens(last) - ledger.tokens(step)
        else:
            left = (last - step) * cfg["tokens_per_step"]
        progress["eta_s"] = max(0, left) / speed
    return progress


def _rows(path: Path, keys: Mapping[str, type]) -> tuple[list[Report], int, bool]:
    """The rows with `keys` of the file's end, how many lines there are none, and whether that is the whole file."""
    if not path.exists():
        return [], 0, True
    whole, text = _read(path, TAIL_BYTES, -TAIL_BYTES)
    lines = text.split("\n")[0 if whole else 1 : -1]  # the last is torn or empty
    rows = [row for line in lines if _has(row := _object(line), keys)]
    return rows, len(lines) - len(rows), whole


def _object(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _has(body: Any, keys: Mapping[str, type]) -> bool:
    """True for a JSON object with all `keys`, each with a value of its type; an int counts as a float, too."""
    kinds = {k: (int, float) if kind is float else kind for k, kind in keys.items()}
    return isinstance(body, dict) and all(isinstance(body.get(k), kind) for k, kind in kinds.items())


def _read(path: Path, limit: int, offset: int = 0) -> tuple[bool, str]:
    """At most so many bytes of a regular file from `offset` on (less than 0: from the end); True if that is all."""
    with open_regular(path, DAMAGED) as f:
        size = os.fstat(f.fileno()).st_size
        start = offset if offset >= 0 else max(0, size + offset)
        f.seek(start)
        return start == 0 and size <= limit, f.read(limit).decode(errors="replace")


def _plain(value: Any) -> Any:
    """The value for JSON, which has no NaN: such numbers become words."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def unreadable(report: Report) -> Iterator[tuple[str, str]]:
    """(part, reason) of each part that could not be read, at any depth."""
    for name, part in report.items():
        for item in part if isinstance(part, list) else [part]:
            if isinstance(item, dict) and "unreadable" in item:
                yield name, item["unreadable"]
