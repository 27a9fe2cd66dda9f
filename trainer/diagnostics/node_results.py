"""Judges the numbers that the ranks of a node check gathered. Standard library only: numbers in, results out.

`facts` has an entry for each rank (node_check.py: own_facts); `nodes` the ranks of each node.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from trainer.config.node_check import NodeCheckConfig
from trainer.diagnostics.check_result import CheckResult, State, fail, from_json, ok, warn

SLOW_GPU = 0.85  # of the median over the ranks
SLOW_NETWORK = 0.5  # of cluster.network_gbit
FOREIGN_MIB = 1024  # of a GPU, before any rank of ours has started on it
WRONG = 0.02  # relative error of a product
SKEW_S = 1.0
WORST = (State.fail, State.warn, State.ok)
ECC = "ecc.errors.uncorrected.volatile.total"
CURES = {
    "matmul": "take the node out: its GPU does not compute",
    "all-reduce": "look at the network between the nodes",
    "clock": "look at the network between the nodes",
    "disk": "give a run.dir that every node may write",
}


def node_results(cfg: NodeCheckConfig, facts: list[Any], nodes: list[list[int]], server: str) -> list[CheckResult]:
    """Results from the facts of each rank and node. `server`: the address at which the ranks met."""
    hosts = [str(facts[node[0]]["host"]) for node in nodes]
    names = ", ".join(hosts[:8]) + (", …" if len(hosts) > 8 else "")
    firsts = [facts[node[0]] for node in nodes]
    return [
        ok("ranks", f"all {len(facts)} came to {server}, on {len(nodes)} nodes: {names}"),
        versions(facts),
        host_names(firsts),
        *merged(firsts),
        *gpus(cfg.gpus_per_node, firsts, [len(node) for node in nodes]),
    ]


def versions(facts: list[Any]) -> CheckResult:
    first = facts[0]["versions"]  # a key that only the first rank of a node has does not differ on the others
    differ = [
        f"{key} is {fact['versions'].get(key)} on rank {rank} ({fact['host']}), {value} on rank 0"
        for key, value in first.items()
        for rank, fact in enumerate(facts)
        if fact["versions"].get(key, value) != value
    ]
    if differ:
        cure = "bring checkout and environment to the same state on all nodes, or share them"
        return fail("versions", "; ".join(differ[:3]), cure)
    return ok("versions", "the same on all ranks: " + ", ".join(f"{k} {v}" for k, v in first.items()))


def host_names(firsts: list[Any]) -> CheckResult:
    """gloo gives the others the address that the host's own name stands for."""
    bad = [fact for fact in firsts if fact["loopback"] and not fact["interface"]]
    if len(firsts) > 1 and bad:
        hosts = ", ".join(f"{b['host']} is {', '.join(b['addresses']) or 'nothing'}" for b in bad[:4])
        cure = "set cluster.env.GLOO_SOCKET_IFNAME to the network's interface, or mend /etc/hosts"
        return warn("host names", f"stand for addresses that no other node reaches: {hosts}", cure)
    return ok("host names", "each stands for an address of its node" if len(firsts) > 1 else "one node, none is needed")


def merged(firsts: list[Any]) -> Iterator[CheckResult]:
    """The checks that each node made of itself: the worst result of each, with the nodes that have it."""
    of_nodes = [[from_json(body) for body in fact["machine"]] for fact in firsts]
    for same in zip(*of_nodes, strict=True):
        worst = min(same, key=lambda result: WORST.index(result.state))
        hosts = [fact["host"] for fact, result in zip(firsts, same, strict=True) if result.state is worst.state]
        which = "on all nodes" if len(hosts) == len(firsts) else f"on {', '.join(hosts[:8])}"
        yield replace(worst, text=f"{worst.text}, {which}")


