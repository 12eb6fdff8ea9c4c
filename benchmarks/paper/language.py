"""Character language models on the Python standard library's sources: real text, no download."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import training
from .gru_lstm import GRU
from .models.transformer import Layer, positions
from .norms import MakeNorm

__all__ = ["LANGUAGE_MODELS", "corpus", "random_batch", "train_side_by_side"]

VOCABULARY = 128  # ASCII; anything else is read as "?"


@functools.cache
def corpus(limit: int = 4_000_000) -> tuple[Tensor, Tensor]:
    """Training and held-out characters, int64: every tenth file is held out."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    total = 0
    for i, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        text = path.read_text(encoding="utf-8", errors="replace")
        parts[i % 10 == 9].append(text.encode("ascii", errors="replace"))
        total += len(text)
        if total > limit:
            break
    train, held_out = (
        torch.from_numpy(np.frombuffer(b"".join(p), dtype=np.uint8).astype(np.int64)) for p in parts
    )
    return train, held_out


def random_batch(text: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """[batch, length + 1] characters from random places."""
    starts = torch.randint(len(text) - length - 1, (batch, 1), generator=generator)
    return text[starts + torch.arange(length + 1)]


class GRULanguageModel(nn.Module):
    """One layer of the paper's GRU, four normalised tensors per step."""

    def __init__(self, norm: MakeNorm, width: int = 128, state: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.gru = GRU(norm, width, state)
        self.out = nn.Linear(state, VOCABULARY)

    def forward(self, text: Tensor) -> Tensor:
        """Mean cross-entropy, nats per character, of each character from those before it."""
        logits = self.out(self.gru(self.embedding(text[:, :-1])))
        return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


class TransformerLanguageModel(nn.Module):
    """The paper's transformer layers, post-norm, as a decoder."""

    positions: Tensor

    def __init__(
        self, norm: MakeNorm, width: int = 128, layers: int = 4, heads: int = 4, length: int = 256
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(
            Layer(norm, width, 4 * width, heads, decoder=True, cross=False) for _ in range(layers)
        )
        self.out = nn.Linear(width, VOCABULARY)
        self.register_buffer("positions", positions(length, width), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        """As GRULanguageModel."""
        x = self.embedding(text[:, :-1]) + self.positions[: text.size(1) - 1]
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.out(x).flatten(0, 1), text[:, 1:].flatten())


LANGUAGE_MODELS: dict[str, Callable[[MakeNorm], nn.Module]] = {
    "gru": GRULanguageModel,
    "transformer": TransformerLanguageModel,
}


def _held_out_loss(model: nn.Module, batch: int, length: int, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        losses = [
            model(random_batch(corpus()[1], batch, length, generator).to(device)).item()
            for _ in range(8)
        ]
    return sum(losses) / len(losses)


def train_side_by_side(
    name: str,
    norms: Sequence[str],
    steps: int,
    device: torch.device,
    *,
    batch: int = 16,
    length: int = 64,
    rate: float = 2e-3,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Trains one model per norm, a step of each in turn; an entry of the results.

    Returns:
        Per norm: training loss of every step, held-out loss at the end, Timing of a step.
    """

    def text(generator: torch.Generator) -> tuple[Tensor]:
        return (random_batch(corpus()[0], batch, length, generator),)

    trained = training.train_side_by_side(
        LANGUAGE_MODELS[name], text, norms, steps, device, rate=rate, seed=seed, progress=progress
    )
    return {
        "model": name,
        "steps": steps,
        "seed": seed,
        "batch": batch,
        "length": length,
        "losses": {n: [round(v, 4) for v in values] for n, values in trained.losses.items()},
        "held_out": {
            n: _held_out_loss(m, batch, length, device) for n, m in trained.models.items()
        },
        "times": trained.times,
    }
