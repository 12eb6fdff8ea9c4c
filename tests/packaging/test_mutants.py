"""The faults of ``make mutants``: each has its place in the sources, and a survivor is seen."""

from pathlib import Path

import pytest

from mutants import Layer, Mutant
from mutants.__main__ import LAYERS, ROOT, Runner, numbered, texts
from mutants.planting import planted


def test_every_fault_has_its_place() -> None:
    mutants = numbered(LAYERS)
    assert len(mutants) >= 60
    files = texts(mutants, ROOT)  # raises where a text is not there, or not alone
    for number, (layer, mutant) in mutants.items():
        assert mutant.old != mutant.new
        if layer.name != "python":
            assert files[layer.path(mutant)].count(f"fused_rmsnorm_mutant({number})") == 1


def test_planting() -> None:
    less, no_eps = Mutant("f.h", "a < b", "a <= b", ""), Mutant("f.h", "v + eps", "v", "")
    text = "if (a < b) r = sqrt(v + eps);"
    assert planted(text, {3: no_eps, 8: less}, "f.h") == (
        "if ((fused_rmsnorm_mutant(8) ? (a <= b) : (a < b))) "
        "r = sqrt((fused_rmsnorm_mutant(3) ? (v) : (v + eps)));"
    )
    with pytest.raises(ValueError, match="2 times"):
        planted(text + text, {8: less}, "f.h")
    with pytest.raises(ValueError, match="0 times"):
        planted("", {8: less}, "f.h")
    with pytest.raises(ValueError, match="overlap"):
        planted(text, {3: no_eps, 4: Mutant("f.h", "sqrt(v", "(v", "")}, "f.h")


def test_caught_and_not(tmp_path: Path) -> None:
    source = "def largest(a, b):\n    return a if a > b else b\n"
    (tmp_path / "toy.py").write_text(source)
    (tmp_path / "test_toy.py").write_text(
        "from toy import largest\n\n\ndef test_largest():\n    assert largest(1, 2) == 2\n"
    )
    caught = Mutant("toy.py", "a > b", "a < b", "the smallest")
    survivor = Mutant("toy.py", "a > b", "a >= b", "the same")
    layer = Layer("python", ".", ("test_toy.py",), (caught, survivor))
    runner = Runner(tmp_path)
    runner.unharmed(layer, "test_toy.py")
    assert runner.caught(layer, 1, caught) == "test_toy.py::test_largest"
    assert runner.caught(layer, 2, survivor) is None
    assert (tmp_path / "toy.py").read_text() == source
