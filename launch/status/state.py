"""The state of a run and the reason for it, judged from the report of its files (report.py).

Heartbeats tell of a run that goes on, `launch.supervise` of one that ended; the newer of the two counts. A run that
writes no heartbeats is judged by its journal.
"""

from __future__ import annotations

import re
import signal
from typing import Any

from trainer.run import exit_codes

PHASES = {
    "start": "starting",
    "step": "training",
    "validate": "training",
    "save": "saving",
}
CODES = {
    0: "ended well",
    exit_codes.USER_ERROR: "a mistake in what was asked for",
    exit_codes.PREEMPTED: "preempted: saved and stopped on SIGUSR1",
    exit_codes.HUNG: "hung",
    exit_codes.ALONE: "a signal came and the ranks did not agree in time, nothing saved",
    130: "saved and stopped on SIGINT",
    143: "saved and stopped on SIGTERM",
}
STOPPED = (exit_codes.PREEMPTED, 130, 143)
START_S = 600.0  # what a start may take where the config does not say
SILENT_BEATS, SILENT_S = 6, 60.0  # a rank that let so many beats fall out, and for so long, is taken for gone


def judge(report: dict[str, Any], now: float) -> dict[str, str]:
    """The state and its reason, {"state", "why"}."""
    state, why = _judge(report, now)
    return {"state": state, "why": why}


def named(code: Any) -> str:
    """An exit code in words."""
    if code in CODES:
        return f"{code}, {CODES[code]}"
    if isinstance(code, int) and code - 128 in set(signal.Signals):
        return f"{code}, killed by {signal.Signals(code - 128).name}"
    return str(code)


def _judge(report: dict[str, Any], now: float) -> tuple[str, str]:
    beats = [b for b in _listed(report["heartbeats"]) if "unreadable" not in b]
    events = report["supervisor"].get("events", [])
    last = events[-1] if events else {}
    step, max_steps = report["latest"].get("step"), report["config"].get("max_steps")
    if step is not None and step == max_steps:
        return "done", f"the checkpoint of step {step} of {max_steps} is published"
    if ended := next((s.get("ended") for s in _listed(report["starts"])[-1:]), None):
        return "ended", f"by itself, with the checkpoint of step {step} of {max_steps}: {ended}"
    newest = max((b["time"] for b in beats), default=None)
    if last and last.get("event") != "start" and (newest is None or last["time"] >= newest):
        return _ended(last, events, report["config"], now)
    if newest is None:
        return _without_beats(report, last, now)
    later = [s for s in _listed(report["starts"])[-1:] if s["generation"] > beats[0]["generation"]]
    begun = max((x["time"] for x in (last, *later) if isinstance(x.get("time"), int | float)), default=newest)
    if begun > newest and now - begun < (report["config"].get("watch.start_s") or START_S):
        return "starting", f"begun {now - begun:.0f} s ago, no heartbeat since"
    if any(f"/gen-{b['generation']:04d}/" in h["file"] for b in beats[:1] for h in _listed(report["hangs"])):
        return "hung", f"a report of start {beats[0]['generation']} lies in hangs/"
    if all(b["phase"] == "end" for b in beats):
        return _over(beats, step)
    silent = [
        b for b in beats if b["age_s"] > max(SILENT_S, SILENT_BEATS * (report["config"].get("watch.beat_s") or 0))
    ]
    if silent:
        min_age_s = min(b["age_s"] for b in silent)
        who = "any rank" if len(silent) == len(beats) else ", ".join(map(_who, silent[:4]))
        more = f" and {len(silent) - 4} more" if len(silent) > 4 and len(silent) < len(beats) else ""
        return f"no heartbeat for {min_age_s:.0f} s", f"from {who}{more}; nothing tells of an end"
    late = [b for b in beats if _late(b, report["config"])]
    if late:
        worst = max(late, key=lambda b: b["time"] - b["since"])
        return "hung", f"{_who(worst)} has been in step {worst['step']} for {worst['time'] - worst['since']:.0f} s"
    return _alive(beats)


