"""Whether the run that is given may start, on as many ranks as the cluster has."""

from __future__ import annotations

from dataclasses import replace

from data_pipeline.config import UserError
from launch.cluster_config import ClusterConfig
from trainer.arithmetic import param_count
from trainer.check import check
from trainer.config import PretrainConfig
from trainer.finding import Finding, fail, ok
from trainer.world import World

CHECKPOINT_BYTES = 12  # a parameter: fp32 weights and two moments


def trainable(cfg: PretrainConfig, cluster: ClusterConfig) -> Finding:
    """All that its ranks would refuse."""
    ranks = cluster.nodes * cluster.gpus_per_node
    try:
        checked = check(replace(cfg, gpu=cluster.gpu), World(0, ranks, 0, cluster.gpus_per_node))
    except (UserError, OSError) as e:
        return fail("run", str(e), "change what it names, behind the --")
    step = checked.state.get("step", 0)
    found = f"{cfg.run.name} may start on {ranks} ranks, from step {step} of {cfg.max_steps}"
    return ok("run", f"{found}; {checked.chosen}" if checked.chosen else found)


def checkpoint_bytes(cfg: PretrainConfig) -> int:
    """Of all checkpoints that stand at once: those kept, the best, and the one that is being written."""
    return CHECKPOINT_BYTES * param_count(cfg.model) * (cfg.checkpoint.keep + cfg.checkpoint.keep_best + 1)
