"""``python -m benchmarks.compare``: what counts as a regression between two results files."""

import json
import math
from pathlib import Path

import pytest

compare = pytest.importorskip(
    "benchmarks.compare.__main__", reason="needs the repository's root on the path"
)

from benchmarks.harness.results import SCHEMA, Results, load  # noqa: E402
from benchmarks.harness.timing import Timing  # noqa: E402


def timing(median: float, noise: float = 0.01) -> Timing:
    return Timing(median, median * 0.99, median * 1.01, noise, 100, 1)


def results_file(
    path: Path, *, ours: float = 1.0, noise: float = 0.01, machine: float = 1.0, **entries: object
) -> Path:
    """Two entries of three contenders, LayerNorm at 2 s; ``machine``: how much slower it is."""
    results = Results(path, "norms", {})
    for key, factor in (("speed/a", ours), ("speed/b", 1.0)):
        times = {"rms_norm": factor, "torch_layer_norm": 2.0, "torch_rms_norm": 4.0}
        put = {k: timing(v * machine, noise) for k, v in times.items()}
        results.put(key, {"times": put})
    for key, entry in entries.items():
        results.put(key, entry)  # type: ignore[arg-type]
    return results.finish()


def compared(
    capsys: pytest.CaptureFixture[str], old: Path, new: Path, *options: str
) -> tuple[int, str]:
    status = compare.main([str(old), str(new), *options])
    return status, capsys.readouterr().out


def test_compare_flags_a_planted_regression(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = results_file(tmp_path / "old.json")
    new = results_file(tmp_path / "new.json", ours=1.2, machine=0.5)
    status, text = compared(capsys, old, new)
    assert status == 1  # although the machine was twice as fast
    (line,) = [line for line in text.splitlines() if "REGRESSION" in line]
    assert line.split()[:4] == ["speed/a", "rms_norm", "torch_layer_norm", "+20.0%"]
    assert "1 regression" in text.splitlines()[-1]
    status, text = compared(capsys, new, old)
    assert status == 0
    assert "faster" in text
    assert compared(capsys, old, new, "--threshold", "0.25")[0] == 0
    assert compared(capsys, old, new, "--reference", "torch_rms_norm")[0] == 1


def test_compare_ignores_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = results_file(tmp_path / "old.json", noise=0.1)
    # The runs' noises add up as squares: 0.1 and 0.1 make 0.141, a factor of 1.152.
    for factor, status in ((1.14, 0), (1.17, 1)):
        new = results_file(tmp_path / "new.json", ours=factor, noise=0.1)
        assert compared(capsys, old, new)[0] == status
    status, text = compared(capsys, old, results_file(tmp_path / "new.json", noise=0.1))
    assert status == 0
    assert "2 contenders compared, 0 regressions" in text


def test_compare_takes_noise_of_the_reference_too(tmp_path: Path) -> None:
    files = [load(results_file(tmp_path / f"{name}.json")) for name in ("old", "new")]
    for data, noise in zip(files, (0.3, 0.4), strict=True):
        data["entries"]["speed/a"]["times"]["torch_layer_norm"]["noise"] = noise
    row = compare.compare(*files).rows[0]
    assert row.key == "speed/a"
    assert row.ratio is not None
    assert row.ratio.noise == pytest.approx(0.5)
    assert row.absolute is not None
    assert row.absolute.noise == pytest.approx(math.hypot(0.01, 0.01))


def test_compare_a_slower_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = results_file(tmp_path / "old.json")
    new = results_file(tmp_path / "new.json", machine=2.0)
    status, text = compared(capsys, old, new)
    assert status == 0
    assert text.count("slower") == 3  # two rows and the title
    assert compared(capsys, old, new, "--absolute")[0] == 1
    data = json.loads(new.read_text())
    data["environment"]["torch"] = "99.0"
    data["environment"]["cpu"]["model"] = "abacus"
    data["environment"]["threads"] = 77
    new.write_text(json.dumps(data))
    status, text = compared(capsys, old, new, "--absolute")  # nothing absolute to judge
    assert status == 0
    assert all(word in text for word in ("-> 99.0", "-> abacus", "-> 77"))


def test_compare_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extra = {"times": {"rms_norm": timing(1.0)}}
    old = results_file(tmp_path / "old.json", **{"speed/gone": extra, "speed/c": extra})
    new = results_file(tmp_path / "new.json", **{"speed/c": {"times": {"quack": timing(1.0)}}})
    _, text = compared(capsys, old, new)
    assert "missing: speed/gone: not in NEW" in text
    assert "contender rms_norm: not in NEW, in 1 of" in text
    assert "contender quack: not in OLD, in 1 of" in text


def test_compare_without_a_reference_judges_absolute_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name, median in (("old", 1.0), ("new", 1.3)):
        results = Results(tmp_path / f"{name}.json", "norms", {})
        results.put("speed/a", {"times": {"rms_norm": timing(median)}})
        paths.append(results.finish())
    assert compared(capsys, *paths)[0] == 1


def test_compare_memory_is_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    less, more = ({"memory/a": {"saved": {"rms_norm": n, "torch_rms_norm": 9 - n}}} for n in (4, 5))
    old = results_file(tmp_path / "old.json", **less)
    new = results_file(tmp_path / "new.json", **more)
    status, text = compared(capsys, old, new)
    assert status == 1
    assert "REGRESSION: memory/a rms_norm: saved bytes 4 -> 5" in text
    assert compared(capsys, new, old)[0] == 0


def test_compare_refuses_what_has_nothing_in_common(tmp_path: Path) -> None:
    old, new = results_file(tmp_path / "old.json"), tmp_path / "new.json"
    results = Results(new, "norms", {})
    results.put("speed/other", {"times": {}})
    results.finish()
    assert compare.main([str(old), str(new)]) == 2
    data = json.loads(old.read_text())
    new.write_text(json.dumps({**data, "kind": "paper"}))
    assert compare.main([str(old), str(new)]) == 2
    assert compare.main([str(old), str(tmp_path / "none.json")]) == 2
    new.write_text(json.dumps({**data, "schema": SCHEMA + 1}))
    assert compare.main([str(old), str(new)]) == 2
