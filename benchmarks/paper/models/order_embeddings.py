"""Order embeddings (Vendrov et al. 2016): image-caption retrieval, the caption above the image.

GRU of 1024 on words of 300, batch 128, margin 0.05; an image comes as the 4096 features of a CNN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gru_lstm import GRU
from ..norms import MakeNorm

__all__ = ["OrderEmbeddings", "Sizes", "batch", "scaled"]


@dataclass(frozen=True)
class Sizes:
    vocabulary: int = 10000
    words: int = 300
    image: int = 4096
    state: int = 1024
    batch: int = 128
    length: int = 20
    margin: float = 0.05


def scaled(scale: float) -> Sizes:
    """Shorter captions, but of ten words as COCO's mostly are, and a smaller vocabulary.

    Shorter ones would leave little but the ranking, which has no norm.
    """
    return Sizes(vocabulary=max(100, int(10000 * scale)), length=max(10, int(20 * scale)))


def batch(sizes: Sizes, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Captions and the features of their images."""
    captions = torch.randint(sizes.vocabulary, (sizes.batch, sizes.length), generator=random)
    return captions, torch.rand(sizes.batch, sizes.image, generator=random)


class OrderEmbeddings(nn.Module):
    def __init__(self, norm: MakeNorm, sizes: Sizes) -> None:
        super().__init__()
        self.margin = sizes.margin
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.words)
        self.gru = GRU(norm, sizes.words, sizes.state)
        self.image = nn.Linear(sizes.image, sizes.state)

    def forward(self, captions: Tensor, features: Tensor) -> Tensor:
        """Every wrong pair of the batch must score less than the right ones, by the margin."""
        caption = F.normalize(self.gru(self.embedding(captions))[:, -1], dim=-1).abs()
        image = F.normalize(self.image(features), dim=-1).abs()
        # [caption, image]: how far the caption is from lying above the image.
        score = -F.relu(caption.unsqueeze(1) - image.unsqueeze(0)).square().sum(-1)
        right = score.diag()
        cost = F.relu(self.margin + score - right.unsqueeze(0))
        cost = cost + F.relu(self.margin + score - right.unsqueeze(1))
        return cost.fill_diagonal_(0).sum()
