"""What to think of what the ranks of a node check brought together. Standard library only: numbers in, findings out.

`came` is what each rank said of itself, by rank (node_check.py: own_facts); `nodes` the ranks of each node.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trainer.config.node_check import NodeCheckConfig
from trainer.diagnostics.check_result import Finding, State, fail, from_json, ok, warn

SLOW_GPU = 0.85  # of the median over the ranks
SLOW_NETWORK = 0.5  # of what the network is said to carry
FOREIGN_MIB = 1024  # of a GPU, before any rank of ours has started on it
WRONG = 0.02  # relative error of a product
SKEW_S = 1.0
SLOW_MB_S = 50
WORST = (State.fail, State.warn, State.ok)


def came_findings(cfg: NodeCheckConfig, came: list[Any], nodes: list[list[int]], address: str) -> list[Finding]:
    """Of what each rank and node says of itself."""
    found = [ok("ranks", f"all {len(came)} came to {address}, on {len(nodes)} nodes: {names(came, nodes)}")]
    found += [versions(came), host_names(came, nodes)]
    found += merged(came, nodes)
    found += gpus(cfg, came, nodes)
    return found


def names(came: list[Any], nodes: list[list[int]]) -> str:
    hosts = [str(came[node[0]]["host"]) for node in nodes]
    return ", ".join(hosts[:8]) + (", …" if len(hosts) > 8 else "")


def versions(came: list[Any]) -> Finding:
    first = came[0]["versions"]  # what only the first rank of a node tells, the others do not differ in
    differ = [
        f"{key} is {fact['versions'].get(key)} on rank {rank} ({fact['host']}), {value} on rank 0"
        for key, value in first.items()
        for rank, fact in enumerate(came)
        if fact["versions"].get(key, value) != value
    ]
    if differ:
        cure = "bring checkout and environment to the same state on all nodes, or share them"
        return fail("versions", "; ".join(differ[:3]), cure)
    return ok("versions", "the same on all ranks: " + ", ".join(f"{k} {v}" for k, v in first.items()))


def host_names(came: list[Any], nodes: list[list[int]]) -> Finding:
    """gloo gives the others the address that the host's own name stands for."""
    bad = [came[node[0]] for node in nodes if came[node[0]]["loopback"] and not came[node[0]]["interface"]]
    if len(nodes) > 1 and bad:
        hosts = ", ".join(f"{b['host']} is {', '.join(b['addresses']) or 'nothing'}" for b in bad[:4])
        cure = "set cluster.env.GLOO_SOCKET_IFNAME to the network's interface, or mend /etc/hosts"
        return warn("host names", f"stand for addresses that no other node reaches: {hosts}", cure)
    return ok("host names", "each stands for an address of its node" if len(nodes) > 1 else "one node, none is needed")


def merged(came: list[Any], nodes: list[list[int]]) -> Iterator[Finding]:
    """The checks that each node made of itself: the worst of each, with the nodes that say so."""
    of_nodes = [(came[node[0]]["host"], [from_json(body) for body in came[node[0]]["machine"]]) for node in nodes]
    for same in zip(*(findings for _, findings in of_nodes), strict=True):
        worst = min((f.state for f in same), key=WORST.index)
        who = [host for (host, _), f in zip(of_nodes, same, strict=True) if f.state is worst]
        one = next(f for f in same if f.state is worst)
        where = "on all nodes" if len(who) == len(nodes) else f"on {', '.join(who[:8])}"
        yield Finding(one.name, one.state, f"{one.found}, {where}", one.cure)