def gpus(wanted: int, firsts: list[Any], ranks: Sequence[int]) -> Iterator[CheckResult]:
    """`wanted`: GPUs that a node must have; `ranks`: the number of them on each node."""
    if not any(fact["smi"] or fact["torch_gpus"] for fact in firsts):
        if wanted:
            cure = "load the driver and ask for GPUs; cluster.gpu=cpu where ranks are to run on CPUs"
            yield warn("GPUs", "none on any node: the ranks would train on CPUs", cure)
        else:
            yield ok("GPUs", "none, and none asked for: ranks on CPUs")
        return
    few = [f for f in firsts if f["torch_gpus"] < wanted]
    unseen = [f for f in firsts if f["visible"] is None and f["smi"] and f["torch_gpus"] != len(f["smi"])]
    short = [f"{f['host']}: {n} ranks" for f, n in zip(firsts, ranks, strict=True) if n < wanted]
    models = sorted({gpu["name"] for f in firsts for gpu in f["smi"]})
    text = f"{firsts[0]['torch_gpus']} a node, {' and '.join(models)}"
    if wanted == 0:
        yield ok("GPUs", f"{text}; ranks on CPUs are asked for")
    elif few or unseen:
        counts = (f"{f['host']}: torch sees {f['torch_gpus']}, nvidia-smi {len(f['smi'])}" for f in (few or unseen))
        cure = "look at nvidia-smi and dmesg there, or take the node out"
        yield fail("GPUs", f"{'; '.join(counts)}; {wanted} are asked for", cure)
    elif short:
        cure = f"ask for all of them (--gpus-per-node={wanted}): GPUs without a rank are not tried"
        yield fail("GPUs", f"{'; '.join(short)} were started, {wanted} GPUs are asked for", cure)
    elif len(models) > 1:
        yield warn("GPUs", text, "take nodes of one kind: all wait for the slowest")
    else:
        yield ok("GPUs", text)
    yield from gpu_state(firsts)


def gpu_state(firsts: list[Any]) -> Iterator[CheckResult]:
    """Memory that other processes hold, and errors that the GPUs counted."""
    every = [(f"{f['host']} GPU {gpu['index']}", gpu) for f in firsts for gpu in f["smi"]]
    if not every:
        return
    taken = [f"{name}: {gpu['memory.used']} MiB" for name, gpu in every if _int(gpu["memory.used"]) > FOREIGN_MIB]
    if taken:
        yield warn("GPU memory", f"held by others: {'; '.join(taken)}", "end those processes (nvidia-smi names them)")
    else:
        yield ok("GPU memory", f"{every[0][1]['memory.total']} MiB each, none held by others")
    errors = [f"{name}: {gpu[ECC]}" for name, gpu in every if _int(gpu[ECC]) > 0]
    if errors:
        text = f"uncorrected since the driver's start: {'; '.join(errors)}"
        yield fail("GPU errors", text, "take the node out, reset the GPU")
    else:
        yield ok("GPU errors", "no uncorrected ones")


def _int(text: str) -> int:
    return int(text) if text.strip().isdecimal() else 0


def group_result(facts: list[Any], joined: list[Any]) -> CheckResult:
    if failed := failures(facts, joined):
        cure = "see host names; open all ports between the nodes; NCCL_DEBUG=INFO or GLOO_SOCKET_IFNAME in cluster.env"
        return fail("process group", failed, cure)
    return ok("process group", f"{len(facts)} ranks joined, and one all-reduce went through")


def measured_results(
    cfg: NodeCheckConfig, facts: list[Any], nodes: list[list[int]], measured: dict[str, list[Any]]
) -> Iterator[CheckResult]:
    """Results from the values that each rank measured, by name."""
    for name, values in measured.items():
        if failed := failures(facts, values):
            yield fail("run.dir" if name == "disk" else name, failed, CURES[name])
        elif name == "matmul":
            yield matmul(facts, values)
        elif name == "all-reduce":
            yield from all_reduce(cfg.network_gbit, facts, min(map(len, nodes)), values)
        elif name == "clock":
            yield clock(facts, values[0])
        else:
            yield shared_folder(facts, values)


