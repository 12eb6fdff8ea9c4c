"""benchmarks/paper: models that compute what they say with every norm, tasks that follow their
rules, a run that can be stopped, a report with every row."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from reference import Options, rms_norm
from torch import Tensor, nn

paper = pytest.importorskip(
    "benchmarks.paper.__main__", reason="needs the repository's root on the path"
)
pytest.importorskip("sklearn", reason="the digits: benchmarks/requirements.txt")

from benchmarks.harness import Timing, load  # noqa: E402
from benchmarks.paper import report, step_time, tasks  # noqa: E402
from benchmarks.paper.cells import GRU, LSTM  # noqa: E402
from benchmarks.paper.models import MODELS  # noqa: E402
from benchmarks.paper.norms import EPS, LABELS, NORMS, TIMED, make_norm  # noqa: E402
from benchmarks.paper.properties import INVARIANT, gradient_norms, invariance  # noqa: E402
from benchmarks.paper.quality import curve, train_task  # noqa: E402
from benchmarks.paper.summary import mean_curve, reduction, spread  # noqa: E402

CPU = torch.device("cpu")

TINY = {
    "rnnsearch": {"vocabulary": 20, "embedding": 16, "state": 32, "batch": 3, "length": 4},
    "transformer": {
        "vocabulary": 20,
        "width": 32,
        "hidden": 48,
        "layers": 2,
        "heads": 2,
        "batch": 2,
        "length": 5,
    },
    "attentive_reader": {
        "vocabulary": 20,
        "entities": 5,
        "state": 16,
        "batch": 2,
        "document": 4,
        "question": 3,
    },
    "order_embeddings": {
        "vocabulary": 20,
        "words": 8,
        "image": 12,
        "state": 32,
        "batch": 4,
        "length": 3,
    },
    "convpool_cnn": {"image": 8, "narrow": 16, "wide": 32, "batch": 2},
    "llama_block": {
        "width": 32,
        "heads": 4,
        "key_heads": 2,
        "head": 16,
        "hidden": 48,
        "batch": 2,
        "length": 5,
    },
    "vit": {"width": 32, "heads": 2, "layers": 2, "image": 32, "classes": 5, "batch": 2},
    "dit": {"width": 32, "heads": 2, "layers": 2, "tokens": 6, "batch": 2},
    "mamba2": {"width": 32, "inner": 64, "state": 8, "head": 16, "batch": 2, "length": 5},
    "dna_cnn": {"channels": 32, "layers": 2, "kernel": 5, "length": 12, "batch": 2},
}


def tiny(model: str):
    return dataclasses.replace(MODELS[model].sizes(), **TINY[model])


# -- models ---------------------------------------------------------------------------------------


def definition(p: float | None) -> Callable[..., nn.Module]:
    """RMSNorm by the definition that all tests compare with."""

    class Definition(nn.Module):
        def __init__(self, n: int, affine: bool = True) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(n)) if affine else None

        def forward(self, x: Tensor) -> Tensor:
            return rms_norm(x, self.weight, None, Options(eps=EPS, p=p))

    return Definition


PS = {"prms_norm": 0.0625, "prms_norm_12.5": 0.125, "prms_norm_25": 0.25, "prms_norm_50": 0.5}
# What each norm must agree with, loss and gradients.
SAME_AS = {
    "layer_norm": make_norm("layer_norm_composed"),
    "rms_norm": definition(None),
    "torch_rms_norm": definition(None),
    **{name: definition(p) for name, p in PS.items()},
}


def gradients(model: str, norm: Callable[..., nn.Module]) -> dict[str, Tensor]:
    """Parameter -> gradient after one step in fp64, and the loss."""
    sizes = tiny(model)
    batch = MODELS[model].batch(sizes, torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    built = MODELS[model].model(norm, sizes).double()
    torch.manual_seed(2)  # of the dropout
    loss = built(*(t.double() if t.is_floating_point() else t for t in batch))
    loss.backward()
    found = {name: p.grad for name, p in built.named_parameters()}
    return {**found, "loss": loss.detach()}


def test_every_norm_has_its_definition():
    assert SAME_AS.keys() | {"none", "layer_norm_composed"} == NORMS.keys() == LABELS.keys()


@pytest.mark.parametrize("model", MODELS)
def test_loss_and_gradients_are_those_of_the_definition(model):
    for norm in NORMS:
        got = gradients(model, make_norm(norm))
        for name, grad in got.items():
            assert grad is not None, (norm, name)
            assert grad.isfinite().all(), (norm, name)
            # A shift of all keys changes no softmax.
            assert grad.abs().max() > 0 or name.endswith(".k.bias"), (norm, name)
        if norm in SAME_AS:
            expected = gradients(model, SAME_AS[norm])
            assert got.keys() == expected.keys()
            for name, grad in got.items():
                torch.testing.assert_close(
                    grad,
                    expected[name],
                    rtol=1e-7,
                    atol=1e-12,
                    msg=lambda m, at=(norm, name): f"{at}: {m}",
                )


def widths_normalised(make: Callable[[Callable[..., nn.Module]], nn.Module], *batch) -> list[int]:
    """The width of every tensor that passes a norm, in a forward pass."""
    seen = []

    class Counted(nn.Module):
        def __init__(self, n: int, affine: bool = True) -> None:
            super().__init__()
            self.n = n

        def forward(self, x: Tensor) -> Tensor:
            assert x.shape[-1] == self.n
            seen.append(self.n)
            return x

    make(Counted)(*batch)
    return seen


def test_what_the_paper_normalises():
    x = torch.randn(2, 5, 8)
    gru = widths_normalised(lambda norm: GRU(norm, 8, 16), x)
    assert gru == 5 * [32, 32, 16, 16]  # four tensors per step
    lstm = widths_normalised(lambda norm: LSTM(norm, 8, 16), x)
    assert lstm == 5 * [64, 64, 16]  # three: input, recurrent, cell

    def whole(model: str) -> list[int]:
        spec, sizes = MODELS[model], tiny(model)
        batch = spec.batch(sizes, torch.Generator().manual_seed(0))
        return widths_normalised(lambda norm: spec.model(norm, sizes), *batch)

    assert whole("convpool_cnn") == 3 * [16] + 6 * [32]  # each convolution, over its channels
    assert whole("transformer") == 2 * 2 * [32] + 2 * 3 * [32]
    assert len(whole("order_embeddings")) == 3 * 4
    # Two encoders and two decoders of four; query at each step; first state, keys, read-out.
    assert len(whole("rnnsearch")) == 4 * (4 * 4 + 1) + 3
    # Two directions of document and question.
    assert len(whole("attentive_reader")) == 2 * 3 * (4 + 3)


def test_sizes_are_the_published_ones():
    expected = {
        "rnnsearch": {"embedding": 512, "state": 1000, "batch": 80},
        "transformer": {"width": 512, "hidden": 2048, "layers": 6, "heads": 8},
        "attentive_reader": {"state": 240, "batch": 64},
        "order_embeddings": {"state": 1024, "words": 300, "batch": 128, "margin": 0.05},
        "convpool_cnn": {"narrow": 96, "wide": 192, "batch": 100},
    }
    for model, sizes in expected.items():
        found = dataclasses.asdict(MODELS[model].sizes())
        assert {k: found[k] for k in sizes} == sizes


@pytest.mark.parametrize("model", MODELS)
def test_scale_leaves_every_width(model):
    spec = MODELS[model]
    assert spec.scaled(1.0) == spec.sizes()
    full, small = (dataclasses.asdict(spec.scaled(s)) for s in (1.0, 0.01))
    shrunk = {k for k in full if small[k] != full[k]}
    assert shrunk
    assert shrunk <= {"vocabulary", "batch", "length", "document", "question"}
    assert all(small[k] < full[k] for k in shrunk)


# -- tasks ----------------------------------------------------------------------------------------


def test_digits_held_out_are_others():
    (images, classes), (others, other_classes) = tasks.digits("train"), tasks.digits("held out")
    assert len(images) == len(classes) == 899
    assert len(others) == len(other_classes) == 898
    both = torch.cat([images, others])
    assert abs(both.mean()) < 1e-5
    assert abs(both.std() - 1) < 1e-5
    assert classes.bincount().min() > 70
    assert (images.flatten(1)[:, None] == others.flatten(1)[None]).all(-1).sum() == 0


def test_reversal():
    source, target = tasks.reversed_words(torch.Generator().manual_seed(0), 50)
    assert torch.equal(target.flip(1), source)
    assert source.unique().tolist() == list(range(16))


def letters(bases: Tensor) -> list[str]:
    return ["".join(tasks.BASES[b] for b in row) for row in bases.tolist()]


def test_splice_sites_follow_their_consensus():
    random = torch.Generator().manual_seed(0)
    donors = letters(tasks.donors(4000, random))
    acceptors = letters(tasks.acceptors(4000, random))
    assert all(re.fullmatch("...GT....", s) for s in donors)
    assert all(re.fullmatch(".{11}AG.", s) for s in acceptors)
    # Kept with 0.85; a random base is right by chance as often as the letter is ambiguous.
    for sites, place, allowed in ((donors, 0, "AC"), (donors, 8, "T"), (acceptors, 3, "CT")):
        share = sum(s[place] in allowed for s in sites) / 4000
        assert abs(share - (0.85 + 0.15 * len(allowed) / 4)) < 0.03


def agreement(sequence: str, consensus: str) -> int:
    """Letters of the best place that follow the consensus; its fixed pair must stand there."""
    allowed = [tasks.AMBIGUOUS.get(letter, letter) for letter in consensus]
    fixed = tasks.FIXED[consensus]
    best = 0
    for start in range(len(sequence) - len(consensus) + 1):
        window = sequence[start : start + len(consensus)]
        fits = [letter in a for letter, a in zip(window, allowed, strict=True)]
        if all(fits[i] for i in fixed):
            best = max(best, sum(fits))
    return best


def test_a_splice_site_is_what_its_class_says():
    bases, classes = tasks.splice(torch.Generator().manual_seed(0), 4000)
    assert classes.bincount(minlength=3).min() > 1200
    some, its = letters(bases[:600]), classes[:600]
    for cls, pattern in ((1, tasks.DONOR), (2, tasks.ACCEPTOR)):
        fits = torch.tensor([agreement(s, pattern) for s in some]).double() / len(pattern)
        inside, *outside = (fits[its == c].mean() for c in (cls, 0, 3 - cls))
        assert inside > 0.85
        assert max(outside) < 0.7
    # Composition tells nothing: shuffled sites of either kind against sites of either kind.
    counts = torch.nn.functional.one_hot(bases, 4).double().mean(1)
    decoys, sites = counts[classes == 0].mean(0), counts[classes > 0].mean(0)
    assert (decoys - sites).abs().max() < 0.007


def test_tasks_repeat_and_held_out_data_are_new():
    for name, task in tasks.TASKS.items():
        first, again, other = (task.batch(torch.Generator().manual_seed(s)) for s in (0, 0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), name
        assert not torch.equal(first[0], other[0]), name
        held_out = task.held_out()
        assert all(torch.equal(a, b) for a, b in zip(held_out, task.held_out(), strict=True)), name
        assert len(held_out[0]) >= 128, name


def test_accuracy_counts_first_choices():
    class Known(nn.Module):
        def logits(self, x: Tensor, target: Tensor | None = None) -> Tensor:
            return torch.nn.functional.one_hot(x, 4)

    x = torch.tensor([0, 1, 2, 3])
    assert tasks.accuracy(Known(), x, torch.tensor([0, 1, 2, 0])) == 75
    assert tasks.accuracy(Known(), x.view(2, 2), torch.tensor([[1, 1], [2, 0]])) == 50


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
    assert "saves 2.5 %, in the paper 6.9 %" in less
    assert "leaving the norms out altogether saves 5.0 %" in less
    assert remarks(1.95, composed=2.0, model="vit") == ""


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
    assert step_time.norms_among(rest + native) == (0.2, 3)
    assert step_time.norms_among(rest + ours + nodes) == (0.2, 2)
    assert step_time.norms_among(rest) == (0, 0)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "prms_norm", "none"])
def test_the_profiler_finds_the_norms(norm):
    """The names of the events are torch's and ours to change."""
    module = nn.Sequential(*(make_norm(norm)(1024) for _ in range(3)))
    x = torch.randn(512, 1024, requires_grad=True)
    found = step_time.normalisation_share(lambda x: module(x).sum().backward(), x, CPU)
    if norm == "none":
        assert found == {"share": 0, "calls": 0}
    else:
        assert 0 < found["share"] < 1
        assert found["calls"] == 3