def gpus(cfg: NodeCheckConfig, came: list[Any], nodes: list[list[int]]) -> Iterator[Finding]:
    firsts = [came[node[0]] for node in nodes]
    counts = {f["host"]: len(f["smi"]) for f in firsts}
    if not any(counts.values()) and not any(f["torch_gpus"] for f in firsts):
        if cfg.gpus_per_node:
            cure = "load the driver and ask for GPUs; cluster.gpu=cpu where ranks are to run on CPUs"
            yield warn("GPUs", "none on any node: the ranks would train on CPUs", cure)
        else:
            yield ok("GPUs", "none, and none asked for: ranks on CPUs")
        return
    few = [f for f in firsts if f["torch_gpus"] < max(cfg.gpus_per_node, 1)]
    short = [f"{f['host']}: {len(n)} ranks" for f, n in zip(firsts, nodes, strict=True) if len(n) < cfg.gpus_per_node]
    unseen = [f for f in firsts if f["visible"] is None and f["smi"] and f["torch_gpus"] != len(f["smi"])]
    models = sorted({gpu["name"] for f in firsts for gpu in f["smi"]})
    found = f"{firsts[0]['torch_gpus']} a node, {' and '.join(models)}"
    if cfg.gpus_per_node == 0:
        yield ok("GPUs", f"{found}; ranks on CPUs are asked for")
    elif few or unseen:
        told = "; ".join(
            f"{f['host']}: torch sees {f['torch_gpus']}, nvidia-smi {len(f['smi'])}" for f in (few or unseen)
        )
        yield fail(
            "GPUs",
            f"{told}; {cfg.gpus_per_node} are asked for",
            "look at nvidia-smi and dmesg there, or take the node out",
        )
    elif short:
        cure = f"ask for all of them (--gpus-per-node={cfg.gpus_per_node}): GPUs without a rank are not tried"
        yield fail("GPUs", f"{'; '.join(short)} were started, {cfg.gpus_per_node} GPUs are asked for", cure)
    elif len(models) > 1:
        yield warn("GPUs", found, "take nodes of one kind: all wait for the slowest")
    else:
        yield ok("GPUs", found)
    yield from gpu_state(firsts)


def gpu_state(firsts: list[Any]) -> Iterator[Finding]:
    """Memory that others hold, and errors that the GPUs counted."""
    every = [(f["host"], gpu) for f in firsts for gpu in f["smi"]]
    taken = [f"{h} GPU {g['index']}: {g['memory.used']} MiB" for h, g in every if _int(g["memory.used"]) > FOREIGN_MIB]
    if taken:
        yield warn("GPU memory", f"held by others: {'; '.join(taken)}", "end those processes (nvidia-smi names them)")
    elif every:
        yield ok("GPU memory", f"{every[0][1]['memory.total']} MiB each, none held by others")
    key = "ecc.errors.uncorrected.volatile.total"
    errors = [f"{h} GPU {g['index']}: {g[key]}" for h, g in every if _int(g[key]) > 0]
    if errors:
        yield fail(
            "GPU errors",
            f"uncorrected since the driver's start: {'; '.join(errors)}",
            "take the node out, reset the GPU",
        )
    elif every:
        yield ok("GPU errors", "no uncorrected ones")