def matmul(facts: list[Any], values: list[Any]) -> CheckResult:
    wrong = _ranks(facts, [r for r, v in enumerate(values) if not v["error"] < WRONG])
    rates = [v["tflops"] for v in values]
    typical = statistics.median(rates)
    slow = [f"rank {r} ({facts[r]['host']}) {v:.1f}" for r, v in enumerate(rates) if v < SLOW_GPU * typical]
    text = f"{min(rates):.3g} to {max(rates):.3g} TFLOP/s, median {typical:.3g}, on {values[0]['device']}"
    if wrong:
        return fail("matmul", f"wrong results on {wrong}", CURES["matmul"])
    if slow and values[0]["device"] == "cuda":  # ranks on CPUs share them, with each other and with anyone
        cure = "look at its clocks and heat (nvidia-smi -q), or leave the node out"
        return warn("matmul", f"{text}; slow: {'; '.join(slow)}", cure)
    return ok("matmul", text)


def all_reduce(
    network_gbit: float | None, facts: list[Any], ranks_per_node: int, values: list[Any]
) -> Iterator[CheckResult]:
    """Sums inside nodes and between them. Between nodes all ranks of a node send at once, and share its network."""
    for key, name in (("inside", "all-reduce inside a node"), ("between", "all-reduce between the nodes")):
        of_ranks = {rank: v[key] for rank, v in enumerate(values) if key in v}
        if not of_ranks:
            continue
        slowest = min(of_ranks, key=lambda rank: of_ranks[rank]["gbit_s"])
        node_gbit = of_ranks[slowest]["gbit_s"] * (ranks_per_node if key == "between" else 1)
        text = f"sums over {of_ranks[slowest]['ranks']} ranks are right, {node_gbit:,.1f} Gbit/s"
        wrong = _ranks(facts, [rank for rank, v in of_ranks.items() if not v["right"]])
        if wrong:
            yield fail(name, f"wrong sums on {wrong}", CURES["all-reduce"])
        elif key == "between" and network_gbit and node_gbit < SLOW_NETWORK * network_gbit:
            yield warn(
                name,
                f"{text} a node, cluster.network_gbit={network_gbit:g}; slowest at {_ranks(facts, [slowest])}",
                "see with NCCL_DEBUG=INFO which interface is taken; set NCCL_SOCKET_IFNAME or NCCL_IB_HCA",
            )
        else:
            yield ok(name, text)


def clock(facts: list[Any], skews: dict[str, Sequence[float]]) -> CheckResult:
    """`skews`: by rank, (seconds ahead of rank 0, at most how wrong that is)."""
    if not skews:
        return ok("clock", "one node, one clock")
    rank, (skew, error) = max(skews.items(), key=lambda x: abs(x[1][0]))
    text = f"at most {skew:+.4f} s from rank 0's, on {facts[int(rank)]['host']} (error at most {error:.4f} s)"
    if abs(skew) > SKEW_S + error:
        return warn("clock", text, "start NTP on all nodes: logs and heartbeats tell by the clock")
    return ok("clock", text)


def shared_folder(facts: list[Any], values: list[Any]) -> CheckResult:
    unseen = dict.fromkeys(facts[rank]["host"] for rank, value in enumerate(values) if value is not True)
    if unseen:
        text = f"what rank 0 wrote is not what is read on {', '.join(unseen)}"
        return fail("run.dir", text, "give a run.dir that all nodes share")
    return ok("run.dir", "every rank reads what rank 0 wrote there")


def failures(facts: list[Any], values: list[Any]) -> str:
    """The ranks that failed, with their reasons; "" if none did."""
    failed = {rank: v["failed"] for rank, v in enumerate(values) if isinstance(v, dict) and "failed" in v}
    more = f", and {len(failed) - 2} more ranks" if len(failed) > 2 else ""
    return "; ".join(f"rank {r} ({facts[r]['host']}): {why}" for r, why in list(failed.items())[:2]) + more


def _ranks(facts: list[Any], ranks: Sequence[int]) -> str:
    return ", ".join(f"rank {rank} ({facts[rank]['host']})" for rank in ranks)