def _alive(beats: list[dict[str, Any]]) -> tuple[str, str]:
    phases = [str(b.get("phase")) for b in beats]
    phase = next((p for p in ("start", "save", "validate", "step") if p in phases), phases[0])
    oldest = max(b["age_s"] for b in beats)
    count = f"{len(beats)} ranks beat" if len(beats) > 1 else "1 rank beats"
    said = f"{count}, the oldest beat is {oldest:.0f} s old, phase {phase}"
    return PHASES.get(phase, phase), said


def _over(beats: list[dict[str, Any]], saved: Any) -> tuple[str, str]:
    """The state of a run whose ranks all ended before max_steps without a supervisor, from what they saved."""
    step, age = max(b.get("step") or 0 for b in beats), min(b["age_s"] for b in beats)
    said = (
        f"all ranks ended {age:.0f} s ago after step {step}, before max_steps; the last checkpoint is of step {saved}"
    )
    return ("stopped by a signal" if step == saved else "failed"), said


def _ended(last: dict[str, Any], events: list[dict[str, Any]], cfg: dict[str, Any], now: float) -> tuple[str, str]:
    """The state after an end; `last`: the supervisor's row of that end, or of its reaction."""
    exits = [e for e in events if e.get("event") == "exit"]
    code = exits[-1].get("exit_code") if exits else last.get("exit_code")
    why = f"launch.supervise: {last.get('event')}, exit code {named(code)}"
    cause = str(exits[-1].get("cause") or "") if exits else ""  # a launcher may have made another code of the ranks'
    why += f": {cause}" if cause else ""
    if last["event"] == "restart":
        wait_s, age = last.get("wait_s", 0), now - last["time"]
        if age > wait_s + (cfg.get("watch.start_s") or START_S):
            said = f"launch.supervise was to start it again after {wait_s:g} s and has not: it is gone, submit it again"
            return f"no start for {age:.0f} s", f"{said}; {why}"
        return "starting", f"again after {wait_s:g} s of waiting; {why}"
    if code in STOPPED or re.search(r"(^|\| )([\w.-]+: )*stopped by SIG", cause):
        return "stopped by a signal", why
    if code == exit_codes.HUNG or cause.startswith("hang: "):
        return "hung", why
    return ("ended" if code == 0 else "failed"), why


def _without_beats(report: dict[str, Any], last: dict[str, Any], now: float) -> tuple[str, str]:
    starts, row = _listed(report["starts"]), report["journal"].get("last")
    times = [last.get("time"), starts[-1].get("time") if starts else None, row.get("time") if row else None]
    known = [t for t in times if isinstance(t, int | float)]
    if not known:
        submitted = _listed(report["submissions"])
        runs = dict.fromkeys(str(run) for s in submitted for run in s.get("runs", ()))
        if runs:
            return "a sweep", f"its runs have folders of their own: {', '.join(runs)}"
        count = sum(bool(s.get("submitted")) for s in submitted)
        return "never started", f"submitted {count} times" if count else "no start has left a trace"
    age, limit = now - max(known), report["config"].get("watch.start_s") or START_S
    if (not row or max(known) > row["time"]) and age < limit:
        return "starting", f"begun {age:.0f} s ago, no heartbeat and no row since"
    return f"no heartbeat for {age:.0f} s", "there are no heartbeats; the newest trace is that old"


def _late(beat: dict[str, Any], cfg: dict[str, Any]) -> bool:
    """The ranks that are in one step for longer than the watchdog allows, by their own clocks."""
    if beat.get("phase") != "step" or not isinstance(beat.get("since"), int | float):
        return False
    limit = max(cfg.get("watch.hang_min_s") or 120, (cfg.get("watch.hang_factor") or 10) * (beat.get("step_s") or 0))
    return bool(beat["time"] - beat["since"] > limit)


def _who(beat: dict[str, Any]) -> str:
    return f"rank {beat.get('rank')} on {beat.get('host')}"


def _listed(part: Any) -> list[dict[str, Any]]:
    return part if isinstance(part, list) else []
