"""benchmarks/paper: properties in numbers, statistics, a run that is stopped and goes on, a report
with every row."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("benchmarks.paper", reason="needs the repository's root on the path")
pytest.importorskip("sklearn", reason="the digits: benchmarks/requirements.txt")

from tables import rows_starting
from tiny_models import tiny

import benchmarks.paper.__main__ as paper
from benchmarks.harness.results import load
from benchmarks.harness.timing import Timing
from benchmarks.paper import report, step_time, tasks
from benchmarks.paper.models import MODELS
from benchmarks.paper.norms import LABELS, TIMED, make_norm
from benchmarks.paper.properties import INVARIANT, gradient_norms, invariance
from benchmarks.paper.quality import curve
from benchmarks.paper.summary import mean_curve, reduction, spread

CPU = torch.device("cpu")

# -- properties -----------------------------------------------------------------------------------


def test_table_1(device):
    changes = invariance(torch.device(device))["change"]
    for change, values in changes.items():
        for norm, value in values.items():
            assert value < 1e-4 if change in INVARIANT[norm] else value > 0.1, (change, norm)


def test_few_elements_make_gradients_explode():
    norms = gradient_norms(CPU, (1, 4, 128), n=128, layers=6)["norms"]
    assert norms["1"]["max"] > 100 * norms["128"]["max"]
    assert norms["1"]["max"] > 10 * norms["4"]["max"]
    assert all(v["p50"] <= v["p99"] <= v["max"] for v in norms.values())


# -- statistics -----------------------------------------------------------------------------------


def timing(median: float, noise: float = 0.01) -> Timing:
    return Timing(median, median, median, noise, 10, 1)


def test_reductions():
    times = {
        "layer_norm": timing(2.0),
        "rms_norm": timing(1.5),
        "prms_norm": timing(1.99),
        "torch_rms_norm": timing(2.5),
    }
    assert reduction(times["rms_norm"], times["layer_norm"]) == 0.25
    assert report.saved(times, "rms_norm", "layer_norm") == "25.0 %"
    assert report.saved(times, "prms_norm", "layer_norm") == "="
    assert report.saved(times, "torch_rms_norm", "layer_norm") == "25.0 % slower"
    assert report.saved(times, "layer_norm", "layer_norm") == ""
    assert report.saved(times, "none", "layer_norm") == ""
    assert report.published("rnnsearch", "rms_norm") == "11 … 34 %"
    assert report.published("order_embeddings", "prms_norm") == "63.9 %"
    assert report.published("vit", "rms_norm") == ""


def test_remarks_say_where_it_does_not_win():
    def remarks(rms_norm: float, composed: float = 3.0, model: str = "transformer") -> str:
        times = {
            "none": timing(1.9),
            "layer_norm": timing(2.0),
            "layer_norm_composed": timing(composed),
            "rms_norm": timing(rms_norm),
            "prms_norm": timing(rms_norm - 0.01),
        }
        shares = {n: {"share": s} for n, s in (("layer_norm", 0.06), ("rms_norm", 0.05))}
        entry = {"model": model, "shares": shares}
        entry["times"] = {n: dataclasses.asdict(t) for n, t in times.items()}
        return " ".join(report.remarks({"entries": {f"time/{model}": entry}}))

    assert remarks(1.8) == ""
    assert "no difference from native LayerNorm beyond the noise of 1.0 %" in remarks(2.01)
    assert "LayerNorm is 6.0 % of its step and RMSNorm 5.0 %" in remarks(2.01)
    assert "10.0 % slower than native LayerNorm" in remarks(2.2)
    less = remarks(1.95, composed=2.0)
    assert "RMSNorm (ours) saves 2.5 %, in the paper 6.9 %" in less
    assert "pRMSNorm 6.25 % (ours) saves 3.0 %, in the paper 9.3 %" in less
    assert "leaving the norms out altogether saves 5.0 %" in less
    assert remarks(1.95, composed=2.0, model="vit") == ""
    equal = remarks(1.995, composed=2.0)
    noise = "from the paper's LayerNorm beyond the noise of 1.0 %; in the paper it saves"
    assert f"no difference of RMSNorm (ours) {noise} 6.9 %" in equal
    assert f"no difference of pRMSNorm 6.25 % (ours) {noise} 9.3 %" in equal
    assert "(ours) saves" not in equal


def test_spread_and_curves():
    s = spread([1.0, 2.0, 6.0])
    assert (s.mean, s.low, s.high, s.runs, s.diverged) == (3.0, 1.0, 6.0, 3, 0)
    assert s.deviation == pytest.approx(math.sqrt(7))
    assert (spread([None, 4.0]).mean, spread([None, 4.0]).diverged) == (4.0, 1)
    assert report.quality_cell([None, None]) == "diverged"
    assert report.quality_cell([None, 4.0]) == "4.000 ± 0.000 (1 of 2 diverged)"
    assert report.quality_cell([98.0, 99.0]) == "98.50 ± 0.71"
    assert curve([1.0, 3.0, 5.0, 7.0, 9.0], points=3) == [[2, 2.0], [4, 6.0], [5, 9.0]]
    assert curve([1.0, math.inf], points=2) == [[1, 1.0], [2, None]]
    (first, second) = mean_curve([[[1, 1.0], [2, 2.0]], [[1, 3.0], [2, None]]])
    assert first == (1, 2.0)
    assert math.isnan(second[1])


def test_share_of_normalisation():
    rest = [("aten::mm", 60.0, 9), ("autograd::engine::evaluate_function: MmBackward0", 20.0, 9)]
    native = [("aten::native_layer_norm", 5.0, 3), ("NativeLayerNormBackward0", 15.0, 3)]
    ours = [("fused_rmsnorm::rms_norm_fwd", 4.0, 2), ("fused_rmsnorm::rms_norm_bwd", 14.0, 2)]
    nodes = [("autograd::engine::evaluate_function: RmsNormBackward", 2.0, 2)]
    assert step_time.norms_among(rest + native) == (20, 100, 3)
    assert step_time.norms_among(rest + ours + nodes) == (20, 100, 2)
    assert step_time.norms_among(rest) == (0, 80, 0)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "prms_norm", "none"])
def test_the_profiler_finds_the_norms(norm):
    """The names of the events are torch's and ours to change."""
    module = nn.Sequential(*(make_norm(norm)(1024) for _ in range(3)))
    x = torch.randn(512, 1024, requires_grad=True)
    steps = {norm: lambda x: module(x).sum().backward()}
    found = step_time.normalisation_shares(steps, x, CPU)[norm]
    if norm == "none":
        assert found == {"share": 0, "microseconds": 0, "calls": 0}
    else:
        assert 0 < found["share"] < 1
        assert found["calls"] == 3
        assert found["microseconds"] > 0
        assert report.per_norm({"shares": {norm: found}}) == f"{found['microseconds']:.1f}"


