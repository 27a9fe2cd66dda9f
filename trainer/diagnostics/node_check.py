"""Entry: `python -m trainer.diagnostics.node_check run.dir=...` on every rank; rank 0 prints one JSON object.

launch.doctor node=true starts it, through srun or torchrun. The ranks meet at each measurement in a store, so that one
that does not come is named; an error on one rank is brought there, and holds nobody up.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any

from conf.schema import run
from trainer.config.node_check import NodeCheckConfig
from trainer.diagnostics import machine
from trainer.diagnostics.check_result import Finding, State, fail
from trainer.diagnostics.node_findings import came_findings, group_finding, measured_findings
from trainer.distributed.world import World, read_world
from trainer.run.code_version import code_version
from trainer.run.nvidia_smi import nvidia_smi

if TYPE_CHECKING:
    from trainer.diagnostics.node_store import Meeting

SMI = ("index", "name", "memory.total", "memory.used", "driver_version", "ecc.errors.uncorrected.volatile.total")
PACKAGES = ("gradus", "torch", "deepspeed", "megatron-core", "numpy")


def node_check(cfg: NodeCheckConfig) -> None:
    world = read_world()
    facts = own_facts(world)  # nvidia-smi's memory before any rank starts on a GPU
    from trainer.diagnostics.node_store import Meeting, MissedError  # from here on torch

    findings: list[Finding] = []
    try:
        meeting = Meeting(world, cfg.timeout_s)
        examine(cfg, meeting, facts, findings)
    except MissedError as e:
        findings.append(fail("ranks", str(e), "look at those ranks' output and nodes; timeout_s= gives them longer"))
    except (RuntimeError, OSError, ValueError) as e:  # torch's are the first, of a store that went away too
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        cure = "open the firewall between the nodes, and mend what the name of the first node stands for"
        findings.append(fail("ranks", f"rank {world.rank} on {facts['host']} and {where}: {e}", cure))
    failed = [finding for finding in findings if finding.state is State.fail]
    if world.is_main:
        print(json.dumps({"findings": [finding.as_json() for finding in findings]}), flush=True)
    elif failed:
        print("\n".join(map(str, failed)), file=sys.stderr, flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(bool(failed))  # a group that lost a rank would hold the interpreter's end up


def examine(cfg: NodeCheckConfig, meeting: Meeting, facts: dict[str, Any], findings: list[Finding]) -> None:
    """Fill `findings`, which stand also where a rank is missed half-way."""
    from trainer.diagnostics import node_measure
    from trainer.diagnostics.node_store import nodes_of

    world = meeting.world
    device = node_measure.device_of(world)
    facts["torch_gpus"] = 0 if device.type == "cpu" else node_measure.torch.cuda.device_count()
    came = meeting.gather("start", facts)
    nodes = nodes_of([fact["local_rank"] for fact in came])
    findings += came_findings(cfg, came, nodes, meeting.address)
    joined = meeting.gather("process group", tried(lambda: node_measure.join(meeting, device)))
    findings.append(group_finding(came, joined))
    works = not any(joined)
    told: dict[str, list[Any]] = {"matmul": meeting.gather("matmul", tried(lambda: node_measure.matmul(device)))}
    if works and world.world_size > 1:
        measured = tried(lambda: node_measure.all_reduces(nodes, world.rank, device, cfg.timeout_s))
        told["all-reduce"] = meeting.gather("all-reduce", measured)
    firsts = [node[0] for node in nodes]
    told["clock"] = meeting.gather("clock", tried(lambda: meeting.clocks(firsts[1:])))
    told["disk"] = disk(Path(cfg.run.dir).absolute(), meeting)
    findings += measured_findings(cfg, came, nodes, told)


def tried(function: Callable[[], Any]) -> Any:
    """What it returns, or {"failed": why}."""
    try:
        return function()
    except Exception as e:  # whatever it is, the other ranks must hear of it
        return {"failed": f"{type(e).__name__}: {e}"[:500]}


def own_facts(world: World) -> dict[str, Any]:
    """Of this rank, and of its node where it is the first there."""
    first = world.local_rank == 0
    addresses = machine.own_addresses()
    git = {"commit": commit()} if first else {}  # four commands, on a disk that all nodes may share
    checks = [machine.shared_memory(), machine.open_files(), machine.locked_memory()] if first else []
    return {
        "host": machine.node_name(),
        "local_rank": world.local_rank,
        "addresses": addresses,
        "loopback": machine.is_loopback(addresses),
        "interface": os.environ.get("GLOO_SOCKET_IFNAME", ""),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "smi": nvidia_smi(*SMI) if first else [],
        "versions": {"python": python_version(), **{name: _version(name) for name in PACKAGES}, **git},
        "machine": [finding.as_json() for finding in checks],
    }


def commit() -> str:
    found, _ = code_version()
    return f"{found['commit']}{' changed' if found['dirty'] else ''}" if "commit" in found else "no checkout"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def disk(folder: Path, meeting: Meeting) -> list[Any]:
    """By rank: whether it reads what rank 0 wrote into the run folder, and MB/s that all nodes write there at once."""
    made: list[Path] = []
    mark = folder / f".doctor-{secrets.token_hex(8)}"
    nonce = secrets.token_hex(16)

    def write() -> dict[str, str]:
        if meeting.world.is_main:
            made.extend(p for p in (folder, *folder.parents) if not p.exists())
            folder.mkdir(parents=True, exist_ok=True)
            mark.write_text(nonce)
        return {"mark": str(mark), "nonce": nonce}

    try:
        wrote = meeting.gather("run folder", tried(write))[0]
        if "failed" in wrote:
            return [wrote] * meeting.world.world_size
        seen = tried(lambda: Path(wrote["mark"]).read_text() == wrote["nonce"])
        every = meeting.gather("run folder's mark", seen)
        if not all(s is True for s in every):
            return every
        rate = tried(lambda: machine.write_speed(folder)) if meeting.world.local_rank == 0 else None
        return meeting.gather("run folder's speed", rate)
    finally:
        with suppress(OSError):  # a folder that cannot be used is told of above
            mark.unlink(missing_ok=True)
            for path in made:  # what was made for this, where nothing else has come to lie in it
                path.rmdir()


if __name__ == "__main__":
    run(NodeCheckConfig, node_check)
