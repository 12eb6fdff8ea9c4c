"""Small real tasks that need no download, one for each kind of model of the paper.

Sizes are small so that three seeds of every norm take minutes on two cores. Everything random comes
from a generator with a seed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .language import LANGUAGE_MODELS, corpus, random_batch
from .models import convpool_cnn, dna_cnn, rnnsearch, vit
from .norms import MakeNorm

__all__ = ["TASKS", "Task", "acceptors", "accuracy", "digits", "donors", "reversed_words", "splice"]

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Task:
    """``batch``: of a training step; ``held_out``: never trained on; ``score`` of it, a number.

    ``widths``: elements of the normalised rows, which say what a fraction p of them is.
    """

    title: str
    metric: str
    better: Literal["higher", "lower"]
    widths: tuple[int, ...]
    model: Callable[[MakeNorm], nn.Module]
    batch: Callable[[torch.Generator], Batch]
    held_out: Callable[[], Batch]
    score: Callable[..., float]
    steps: int
    rate: float


def accuracy(model: Any, *batch: Tensor) -> float:
    """Percent of the targets (the last tensor) that are the first choice of ``model.logits``.

    A model of words sees the targets too: each word is guessed from the right ones before it.
    """
    target = batch[-1]
    logits = model.logits(*batch) if target.dim() > 1 else model.logits(*batch[:-1])
    return 100 * (logits.argmax(-1) == target).double().mean().item()


def loss(model: nn.Module, *batch: Tensor) -> float:
    return model(*batch).item()


# -- handwritten digits ---------------------------------------------------------------------------


@functools.cache
def digits(part: Literal["train", "held out"]) -> tuple[Tensor, Tensor]:
    """Images [n, 1, 8, 8], mean 0 and deviation 1 over all, and classes: scikit-learn's digits.

    Every second of the 1797 is held out.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1)
    images = (images - images.mean()) / images.std()
    chosen = slice(0 if part == "train" else 1, None, 2)
    return images[chosen].clone(), torch.from_numpy(data.target).long()[chosen].clone()


def _digits_batch(random: torch.Generator, size: int) -> Batch:
    images, classes = digits("train")
    pick = torch.randint(len(classes), (size,), generator=random)
    return images[pick], classes[pick]


# The published widths: of fewer channels, p = 6.25 % would be three.
_CNN = convpool_cnn.Sizes(image=8, colours=1)
_VIT = vit.Sizes(width=64, heads=4, layers=4, image=8, patch=2, colours=1, classes=10)

# -- reversal -------------------------------------------------------------------------------------

_REVERSAL = rnnsearch.Sizes(vocabulary=16, embedding=64, state=128, batch=64, length=12)


def reversed_words(random: torch.Generator, size: int = _REVERSAL.batch) -> Batch:
    """Random words and the same in reverse: each target word stands at one place of the source."""
    shape = (size, _REVERSAL.length)
    source = torch.randint(_REVERSAL.vocabulary, shape, generator=random)
    return source, source.flip(1)


# -- splice sites ---------------------------------------------------------------------------------

BASES = "ACGT"
LENGTH = 60
_DNA = dna_cnn.Sizes(channels=64, layers=4, kernel=7, length=LENGTH)

# Letters that a position may have, as biologists write consensus sequences: M = A or C, R = A or G,
# Y = C or T, N = any. Where an exon ends and an intron begins; where the intron ends.
DONOR = "MAGGTRAGT"
ACCEPTOR = "YYYYYYYYYNCAGG"
AMBIGUOUS = {"M": "AC", "R": "AG", "Y": "CT", "N": "ACGT"}
FIXED = {DONOR: range(3, 5), ACCEPTOR: range(11, 13)}  # GT and AG: in every site
KEPT = 0.85  # of the other positions follow the consensus


def _sites(consensus: str, count: int, random: torch.Generator) -> Tensor:
    """[count, len(consensus)] bases."""
    columns = []
    for i, letter in enumerate(consensus):
        allowed = torch.tensor([BASES.index(b) for b in AMBIGUOUS.get(letter, letter)])
        site = allowed[torch.randint(len(allowed), (count,), generator=random)]
        if i not in FIXED[consensus]:
            other = torch.randint(4, (count,), generator=random)
            site = torch.where(torch.rand(count, generator=random) < KEPT, site, other)
        columns.append(site)
    return torch.stack(columns, 1)


