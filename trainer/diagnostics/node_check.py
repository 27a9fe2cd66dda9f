"""Entry: `python -m trainer.diagnostics.node_check run.dir=...` on every rank; rank 0 prints one JSON object.

launch.doctor node=true starts it, through srun or torchrun. The ranks meet in a store at each check, so that a missing
rank is named; an error on one rank is sent there too, and delays nobody.
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
from trainer.diagnostics.check_result import CheckResult, State, fail
from trainer.diagnostics.node_results import group_result, measured_results, node_results
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

    results: list[CheckResult] = []
    try:
        examine(cfg, Meeting(world, cfg.timeout_s), facts, results)
    except MissedError as e:
        results.append(fail("ranks", str(e), "look at those ranks' output and nodes; timeout_s= gives them longer"))
    except (RuntimeError, OSError, ValueError) as e:  # torch's are the first, also of a store that has gone
        server = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        cure = "open the firewall between the nodes, and mend what the name of the first node stands for"
        results.append(fail("ranks", f"rank {world.rank} on {facts['host']} and {server}: {e}", cure))
    failed = [result for result in results if result.state is State.fail]
    if world.is_main:
        print(json.dumps({"findings": [result.as_json() for result in results]}), flush=True)
    elif failed:
        print("\n".join(map(str, failed)), file=sys.stderr, flush=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(bool(failed))  # a group that lost a rank would delay the interpreter's end


def examine(cfg: NodeCheckConfig, meeting: Meeting, own: dict[str, Any], results: list[CheckResult]) -> None:
    """Fill `results`, which are kept if a rank is missed half-way."""
    from trainer.diagnostics import node_measure
    from trainer.diagnostics.node_store import nodes_of

    device = node_measure.device_of(meeting.world)
    own["torch_gpus"] = 0 if device.type == "cpu" else node_measure.torch.cuda.device_count()
    facts = meeting.gather("start", own)
    nodes = nodes_of([fact["local_rank"] for fact in facts])
    results += node_results(cfg, facts, nodes, meeting.server)
    joined = meeting.gather("process group", tried(lambda: node_measure.join(meeting, device)))
    results.append(group_result(facts, joined))
    measured = {"matmul": meeting.gather("matmul", tried(lambda: node_measure.matmul(device)))}
    if not any(joined) and len(facts) > 1:
        sums = tried(lambda: node_measure.all_reduces(nodes, meeting.world.rank, device, cfg.timeout_s))
        measured["all-reduce"] = meeting.gather("all-reduce", sums)
    firsts = [node[0] for node in nodes]
    measured["clock"] = meeting.gather("clock", tried(lambda: meeting.clocks(firsts[1:])))
    measured["disk"] = shared_folder(Path(cfg.run.dir).absolute(), meeting)
    results += measured_results(cfg, facts, nodes, measured)


def tried(function: Callable[[], Any]) -> Any:
    """The function's value, or {"failed": reason}."""
    try:
        return function()
    except Exception as e:  # whatever it is, the other ranks must hear of it
        return {"failed": f"{type(e).__name__}: {e}"[:500]}


def own_facts(world: World) -> dict[str, Any]:
    """Facts about this rank, and about its node if it is the first there."""
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
        "machine": [result.as_json() for result in checks],
    }


def commit() -> str:
    """The commit of the checkout, with " changed" if files differ from it."""
    code, _ = code_version()
    return f"{code['commit']}{' changed' if code['dirty'] else ''}" if "commit" in code else "no checkout"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def shared_folder(folder: Path, meeting: Meeting) -> list[Any]:
    """By rank: True if it reads in the run folder what rank 0 wrote there."""
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
        return meeting.gather("run folder's mark", tried(lambda: Path(wrote["mark"]).read_text() == wrote["nonce"]))
    finally:
        with suppress(OSError):  # the results tell of a folder that cannot be used
            mark.unlink(missing_ok=True)
            for path in made:  # folders made for this, unless something else lies in them by now
                path.rmdir()


if __name__ == "__main__":
    run(NodeCheckConfig, node_check)