# -- the run --------------------------------------------------------------------------------------


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODELS:
        spec = dataclasses.replace(MODELS[name], scaled=lambda scale, name=name: tiny(name))
        monkeypatch.setitem(MODELS, name, spec)


SHORT = ["--seconds", "0", "--steps", "4", "--seeds", "1", "--device", "cpu", "--out"]


@pytest.mark.usefixtures("tiny_models")
def test_a_run_reports_every_row(tmp_path: Path):
    models = ["order_embeddings", "convpool_cnn", "dna_cnn"]
    chosen = ["--models", *models, "--tasks", "digits_vit", "characters_gru"]
    assert paper.main([*chosen, *SHORT, str(tmp_path)]) == 0
    data = load(tmp_path / "paper.json")
    assert data["complete"]
    text = (tmp_path / "paper.md").read_text()
    for name in models:
        summary, *each = rows_starting(text, MODELS[name].title)
        assert len(summary) == 11
        assert {cells[1] for cells in each} == {LABELS[n] for n in TIMED} | {"(Adam alone)"}
    for name in ("digits_vit", "characters_gru"):
        (cells,) = rows_starting(text, tasks.TASKS[name].title)
        assert len(cells) == 3 + len(paper.TRAINED)
        assert all("±" in cell or cell == "diverged" for cell in cells[3:])
    for change in invariance(CPU)["change"]:
        assert len(rows_starting(text, change)) == 1
    for plot in ("time", "curves", "gradients"):
        assert (tmp_path / f"paper_{plot}.png").stat().st_size > 5000
    # The report is a command of its own, and reads the file alone.
    (tmp_path / "paper.md").unlink()
    assert report.main([str(tmp_path / "paper.json")]) == 0
    assert (tmp_path / "paper.md").read_text() == text


@pytest.mark.usefixtures("tiny_models")
def test_a_run_that_is_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    timed = []

    def time_model(name: str, *args: object) -> dict:
        if name == "vit" and "vit" not in timed:
            timed.append(name)
            raise KeyboardInterrupt
        timed.append(name)
        return step_time.time_model(name, *args)

    monkeypatch.setattr(paper, "time_model", time_model)
    models = ["dna_cnn", "vit", "dit"]
    arguments = ["--only", "time", "--models", *models, "--norms", "layer_norm", "rms_norm"]
    arguments += [*SHORT, str(tmp_path)]
    assert paper.main(arguments) == 130
    assert "stopped: 1 entries kept" in capsys.readouterr().out
    assert not (tmp_path / "paper.json").exists()
    assert paper.main(arguments) == 0
    assert timed == ["dna_cnn", "vit", "vit", "dit"]
    assert list(load(tmp_path / "paper.json")["entries"]) == [f"time/{name}" for name in models]
    assert not (tmp_path / "paper.partial.json").exists()


def test_a_scale_above_the_published_one_is_refused():
    with pytest.raises(SystemExit, match="--scale must be in"):
        paper.options_of(paper.parse(["--scale", "2"]))


@pytest.mark.parametrize("scale", ["0", "-0.1", "nan"])
def test_a_scale_of_nothing_is_refused(scale):
    with pytest.raises(SystemExit, match="--scale must be in"):
        paper.options_of(paper.parse(["--scale", scale]))


@pytest.mark.usefixtures("tiny_models")
def test_a_scale_has_files_of_its_own(tmp_path: Path):
    """A run at the published sizes does not overwrite what the default wrote."""
    arguments = ["--only", "time", "--models", "dna_cnn", "--norms", "layer_norm", "rms_norm"]
    arguments += [*SHORT, str(tmp_path)]
    assert paper.main(arguments) == 0
    before = (tmp_path / "paper.json").read_bytes()
    assert paper.main([*arguments, "--scale", "1"]) == 0
    assert (tmp_path / "paper.json").read_bytes() == before
    stems = {"paper", "paper_scale_1"}
    names = {f"{stem}{end}" for stem in stems for end in (".json", ".md", "_time.png")}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert "![time](paper_scale_1_time.png)" in (tmp_path / "paper_scale_1.md").read_text()
    assert "scale 1 of batch" in (tmp_path / "paper_scale_1.md").read_text()