def donors(count: int, random: torch.Generator) -> Tensor:
    """Where an intron begins: (A|C)AG, then GT always, then (A|G)AGT."""
    return _sites(DONOR, count, random)


def acceptors(count: int, random: torch.Generator) -> Tensor:
    """Where an intron ends: nine pyrimidines (C|T), any base, C, then AG always, then G."""
    return _sites(ACCEPTOR, count, random)


def splice(random: torch.Generator, size: int = _DNA.batch) -> Batch:
    """Random bases with one thing put in at a random place; what it is, is the class.

    0: a site of either kind with its letters shuffled, so that composition tells nothing; 1: a
    donor site; 2: an acceptor site.
    """
    bases = torch.randint(4, (size, LENGTH), generator=random)
    classes = torch.randint(3, (size,), generator=random)
    kinds = (donors, acceptors)
    from_kind = torch.where(
        classes == 0, torch.randint(2, (size,), generator=random), classes - 1
    ).tolist()
    made = [kind(size, random) for kind in kinds]
    for row, (kind, cls) in enumerate(zip(from_kind, classes.tolist(), strict=True)):
        site = made[kind][row]
        if cls == 0:
            site = site[torch.randperm(len(site), generator=random)]
        start = int(torch.randint(LENGTH - len(site) + 1, (1,), generator=random))
        bases[row, start : start + len(site)] = site
    return bases, classes


# -- characters -----------------------------------------------------------------------------------


def _characters(random: torch.Generator) -> Batch:
    return (random_batch(corpus()[0], 16, 64, random),)


def _held_out_characters() -> Batch:
    return (random_batch(corpus()[1], 128, 64, torch.Generator().manual_seed(1)),)


def _language(name: str, title: str, widths: tuple[int, ...], steps: int) -> Task:
    return Task(
        title,
        "nats per character",
        "lower",
        widths,
        LANGUAGE_MODELS[name],
        _characters,
        _held_out_characters,
        loss,
        steps,
        2e-3,
    )


def _classes(
    title: str,
    widths: tuple[int, ...],
    model: Callable[[MakeNorm], nn.Module],
    batch: Callable[[torch.Generator], Batch],
    held_out: Callable[[], Batch],
    steps: int,
    rate: float = 1e-3,
) -> Task:
    return Task(
        title, "accuracy, %", "higher", widths, model, batch, held_out, accuracy, steps, rate
    )


TASKS: dict[str, Task] = {
    "digits_cnn": _classes(
        "Digits, ConvPool-CNN",
        (_CNN.narrow, _CNN.wide),
        lambda norm: convpool_cnn.ConvPoolCNN(norm, _CNN),
        lambda random: _digits_batch(random, 32),
        lambda: digits("held out"),
        250,
    ),
    "digits_vit": _classes(
        "Digits, ViT",
        (_VIT.width,),
        lambda norm: vit.VisionTransformer(norm, _VIT),
        lambda random: _digits_batch(random, 64),
        lambda: digits("held out"),
        500,
        2e-3,
    ),
    "characters_gru": _language("gru", "Characters, GRU", (512, 256), 200),
    "characters_transformer": _language("transformer", "Characters, Transformer", (128,), 200),
    "reversal": _classes(
        "Reversal, RNNSearch",
        (_REVERSAL.embedding, _REVERSAL.state, 2 * _REVERSAL.state),
        lambda norm: rnnsearch.RNNSearch(norm, _REVERSAL),
        reversed_words,
        lambda: reversed_words(torch.Generator().manual_seed(1), 512),
        200,
    ),
    "splice_sites": _classes(
        "Splice sites, 1-D CNN",
        (_DNA.channels,),
        lambda norm: dna_cnn.DnaCNN(norm, _DNA),
        splice,
        lambda: splice(torch.Generator().manual_seed(1), 2000),
        300,
    ),
}
