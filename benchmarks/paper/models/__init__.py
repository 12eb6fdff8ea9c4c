"""The models, each ``Model(make_norm, sizes)`` with ``forward(*batch) -> loss``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import (
    attentive_reader,
    convpool_cnn,
    dit,
    dna_cnn,
    llama_block,
    mamba2,
    order_embeddings,
    rnnsearch,
    speech,
    transformer,
    vit,
)

__all__ = ["MODELS", "Spec"]


@dataclass(frozen=True)
class Spec:
    """``published``: reduction of a step's time against LayerNorm in the paper's table, percent.

    RMSNorm's and pRMSNorm's; RNNSearch was measured in three frameworks, so ranges.
    """

    title: str
    model: Callable[..., nn.Module]
    sizes: Any
    scaled: Callable[[float], Any]
    batch: Callable[[Any, torch.Generator], tuple[Tensor, ...]]
    published: dict[str, tuple[float, float]] | None = None


def _paper(rms: tuple[float, float], prms: tuple[float, float]) -> dict[str, tuple[float, float]]:
    return {"rms_norm": rms, "prms_norm": prms}


def _spec(title: str, module: Any, name: str, published: Any = None) -> Spec:
    return Spec(title, getattr(module, name), module.Sizes, module.scaled, module.batch, published)


MODELS: dict[str, Spec] = {
    "rnnsearch": _spec(
        "RNNSearch (GRU)", rnnsearch, "RNNSearch", _paper((11.0, 34.0), (12.0, 33.4))
    ),
    "transformer": _spec(
        "Transformer base", transformer, "Transformer", _paper((6.9, 6.9), (9.3, 9.3))
    ),
    "attentive_reader": _spec(
        "Attentive reader (LSTM)",
        attentive_reader,
        "AttentiveReader",
        _paper((15.1, 15.1), (15.8, 15.8)),
    ),
    "order_embeddings": _spec(
        "Order embeddings (GRU)",
        order_embeddings,
        "OrderEmbeddings",
        _paper((40.8, 40.8), (63.9, 63.9)),
    ),
    "convpool_cnn": _spec(
        "ConvPool-CNN-C", convpool_cnn, "ConvPoolCNN", _paper((20.5, 20.5), (23.1, 23.1))
    ),
    "llama_block": _spec("Llama blocks, QK-norm", llama_block, "LlamaBlocks"),
    "vit": _spec("ViT-S blocks", vit, "VisionTransformer"),
    "dit": _spec("DiT-S blocks", dit, "DiffusionTransformer"),
    "mamba2": _spec("Mamba-2 blocks", mamba2, "Mamba2"),
    "dna_cnn": _spec("DNA 1-D CNN", dna_cnn, "DnaCNN"),
    "speech": _spec("Speech encoder (HuBERT)", speech, "SpeechEncoder"),
}
