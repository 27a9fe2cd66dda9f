"""tests.mutants: each operator edits one line, the draw repeats itself, and what is done is found again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from tests.mutants import Journal, draw, files_for, mutants_of, one

SOURCE = '''
def f(a: "int > 3", b=2):
    """1 < 2"""
    é = "é" if a < b and b is not None else g(a, b + 1.5)
    h(é)
    return é
'''


def test_each_operator_edits_one_line() -> None:
    found = {(m.operator, m.line, m.after.strip()) for m in mutants_of("x.py", SOURCE)}
    line = 'é = "é" if a < b and b is not None else g(a, b + 1.5)'
    assert found == {
        ("constant", 2, 'def f(a: "int > 3", b=3):'),
        ("comparison", 4, line.replace("a < b", "a >= b")),
        ("comparison", 4, line.replace("is not", "is")),
        ("and/or", 4, line.replace(" and ", " or ")),
        ("arguments", 4, line.replace("g(a, b + 1.5)", "g(b + 1.5, a)")),
        ("constant", 4, line.replace("1.5", repr(1.5 * 1.1))),
        ("statement", 5, "pass"),
    }


def test_the_same_seed_draws_the_same_of_each_operator() -> None:
    mutants = draw(10, 7, ["launch/status"])
    assert mutants == draw(10, 7, ["launch/status"]) != draw(10, 8, ["launch/status"])
    assert [m.operator for m in mutants[:5]] == ["comparison", "constant", "statement", "and/or", "arguments"]
    assert len({*mutants}) == 10


def test_the_tests_that_import_a_module_come_first() -> None:
    found = files_for("trainer/run/journal.py")
    plots, redact = "tests/unit/trainer/tracking/test_plots.py", "tests/unit/trainer/run/test_redact.py"
    assert found[0].startswith("tests/unit/") and found.index(plots) < found.index(redact)
    assert "tests/system/test_status.py" in files_for("launch/status/state.py")


@pytest.mark.slow
def test_a_mutant_is_tried_in_the_copy_and_noted(tmp_path: Path) -> None:
    """Its tests fail with it, pass without it, and the copy is as before."""
    journal, scratch = Journal(tmp_path / "build/journal.jsonl"), tmp_path / "copy"
    source = "def f(a, b):\n    return a < b\n"
    [mutant] = mutants_of("trainer/run/exit_codes.py", source)
    (scratch / "trainer/run").mkdir(parents=True)
    (scratch / "trainer/run/exit_codes.py").write_text(source)
    tests = files_for(mutant.path)
    test = f"import runpy\n\ndef test_f():\n    assert runpy.run_path({str(scratch / mutant.path)!r})['f'](1, 2)\n"
    for name in tests:
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        (scratch / name).write_text(test)
    end, seconds = one(mutant, scratch, journal)
    assert end.startswith(f"killed by FAILED {tests[0]}::test_f") and seconds > 0
    assert (scratch / mutant.path).read_text() == source
    journal.add(asdict(mutant), end, seconds)
    with journal.path.open("a") as f:
        f.write('{"key": torn')
    again = Journal(journal.path)
    assert [row["end"] for row in again.done] == ["survived", end]
    assert again.find(asdict(mutant)) == again.done[1] and again.find({"tests": tests}) == again.done[0]
