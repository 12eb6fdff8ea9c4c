"""Attentive reader (Hermann et al. 2015): which entity fills the gap in a question on a document.

Bidirectional LSTMs of 240, batch 64, three normalised tensors per step; the CNN/Daily Mail figures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gru_lstm import LSTM, bidirectional
from ..norms import MakeNorm

__all__ = ["AttentiveReader", "Sizes", "batch", "scaled"]


@dataclass(frozen=True)
class Sizes:
    vocabulary: int = 50000
    entities: int = 500
    state: int = 240
    batch: int = 64
    document: int = 300
    question: int = 30


def scaled(scale: float) -> Sizes:
    """Shorter texts and a smaller vocabulary."""
    return Sizes(
        vocabulary=max(500, int(50000 * scale)),
        document=max(6, int(300 * scale)),
        question=max(3, int(30 * scale)),
    )


def batch(sizes: Sizes, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Document, question, answer."""
    lengths = (sizes.document, sizes.question)
    document, question = (
        torch.randint(sizes.vocabulary, (sizes.batch, n), generator=random) for n in lengths
    )
    return document, question, torch.randint(sizes.entities, (sizes.batch,), generator=random)


class AttentiveReader(nn.Module):
    def __init__(self, norm: MakeNorm, sizes: Sizes) -> None:
        super().__init__()
        n = sizes.state
        self.embedding = nn.Embedding(sizes.vocabulary, n)
        self.document = nn.ModuleList(LSTM(norm, n, n) for _ in range(2))
        self.question = nn.ModuleList(LSTM(norm, n, n) for _ in range(2))
        self.key = nn.Linear(2 * n, 2 * n, bias=False)
        self.query = nn.Linear(2 * n, 2 * n, bias=False)
        self.energy = nn.Linear(2 * n, 1, bias=False)
        self.from_document = nn.Linear(2 * n, 2 * n, bias=False)
        self.from_question = nn.Linear(2 * n, 2 * n)
        self.answer = nn.Linear(2 * n, sizes.entities)

    def forward(self, document: Tensor, question: Tensor, answer: Tensor) -> Tensor:
        """Mean cross-entropy of the answer."""
        words = bidirectional(self.document, self.embedding(document))
        states = bidirectional(self.question, self.embedding(question))
        forward, backward = states.chunk(2, -1)
        u = torch.cat([forward[:, -1], backward[:, 0]], -1)
        energies = self.energy(torch.tanh(self.key(words) + self.query(u).unsqueeze(1)))
        read = (torch.softmax(energies, 1) * words).sum(1)
        joint = torch.tanh(self.from_document(read) + self.from_question(u))
        return F.cross_entropy(self.answer(joint), answer)
