"""RNNSearch: GRU encoder-decoder with additive attention (Bahdanau et al. 2015; Nematus's decoder).

Every GRU normalises four tensors per step; the decoder runs two GRUs per word. The feed-forward
layers (first state, attention's query and key, read-out) are normalised too. WMT14 sizes of the
paper: embedding 512, state 1000, batch 80, sentences of up to 100 words, here of 50.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gru_lstm import GRU, bidirectional
from ..norms import MakeNorm, normalised

__all__ = ["RNNSearch", "Sizes", "batch", "scaled"]


@dataclass(frozen=True)
class Sizes:
    vocabulary: int = 32000
    embedding: int = 512
    state: int = 1000
    batch: int = 80
    length: int = 50


def scaled(scale: float) -> Sizes:
    """Fewer words and a smaller vocabulary; every normalised width as it is."""
    return Sizes(vocabulary=max(100, int(32000 * scale)), length=max(4, int(50 * scale)))


def batch(sizes: Sizes, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Source and target words."""
    shape = (sizes.batch, sizes.length)
    source, target = (torch.randint(sizes.vocabulary, shape, generator=random) for _ in range(2))
    return source, target


class RNNSearch(nn.Module):
    def __init__(self, norm: MakeNorm, sizes: Sizes) -> None:
        super().__init__()
        n, e = sizes.state, sizes.embedding
        self.source = nn.Embedding(sizes.vocabulary, e)
        self.target = nn.Embedding(sizes.vocabulary, e)
        self.encoder = nn.ModuleList(GRU(norm, e, n) for _ in range(2))
        self.start = normalised(norm, n, nn.Linear(2 * n, n))
        self.word_gru = GRU(norm, e, n)
        self.context_gru = GRU(norm, 2 * n, n)
        self.query = normalised(norm, n, nn.Linear(n, n, bias=False))
        self.key = normalised(norm, n, nn.Linear(2 * n, n))
        self.energy = nn.Linear(n, 1, bias=False)
        self.readout = normalised(norm, e, nn.Linear(n + e + 2 * n, e))
        self.words = nn.Linear(e, sizes.vocabulary)

    def logits(self, source: Tensor, target: Tensor) -> Tensor:
        """[batch, time, vocabulary]: each target word from those before it."""
        memory = bidirectional(self.encoder, self.source(source))
        keys = self.key(memory)
        h = torch.tanh(self.start(memory.mean(1)))
        previous = F.pad(self.target(target[:, :-1]), (0, 0, 1, 0))
        states, contexts = [], []
        for gates, candidate in self.word_gru.project(previous):
            h = self.word_gru.step(gates, candidate, h)
            energies = self.energy(torch.tanh(keys + self.query(h).unsqueeze(1)))
            context = (torch.softmax(energies, 1) * memory).sum(1)
            h = self.context_gru.cell(context, h)
            states.append(h)
            contexts.append(context)
        features = [torch.stack(states, 1), previous, torch.stack(contexts, 1)]
        return self.words(torch.tanh(self.readout(torch.cat(features, -1))))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self.logits(source, target).flatten(0, 1), target.flatten())