def _int(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 0


def group_finding(came: list[Any], joined: list[Any]) -> Finding:
    bad = failures(joined)
    if bad:
        cure = "see host names; open all ports between the nodes; NCCL_DEBUG=INFO or GLOO_SOCKET_IFNAME in cluster.env"
        return fail("process group", said(bad, came), cure)
    return ok("process group", f"{len(came)} ranks joined, and one all-reduce went through")


def measured_findings(
    cfg: NodeCheckConfig, came: list[Any], nodes: list[list[int]], told: dict[str, list[Any]]
) -> Iterator[Finding]:
    """Of what was measured: by name, what each rank brought."""
    judges: dict[str, Callable[[list[Any]], Iterator[Finding]]] = {
        "matmul": lambda values: matmul(came, values),
        "all-reduce": lambda values: all_reduce(cfg, came, nodes, values),
        "clock": lambda values: clock(came, values[0]),
        "disk": lambda values: disk(came, values),
    }
    for name, values in told.items():
        bad = failures(values)
        if bad:
            yield fail("run.dir" if name == "disk" else name, said(bad, came), CURES[name])
        else:
            yield from judges[name](values)


CURES = {
    "matmul": "take the node out: its GPU does not compute",
    "all-reduce": "look at the network between the nodes",
    "clock": "look at the network between the nodes",
    "disk": "give a run.dir that every node may write",
}


def matmul(came: list[Any], values: list[Any]) -> Iterator[Finding]:
    wrong = [f"rank {r} ({came[r]['host']})" for r, v in enumerate(values) if not v["error"] < WRONG]
    rates = [v["tflops"] for v in values]
    typical = statistics.median(rates)
    slow = [f"rank {r} ({came[r]['host']}) {v:.1f}" for r, v in enumerate(rates) if v < SLOW_GPU * typical]
    found = f"{min(rates):.3g} to {max(rates):.3g} TFLOP/s, median {typical:.3g}, on {values[0]['device']}"
    if wrong:
        yield fail("matmul", f"wrong results on {', '.join(wrong)}", CURES["matmul"])
    elif slow and values[0]["device"] == "cuda":  # ranks on CPUs share them, with each other and with anyone
        yield warn(
            "matmul",
            f"{found}; slow: {'; '.join(slow)}",
            "look at its clocks and heat (nvidia-smi -q), or leave the node out",
        )
    else:
        yield ok("matmul", found)


def all_reduce(cfg: NodeCheckConfig, came: list[Any], nodes: list[list[int]], values: list[Any]) -> Iterator[Finding]:
    """GB/s is bytes / time; links carry 2 (n - 1) / n times as much. Between nodes all ranks of a node send at once."""
    for key, where in (("inside", "inside a node"), ("between", "between the nodes")):
        of_ranks = [(rank, v[key]) for rank, v in enumerate(values) if key in v]
        if not of_ranks:
            continue
        name = f"all-reduce {where}"
        wrong = [f"rank {rank} ({came[rank]['host']})" for rank, v in of_ranks if not v["right"]]
        sizes = set.intersection(*(set(v["gb_s"]) for _, v in of_ranks))
        speeds = {size: min(v["gb_s"][size] for _, v in of_ranks) for size in sorted(sizes, key=int)}
        last = max(sizes, key=int)
        slowest, v = min(of_ranks, key=lambda x: x[1]["gb_s"][last])
        bus = speeds[last] * v["bus"]
        shown = ", ".join(f"{gb_s:.2f} GB/s at {int(size) >> 20} MiB" for size, gb_s in speeds.items())
        latency = 1e6 * max(v["latency_s"] for _, v in of_ranks)
        found = f"{shown} on {v['ranks']} ranks; bus {bus:.2f} GB/s (x {v['bus']:.2f}), latency {latency:,.0f} us"
        node_gbit = 8 * bus * min(map(len, nodes))
        if wrong:
            yield fail(name, f"wrong sums on {', '.join(wrong)}", CURES["all-reduce"])
        elif key == "between" and cfg.network_gbit and node_gbit < SLOW_NETWORK * cfg.network_gbit:
            yield warn(
                name,
                f"{found}: {node_gbit:,.0f} Gbit/s a node, cluster.network_gbit={cfg.network_gbit:g}; slowest at rank "
                f"{slowest} ({came[slowest]['host']})",
                "see with NCCL_DEBUG=INFO which interface is taken; set NCCL_SOCKET_IFNAME or NCCL_IB_HCA",
            )
        else:
            yield ok(name, found)


def clock(came: list[Any], skews: dict[str, Sequence[float]]) -> Iterator[Finding]:
    """`skews`: by rank, (seconds ahead of rank 0, at most how wrong that is)."""
    if not skews:
        yield ok("clock", "one node, one clock")
        return
    rank, (skew, error) = max(skews.items(), key=lambda x: abs(x[1][0]))
    found = f"at most {skew:+.4f} s from rank 0's, on {came[int(rank)]['host']} (error at most {error:.4f} s)"
    if abs(skew) > SKEW_S + error:
        yield warn("clock", found, "start NTP on all nodes: logs and heartbeats tell by the clock")
    else:
        yield ok("clock", found)


def disk(came: list[Any], values: list[Any]) -> Iterator[Finding]:
    unseen = [f"{came[r]['host']}" for r, v in enumerate(values) if v is False]
    if unseen:
        told = f"what rank 0 wrote is not what is read on {', '.join(dict.fromkeys(unseen))}"
        yield fail("run.dir", told, "give a run.dir that all nodes share")
        return
    yield ok("run.dir", "every rank reads what rank 0 wrote there")
    rates = {came[r]["host"]: v for r, v in enumerate(values) if v is not None}
    host = min(rates, key=lambda h: rates[h])
    found = f"{sum(rates.values()):,.0f} MB/s from {len(rates)} nodes at once, slowest {host} with {rates[host]:,.0f}"
    if rates[host] < SLOW_MB_S:
        yield warn(
            "run.dir speed", found, "give a run.dir on a faster disk, or save less often (checkpoint.every_steps)"
        )
    else:
        yield ok("run.dir speed", found)


def failures(values: list[Any]) -> dict[int, str]:
    return {rank: v["failed"] for rank, v in enumerate(values) if isinstance(v, dict) and "failed" in v}


def said(bad: dict[int, str], came: list[Any]) -> str:
    more = f", and {len(bad) - 2} more ranks" if len(bad) > 2 else ""
    return "; ".join(f"rank {r} ({came[r]['host']}): {why}" for r, why in list(bad.items())[:2]) + more
