"""Train a Lightning module whose norms are swapped by one line.

    python examples/lightning_module.py            # a minute on two cores
    python examples/lightning_module.py --small    # seconds

The task needs no download: tell which of two waves is in the noise.

Needs: pip install lightning
"""

from __future__ import annotations

import argparse
import logging

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fused_rmsnorm import replace_rms_norm_


def waves(count: int, length: int) -> TensorDataset:
    """Noisy waves [count, length] of one of two frequencies, and which it is."""
    random = torch.Generator().manual_seed(0)
    kind = torch.randint(2, (count,), generator=random)
    phase = 6.28 * torch.rand(count, 1, generator=random)
    wave = torch.sin(torch.arange(length) * (0.2 + 0.1 * kind.unsqueeze(1)) + phase)
    return TensorDataset(wave + 0.5 * torch.randn(count, length, generator=random), kind)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.ffn = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(self.norm(x))


class Classifier(lightning.LightningModule):
    def __init__(self, length: int, width: int, layers: int) -> None:
        super().__init__()
        blocks = (Block(width) for _ in range(layers))
        self.model = nn.Sequential(
            nn.Linear(length, width), *blocks, nn.RMSNorm(width, eps=1e-6), nn.Linear(width, 2)
        )
        self.losses: list[float] = []

    def configure_model(self) -> None:
        """Lightning calls this before training, and again: a second swap finds nothing to do."""
        if swapped := replace_rms_norm_(self):
            print(f"swapped {len(swapped)} norms, first {next(iter(swapped.items()))}")

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        wave, kind = batch
        loss = F.cross_entropy(self.model(wave), kind)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="seconds instead of a minute")
    small = parser.parse_args().small
    length, width, layers, steps = (64, 64, 2, 30) if small else (256, 512, 6, 400)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lightning.seed_everything(0, verbose=False)
    model = Classifier(length, width, layers)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(waves(32 * steps, length), batch_size=32))
    tenth = max(1, steps // 10)
    first, last = (sum(part) / tenth for part in (model.losses[:tenth], model.losses[-tenth:]))
    print(f"loss {first:.3f} -> {last:.3f}")


if __name__ == "__main__":
    main()
