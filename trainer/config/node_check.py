"""Settings of trainer.diagnostics.node_check. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from conf.errors import MISSING, UserError


@dataclass
class NodeRunConfig:
    dir: str = MISSING  # the run folder, whose disk is tried from every node


@dataclass
class NodeCheckConfig:
    """`python -m trainer.diagnostics.node_check`, on every rank; launch.doctor node=true starts it."""

    run: NodeRunConfig = MISSING
    gpus_per_node: int = 0  # that a node must have; 0 = ranks on CPUs
    network_gbit: float | None = None  # of a node; null = what is measured between nodes is held against nothing
    timeout_s: float = 60.0  # for ranks to come, and for each measurement

    def __post_init__(self) -> None:
        if not 1 <= self.timeout_s < 86400:
            raise UserError(f"timeout_s={self.timeout_s}: give seconds, at least 1 and less than a day")
