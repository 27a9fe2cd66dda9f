"""Entry: `python -m launch.status run_dir=runs/x`: what a run is doing, from its folder's files alone; of a folder of
runs, `run_dir=runs`, a table, with what squeue says of their jobs.

For a run that goes on, has ended, crashed, hangs or is damaged, on any machine that sees the folder: no torch, no
MLflow, no network. What cannot be read is one line that says so. `json=true` prints everything as one JSON object.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from launch.config import StatusConfig
from launch.slurm.queue import jobs
from launch.status.overview import overview, runs_in, table
from launch.status.report import Report, gather, unreadable
from launch.status.state import named
from launch.status.text import ago, clock, harmless, number, span

SHOWN = 10  # of rows that may be many: starts, events


def status(cfg: StatusConfig) -> None:
    while True:
        print("\n".join(_lines(Path(cfg.run_dir), cfg.json)), flush=True)
        if not cfg.watch:
            return
        time.sleep(cfg.watch)
        print()


def _lines(root: Path, as_json: bool) -> list[str]:
    now = time.time()
    if runs := runs_in(root):
        reports = overview(runs, jobs(), now)
        return [json.dumps({"run_dir": str(root.absolute()), "runs": reports})] if as_json else table(reports)
    report = gather(root, now)
    return [json.dumps(report)] if as_json else show(report)


def show(report: Report) -> list[str]:
    """The report for people: a line for each thing, `what: how it is`, all of it harmless to a terminal."""
    lines = [f"run: {report['run_dir']}"]
    for part in (_state, _progress, _checkpoints, _starts, _guard, _journal, _ranks, _hangs, _submissions):
        try:
            lines += part(report)
        except Exception as e:  # a file held what nobody foresaw: the other parts are shown
            lines.append(f"{part.__name__.strip('_')}: cannot be shown ({type(e).__name__}: {e})")
    lines += [f"{name}: cannot be read: {why}" for name, why in unreadable(report)]
    return [harmless(line) for line in lines]


def _state(report: Report) -> list[str]:
    state = report["state"]
    return [f"state: {state['state']} ({state['why']})"] if "state" in state else []


def _progress(report: Report) -> list[str]:
    progress = report["progress"]
    if "unreadable" in progress or progress["step"] is None:
        return ["progress: no step yet"]
    forms = {
        "train/loss": lambda v: f"loss {number(v, '.4f')}",
        "optim/lr": lambda v: f"lr {number(v, '.2e')}",
        "speed/tokens_per_s": lambda v: f"{number(v, ',.0f')} tokens/s",
        "speed/mfu": lambda v: f"mfu {number(v, '.1%')}",
        "eta_s": lambda v: f"eta {span(v)}",
        "age_s": lambda v: f"logged {ago(v)}",
    }
    words = [
        f"step {progress['step']}/{progress['max_steps'] or '?'}",
        *(f(progress[k]) for k, f in forms.items() if k in progress),
    ]
    lines = ["progress: " + "  ".join(words)]
    if "val/loss" in progress:
        best = f", best of a checkpoint {number(progress['best_val_loss'], '.4f')}" if progress["best_val_loss"] else ""
        lines.append(f"validation: loss {number(progress['val/loss'], '.4f')} at step {progress['val_step']}{best}")
    return lines


def _checkpoints(report: Report) -> list[str]:
    latest, checkpoints = report["latest"], report["checkpoints"]
    by_name = {c["name"]: c for c in checkpoints.get("published", []) if "name" in c}
    lines = []
    if resumed := by_name.get(latest.get("name")):
        size, count = resumed["bytes"] / 2**30, len(checkpoints["published"])
        lines += [f"checkpoint: {resumed['name']}, {ago(resumed['age_s'])}, {size:.2f} GiB; {count} published"]
    elif "unreadable" not in latest:
        lines += ["checkpoint: none published"]
    if best := by_name.get(checkpoints.get("best")):
        lines.append(f"best checkpoint: {best['name']}, val loss {best['val_loss']:.4f}")
    lines += [f"being written, or left by a kill: {name}" for name in checkpoints.get("unpublished", [])]
    lines += [f"damaged, set aside: {name}" for name in checkpoints.get("set_aside", [])]
    if problem := latest.get("problem"):
        lines.append(f"damaged: {problem}: the next start takes the newest that verifies")
    lines += [
        f"checkpoint: cannot be read: {c['unreadable']}" for c in checkpoints.get("published", []) if "unreadable" in c
    ]
    return lines


def _starts(report: Report) -> list[str]:
    starts, supervisor = report["starts"], report["supervisor"]
    exits = [e for e in supervisor.get("events", []) if e.get("event") in ("exit", "give up")]
    restarts = sum(e.get("event") == "restart" for e in supervisor.get("events", []))
    bound = "" if supervisor.get("all", True) else "at least "
    lines = []
    if isinstance(starts, list):
        last = f", the last on {starts[-1].get('host')} at {clock(starts[-1].get('time'))}" if starts else ""
        lines.append(f"starts: {len(starts)}{last}; restarts by launch.supervise: {bound}{restarts}")
    lines += [f"  {len(exits) - SHOWN} earlier ends are in supervise.jsonl"] if len(exits) > SHOWN else []
    for e in exits[-SHOWN:]:
        cause = f": {e['cause']}" if e.get("cause") else ""
        code = named(e.get("exit_code"))
        lines.append(f"  {clock(e.get('time'))} {e['event']} at step {e.get('step')}, exit code {code}{cause}")
    if supervisor.get("damaged"):
        lines.append(f"  {supervisor['damaged']} lines of supervise.jsonl are damaged")
    return lines


def _guard(report: Report) -> list[str]:
    guard = report["latest"].get("guard") or {}
    events, lines = guard.get("events", []), []
    if events:
        back = sum(e["did"] == "rolled back" for e in events)
        lines.append(f"guard: {guard.get('skipped', len(events) - back)} steps skipped, {back} rollbacks")
    for e in events[-SHOWN:]:
        loss, norm = ("not finite" if e[k] is None else number(e[k], ".4g") for k in ("loss", "norm"))
        to = f" to step {e['to']}" if "to" in e else ""
        jumped = f", windows {e['jumped'][0]} to {e['jumped'][1]} jumped" if e.get("jumped") else ""
        lines.append(f"  step {e['step']}: {e['why']} (loss {loss}, norm {norm}), {e['did']}{to}{jumped}")
    lost = report["latest"].get("lost_shards") or {}
    return lines + [f"lost shards: {name} {', '.join(map(str, shards))}" for name, shards in lost.items()]


def _journal(report: Report) -> list[str]:
    journal, tracking = report["journal"], report["tracking"]
    if "unreadable" in journal:
        return []
    lines = [f"journal: {journal['bytes'] / 2**20:.1f} MiB" + ("" if journal["bytes"] else ", nothing logged yet")]
    if journal["damaged"]:
        lines.append(f"  {journal['damaged']} lines of metrics.jsonl are damaged")
    if tracking and "unreadable" not in tracking:
        rows, size = tracking["rows_waiting"], tracking["bytes_waiting"]
        waits = f"{rows} rows wait" if rows is not None else f"{size / 2**20:.1f} MiB of rows wait"
        lines.append(f"mlflow: run {tracking['run_id'] or 'not made yet'} at {tracking['uri']}, {waits} to be sent")
    return lines


def _ranks(report: Report) -> list[str]:
    beats = report["heartbeats"]
    if not isinstance(beats, list) or not beats:
        return ["heartbeats: none"]
    readable = [b for b in beats if "unreadable" not in b]
    lines = [f"heartbeats: {len(readable)} ranks"]
    for b in readable:
        steps = f", step {number(b.get('step_s'), '.3f')} s, own {number(b.get('own_s'), '.3f')} s"
        when = ago(b["age_s"]) if "age_s" in b else "at no time"
        lines.append(f"  rank {b.get('rank')} on {b.get('host')}: {b.get('phase')} {b.get('step')}, {when}{steps}")
    timed = [b for b in readable if isinstance(b.get("own_s"), int | float)]
    if len(timed) > 1:
        slowest = max(timed, key=lambda b: b["own_s"])
        who = f"rank {slowest.get('rank')} on {slowest.get('host')}"
        lines.append(f"  slowest: {who}, {slowest['own_s']:.3f} s of its own a step")
    return lines


def _hangs(report: Report) -> list[str]:
    hangs = report["hangs"] if isinstance(report["hangs"], list) else []
    return [line for h in hangs for line in (f"hang: {h['file']}", *(f"  {text}" for text in h["begins"]))]


def _submissions(report: Report) -> list[str]:
    submissions = report["submissions"] if isinstance(report["submissions"], list) else []
    readable = [s for s in submissions if "unreadable" not in s]
    dirty = {True: ", with changes that are not committed", False: "", None: ""}
    lines = []
    for s in readable:
        lines.append(f"submission {s['number']}: commit {s.get('commit')}{dirty[bool(s.get('dirty'))]}, {_started(s)}")
        lines += [f"  of a sweep: {s['folder']}"] if "folder" in s else []
        lines += [f"  a run of the sweep: {run}" for run in s.get("runs", ())]
    return lines


def _started(submission: Report) -> str:
    started = submission.get("submitted")
    if started is None:
        return "nothing was started (a dry run)"
    if "unreadable" in started:
        return f"cannot be read: {started['unreadable']}"
    jobs = ", ".join(map(str, started.get("jobs") or ()))
    return f"submitted {clock(started.get('time'))}" + (f" as job {jobs}" if jobs else "")
