"""The picture of a plan: weak and strong scaling. matplotlib's door; imported when a plot is asked for."""

from __future__ import annotations

from typing import Any

from trainer.plan.network import Cluster
from trainer.tracking.plots import png_of

_COLOURS = {"strong": "#4477aa", "weak": "#ee6677"}  # Tol's bright
_INK, _PALE = "#222222", "#8a8a8a"


def draw(scaling: dict[str, list[dict[str, Any]]], model: str, cluster: Cluster) -> bytes:
    """A PNG: tokens a second, and the share of linear scaling that is left, over the number of GPUs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(9, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    speed, share = figure.subplots(1, 2)
    for kind, points in scaling.items():
        if not points:
            continue
        gpus, rates = [p["gpus"] for p in points], [p["tokens_per_s"] for p in points]
        said = {"strong": "strong: the batch stays", "weak": "weak: the batch grows"}[kind]
        style = {"color": _COLOURS[kind], "marker": "o", "markersize": 4, "linewidth": 1.6, "label": said}
        speed.plot(gpus, rates, **style)
        share.plot(gpus, [100 * r * gpus[0] / (rates[0] * n) for n, r in zip(gpus, rates, strict=True)], **style)
    every = sorted({p["gpus"] for points in scaling.values() for p in points})
    for axes in (speed, share):
        axes.set_xscale("log", base=2)
        axes.set_xticks(every)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_xlabel("GPUs")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_PALE, alpha=0.25, linewidth=0.5)
    speed.set_yscale("log")
    speed.set_ylabel("tokens a second")
    share.set_ylim(0, 108)
    share.set_ylabel("of linear scaling, %")
    share.legend(frameon=False, loc="lower left")
    title = figure.suptitle(f"{model} on {cluster.gpu.name}, simulated", x=0.012, ha="left", fontweight="bold")
    title.set_parse_math(False)
    within = f"{cluster.gpus_per_node} GPUs a node, {cluster.gpu.link_gb_s:g} GB/s between them"
    links = f"{within}, {cluster.network_gbit:g} Gbit/s a node"
    figure.text(0.995, 0.955, links, ha="right", va="bottom", fontsize=8, color=_INK)
    return png_of(figure)
