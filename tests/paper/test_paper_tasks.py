"""benchmarks/paper/tasks.py: data that follow their rules, and training that repeats."""

import math
import re

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("benchmarks.paper", reason="needs the repository's root on the path")
pytest.importorskip("sklearn", reason="the digits: benchmarks/requirements.txt")

from benchmarks.paper import tasks
from benchmarks.paper.quality import train_task

CPU = torch.device("cpu")


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
