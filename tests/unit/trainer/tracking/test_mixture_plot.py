"""mixture.png: drawn where there is something to see, from the plan, and in nobody's way where it cannot be drawn."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.order.ledger import Ledger
from data_pipeline.order.plan import Plan
from tests.helpers.ranks import ROOT

matplotlib = pytest.importorskip("matplotlib", reason="the tracking extra is not installed")

TOKENS = {"web": [4000, 3000], "books": [900, 800]}
START = Ledger.start(8, 64, {"books": 1, "web": 3})
BLUE, RED = (0x44, 0x77, 0xAA), (0xEE, 0x66, 0x77)  # of the first source and the second, by name


def plan(ledger: Ledger, *names: str) -> Plan:
    return Plan({name: TOKENS[name] for name in names or TOKENS}, ledger, lanes=4, seed=1)


def pixels(png: bytes) -> np.ndarray:
    """[rows, columns, 3]: 0 to 255"""
    from matplotlib.image import imread

    return np.round(255 * imread(io.BytesIO(png), format="png")[:, :, :3]).astype(int)


def share_of_blue(png: bytes, column: float) -> float:
    """The first source's part of the two bands at `column`, a part of their width; their panel is the top half."""
    picture = pixels(png)
    picture = picture[: len(picture) // 2, : int(0.85 * picture.shape[1])]  # beside the legend
    blue, red = ((picture == colour).all(axis=2) for colour in (BLUE, RED))
    columns = np.flatnonzero((blue | red).sum(axis=0) > 50)
    at = columns[int(column * (len(columns) - 1))]
    return float(blue[:, at].sum() / (blue[:, at].sum() + red[:, at].sum()))


def test_the_bands_are_the_shares_of_the_stages() -> None:
    from trainer.tracking.mixture_plot import draw

    # 4 + 4 steps of as many tokens: the picture changes half way
    ledger = START.then(4, weights={"books": 3, "web": 2})
    png = draw(plan(ledger), 0, 8, "a $name_ of {no} formula")
    assert abs(share_of_blue(png, 0.25) - 1 / 4) < 0.02
    assert abs(share_of_blue(png, 0.75) - 3 / 5) < 0.02
    png = draw(plan(ledger), 0, 4, "shorter")  # what max_steps leaves out is not drawn
    assert all(abs(share_of_blue(png, column) - 1 / 4) < 0.02 for column in (0.05, 0.5, 0.95))


def test_runs_of_every_kind_are_drawn() -> None:
    """Many sources, a long ramp, lost shards, another n_ctx, a jump, all done or nothing."""
    from trainer.tracking.mixture_plot import draw

    names = [f"_s{n}" for n in range(13)]
    ledger = Ledger.start(4, 16, dict.fromkeys(names, 1))
    for step in range(1, 40):
        ledger = ledger.then(step, windows_per_step=4 + 4 * step)
    ledger = ledger.then(41, n_ctx=8).then(42, position=ledger.position(60)).lose(43, "_s3", 1)
    run = Plan({name: [300, 200] for name in names}, ledger, lanes=4, seed=1)
    for step in (0, 20, 43, 50):
        assert pixels(draw(run, step, 50, "x")).std() > 10
    assert pixels(draw(plan(START), 0, 1, "one step")).std() > 10


def test_a_new_plan_replaces_the_picture_and_one_source_has_none(tmp_path: Path) -> None:
    from trainer.tracking.mixture_plot import MixturePlot

    one, two = (MixturePlot(tmp_path / f"{name}.png", name, 8) for name in ("one", "two"))
    one.show(plan(Ledger.start(8, 64, {"web": 1}), "web"), 0)
    two.show(plan(START), 0)
    two.show(plan(START.then(4, weights={"books": 3, "web": 2})), 0)
    one.close()
    two.close()
    two.close()
    assert [f.name for f in tmp_path.iterdir()] == ["two.png"]  # whole, nothing left aside
    png = (tmp_path / "two.png").read_bytes()
    assert abs(share_of_blue(png, 0.9) - 3 / 5) < 0.02


@pytest.mark.parametrize("how", ["not installed", "broken"])
def test_without_matplotlib_one_line_says_why(tmp_path: Path, how: str) -> None:
    """`not installed`: nothing on the path; `broken`: a package of this name that raises when it is imported."""
    broken = tmp_path / "broken"
    (broken / "matplotlib").mkdir(parents=True)
    (broken / "matplotlib" / "__init__.py").write_text("raise OSError('no such library')\n")
    code = (
        "import sys\n"
        "how, broken, path = sys.argv[1:]\n"
        "if how == 'broken':\n"
        "    sys.path.insert(0, broken)\n"
        "else:\n"
        "    import importlib.machinery as m\n"
        "    find = m.PathFinder.find_spec\n"
        "    m.PathFinder.find_spec = lambda name, *a: None if name == 'matplotlib' else find(name, *a)\n"
        "from pathlib import Path\n"
        "from data_pipeline.order.ledger import Ledger\n"
        "from data_pipeline.order.plan import Plan\n"
        "from trainer.tracking.mixture_plot import MixturePlot\n"
        "plot = MixturePlot(Path(path), 'x', 8)\n"
        "ledger = Ledger.start(8, 64, {'web': 1}).then(4, n_ctx=32)\n"
        "plot.show(Plan({'web': [4000]}, ledger, lanes=4, seed=1), 0); plot.close()\n"
    )
    argv = [sys.executable, "-c", code, how, str(broken), str(tmp_path / "x.png")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    why = {"not installed": "matplotlib is not installed (pip install gradus[tracking])", "broken": "no such library"}
    assert done.returncode == 0, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith(f"tracking: {tmp_path}/x.png is not drawn: ") and why[how] in line
    assert not (tmp_path / "x.png").exists()