# -- the run --------------------------------------------------------------------------------------


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MODELS:
        spec = dataclasses.replace(MODELS[name], scaled=lambda scale, name=name: tiny(name))
        monkeypatch.setitem(MODELS, name, spec)


SHORT = ["--seconds", "0", "--steps", "4", "--seeds", "1", "--device", "cpu", "--out"]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_task_trains(name):
    norms = ["layer_norm", "prms_norm"]
    entry = train_task(name, norms, seed=0, steps=4, device=CPU)
    assert entry["metric"].keys() == entry["curves"].keys() == set(norms)
    for norm in norms:
        assert math.isfinite(entry["metric"][norm])
        assert [step for step, _ in entry["curves"][norm]] == [1, 2, 3, 4]


def test_training_repeats():
    """Weights, batches and dropout follow from the seed."""
    first, again, other = (
        train_task("digits_cnn", ["layer_norm", "rms_norm"], seed=s, steps=3, device=CPU)
        for s in (0, 0, 1)
    )
    assert again == first
    assert other["curves"]["rms_norm"] != first["curves"]["rms_norm"]
    assert first["curves"]["layer_norm"] != first["curves"]["rms_norm"]


def rows_starting(text: str, first: str) -> list[list[str]]:
    lines = (line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


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
        assert len(summary) == 10
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
