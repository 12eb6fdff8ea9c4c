"""benchmarks/models: a swap leaves the model what it was, every row is run and reported."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("benchmarks.models", reason="needs the repository's root on the path")
pytest.importorskip("transformers", reason="transformers is not installed")

from tables import rows_starting

import benchmarks.models.__main__ as models
from benchmarks.harness.results import load
from benchmarks.harness.timing import threads
from benchmarks.models import report, timing
from benchmarks.models.families import FAMILIES
from benchmarks.models.works import WORKS, loss_of
from fused_rmsnorm import RMSNorm

TOKENS = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(0))
# Norms with two layers: of the stream, of queries and keys, under a gate, the last; of T5 in both
# halves.
NORMS = {"llama": 5, "qwen3": 9, "gemma3": 13, "olmo2": 9, "mamba2": 5, "t5": 12}


@pytest.fixture(autouse=True)
def _one_thread():
    with threads(1):  # tiny models: more would wait for each other
        yield


@pytest.mark.parametrize("name", FAMILIES)
def test_a_swap_shares_the_parameters_and_keeps_the_numbers(name: str):
    original = FAMILIES[name].make(small=True, layers=2)
    swapped, norms = timing.swap(original)
    assert len(norms) == NORMS[name]
    assert all(a is b for a, b in zip(original.parameters(), swapped.parameters(), strict=True))
    assert not any(isinstance(module, RMSNorm) for module in original.modules())
    assert timing.norms_left(swapped) == []
    loss, gradients = {}, {}
    for key, model in (("original", original), ("swapped", swapped)):
        loss[key] = loss_of(model, TOKENS)
        gradients[key] = torch.autograd.grad(loss[key], list(model.parameters()))
    torch.testing.assert_close(loss["swapped"], loss["original"])
    for a, b in zip(gradients["swapped"], gradients["original"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_decoded_token_is_that_of_the_whole_sequence(name: str):
    """With a cache that is rewound: each call is the same step."""
    model = FAMILIES[name].make(small=True, layers=2).eval()
    step = WORKS["decode"](model, model, TOKENS)
    first, second = step(None), step(None)
    with torch.no_grad():
        if name == "t5":
            two = TOKENS[:, :1].expand(1, 2)
            expected = model(input_ids=TOKENS, decoder_input_ids=two).logits[:, -1:]
        else:
            expected = model(input_ids=torch.cat([TOKENS, TOKENS[:, :1]], 1)).logits[:, -1:]
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    if name != "mamba2":  # whose state has seen the token twice by now
        assert torch.equal(first, second)


def test_what_is_not_the_same_function_is_refused():
    original = FAMILIES["llama"].make(small=True, layers=1)
    swapped = copy.deepcopy(original)
    nn.init.constant_(swapped.model.norm.weight, 2)
    with pytest.raises(RuntimeError, match="not the same function"):
        timing.time_work("prefill", {"original": original, "swapped": swapped}, TOKENS, 0.0, None)


SHORT = ["--small", "--seconds", "0", "--length", "8", "--device", "cpu", "--out"]


def test_a_run_reports_every_row(tmp_path: Path):
    """Compiled, too: without Inductor's code, of which only the time differs."""
    chosen = ["--models", "qwen3", "--dtypes", "bfloat16", "--layers", "1"]
    assert models.main([*chosen, "--backend", "aot_eager", *SHORT, str(tmp_path)]) == 0
    data = load(tmp_path / "models.json")
    assert data["complete"]
    variants = {*timing.EAGER, *timing.COMPILED}
    for work in WORKS:
        entry = data["entries"][f"models/qwen3/bfloat16/{work}"]
        assert entry["times"].keys() == entry["differences"].keys() == variants
    saved = entry["saved"]  # of the training step
    assert saved.keys() == variants
    assert saved["swapped"] < saved["original"]
    text = (tmp_path / "models.md").read_text()
    *works, kept = rows_starting(text, FAMILIES["qwen3"].title)
    assert [cells[2] for cells in works] == list(report.WORKS.values())
    assert all(len(cells) == 10 for cells in works)
    assert kept[2] == f"{saved['original'] / 2**20:.1f} MiB"
    assert "Qwen3-0.6B: 1 of 28 layers" in text
    assert (tmp_path / "models.png").stat().st_size > 5000
    # The report is a command of its own, and reads the file alone.
    (tmp_path / "models.md").unlink()
    assert report.main([str(tmp_path / "models.json")]) == 0
    assert (tmp_path / "models.md").read_text() == text


def test_a_run_that_is_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    timed = []

    def time_work(name: str, *args: object) -> dict:
        timed.append(name)
        if timed == ["prefill", "decode"]:
            raise KeyboardInterrupt
        return timing.time_work(name, *args)

    monkeypatch.setattr(models, "time_work", time_work)
    chosen = ["--models", "llama", "--dtypes", "float32", "--layers", "1", "--compiled"]
    assert models.main([*chosen, *SHORT, str(tmp_path)]) == 130
    assert models.main([*chosen, *SHORT, str(tmp_path)]) == 0
    assert timed == ["prefill", "decode", "decode", "train"]
    assert "going on from 1 entries" in capsys.readouterr().out
    assert len(load(tmp_path / "models.json")["entries"]) == 3
    text = (tmp_path / "models.md").read_text()
    assert len(rows_starting(text, FAMILIES["llama"].title)[0]) == 7  # no columns of the compiled
