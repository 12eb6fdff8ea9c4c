"""Speech pre-training as HuBERT (Hsu et al. 2021): predict the classes of masked frames.

Seven convolutions make 50 frames a second of 16 kHz sound, each normalised over its channels, as
in the large model; then a transformer with the norms before attention and FFN, as there, too.
Widths are those of the base model, four of its twelve blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..norms import MakeNorm
from .vit import Block

__all__ = ["Sizes", "SpeechEncoder", "batch", "masked_spans", "scaled"]

# Kernel and stride of each convolution.
CONVOLUTIONS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))


@dataclass(frozen=True)
class Sizes:
    """``length``: frames; ``classes``: clusters of frames that serve as targets."""

    channels: int = 512
    width: int = 768
    heads: int = 12
    layers: int = 4
    positions: int = 128  # kernel of the convolution that tells places apart, of 16 groups
    classes: int = 500
    span: int = 10  # frames that are masked together
    masked: float = 0.5  # share of all frames, about
    batch: int = 8
    length: int = 250


def scaled(scale: float) -> Sizes:
    """Fewer and shorter recordings."""
    return Sizes(batch=max(1, int(8 * scale)), length=max(20, int(250 * scale)))


def samples(frames: int) -> int:
    """The shortest sound of so many frames."""
    for kernel, stride in reversed(CONVOLUTIONS):
        frames = (frames - 1) * stride + kernel
    return frames


def masked_spans(sizes: Sizes, random: torch.Generator) -> Tensor:
    """[batch, length], True where masked: spans at random places, at least one per recording."""
    shape, span = (sizes.batch, sizes.length), min(sizes.span, sizes.length)
    starts = torch.rand(shape, generator=random) < sizes.masked / sizes.span
    first = torch.randint(sizes.length - span + 1, (sizes.batch,), generator=random)
    starts[torch.arange(sizes.batch), first] = True
    padded = F.pad(starts.float(), (span - 1, 0)).unsqueeze(1)
    return F.max_pool1d(padded, span, 1).squeeze(1) > 0


def batch(sizes: Sizes, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Sound [batch, samples], the mask and the class of every frame, both [batch, length]."""
    sound = torch.randn(sizes.batch, samples(sizes.length), generator=random)
    classes = torch.randint(sizes.classes, (sizes.batch, sizes.length), generator=random)
    return sound, masked_spans(sizes, random), classes


class Convolution(nn.Module):
    """gelu(norm(convolution(x))) on [batch, position, channel]."""

    def __init__(self, norm: MakeNorm, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(inputs, outputs, kernel, stride, bias=False)
        self.norm = norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous: one copy for every norm alike.
        h = self.convolution(x.transpose(1, 2)).transpose(1, 2).contiguous()
        return F.gelu(self.norm(h))


class SpeechEncoder(nn.Module):
    def __init__(self, norm: MakeNorm, sizes: Sizes) -> None:
        super().__init__()
        n, channels = sizes.width, sizes.channels
        self.convolutions = nn.Sequential(
            *(
                Convolution(norm, channels if i else 1, channels, kernel, stride)
                for i, (kernel, stride) in enumerate(CONVOLUTIONS)
            )
        )
        self.features_norm = norm(channels)
        self.project = nn.Linear(channels, n)
        self.mask = nn.Parameter(torch.rand(n))
        self.positions = nn.Conv1d(n, n, sizes.positions, padding="same", groups=min(16, n // 8))
        self.blocks = nn.Sequential(*(Block(norm, n, sizes.heads) for _ in range(sizes.layers)))
        self.norm = norm(n)
        self.classes = nn.Linear(n, sizes.classes)

    def logits(self, sound: Tensor, mask: Tensor) -> Tensor:
        """[batch, length, classes]; masked frames are seen by their surroundings alone."""
        x = self.project(self.features_norm(self.convolutions(sound.unsqueeze(-1))))
        x = torch.where(mask.unsqueeze(-1), self.mask, x)
        x = x + F.gelu(self.positions(x.transpose(1, 2))).transpose(1, 2)
        return self.classes(self.norm(self.blocks(x)))

    def forward(self, sound: Tensor, mask: Tensor, classes: Tensor) -> Tensor:
        """Mean cross-entropy of the masked frames."""
        return F.cross_entropy(self.logits(sound, mask)[mask], classes[mask])
