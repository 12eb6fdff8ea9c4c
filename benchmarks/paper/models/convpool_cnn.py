"""ConvPool-CNN-C (Springenberg et al. 2015; Salimans and Kingma's variant) for CIFAR-10.

Channels 96 and 192. Every convolution is normalised over its channels at each position.
Activations are channels-last, where a position's channels are a row: no norm needs a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norms import MakeNorm

__all__ = ["ConvPoolCNN", "Sizes", "batch", "scaled"]


@dataclass(frozen=True)
class Sizes:
    image: int = 32
    colours: int = 3
    narrow: int = 96
    wide: int = 192
    classes: int = 10
    batch: int = 100


def scaled(scale: float) -> Sizes:
    """Fewer images."""
    return Sizes(batch=max(1, int(100 * scale)))


def batch(sizes: Sizes, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images and classes."""
    shape = (sizes.batch, sizes.colours, sizes.image, sizes.image)
    images = torch.randn(shape, generator=random).to(memory_format=torch.channels_last)
    return images, torch.randint(sizes.classes, (sizes.batch,), generator=random)


class Convolution(nn.Module):
    """Convolution, norm over channels, leaky ReLU."""

    def __init__(self, norm: MakeNorm, inputs: int, outputs: int, size: int, padding: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, size, padding=padding)
        self.norm = norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.convolution(x).permute(0, 2, 3, 1)
        return F.leaky_relu(self.norm(rows).permute(0, 3, 1, 2), 0.1)


class ConvPoolCNN(nn.Module):
    def __init__(self, norm: MakeNorm, sizes: Sizes) -> None:
        super().__init__()
        n, w = sizes.narrow, sizes.wide
        self.layers = nn.Sequential(
            Convolution(norm, sizes.colours, n, 3, 1),
            Convolution(norm, n, n, 3, 1),
            Convolution(norm, n, n, 3, 1),
            nn.MaxPool2d(2),
            nn.Dropout(0.5),
            Convolution(norm, n, w, 3, 1),
            Convolution(norm, w, w, 3, 1),
            Convolution(norm, w, w, 3, 1),
            nn.MaxPool2d(2),
            nn.Dropout(0.5),
            Convolution(norm, w, w, 3, 0 if sizes.image >= 16 else 1),
            Convolution(norm, w, w, 1, 0),
            Convolution(norm, w, w, 1, 0),
        ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
        self.classes = nn.Linear(w, sizes.classes)

    def logits(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        return self.classes(self.layers(images).mean((2, 3)))

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(self.logits(images), classes)
