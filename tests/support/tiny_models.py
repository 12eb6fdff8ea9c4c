"""The models of benchmarks/paper in sizes that take milliseconds."""

import dataclasses
from typing import Any

from benchmarks.paper.models import MODELS

TINY = {
    "rnnsearch": {"vocabulary": 20, "embedding": 16, "state": 32, "batch": 3, "length": 4},
    "transformer": {
        "vocabulary": 20,
        "width": 32,
        "hidden": 48,
        "layers": 2,
        "heads": 2,
        "batch": 2,
        "length": 5,
    },
    "attentive_reader": {
        "vocabulary": 20,
        "entities": 5,
        "state": 16,
        "batch": 2,
        "document": 4,
        "question": 3,
    },
    "order_embeddings": {
        "vocabulary": 20,
        "words": 8,
        "image": 12,
        "state": 32,
        "batch": 4,
        "length": 3,
    },
    "convpool_cnn": {"image": 8, "narrow": 16, "wide": 32, "batch": 2},
    "llama_block": {
        "width": 32,
        "heads": 4,
        "key_heads": 2,
        "head": 16,
        "hidden": 48,
        "batch": 2,
        "length": 5,
    },
    "vit": {"width": 32, "heads": 2, "layers": 2, "image": 32, "classes": 5, "batch": 2},
    "dit": {"width": 32, "heads": 2, "layers": 2, "tokens": 6, "batch": 2},
    "mamba2": {"width": 32, "inner": 64, "state": 8, "head": 16, "batch": 2, "length": 5},
    "dna_cnn": {"channels": 32, "layers": 2, "kernel": 5, "length": 12, "batch": 2},
    "speech": {
        "channels": 16,
        "width": 32,
        "heads": 2,
        "layers": 2,
        "positions": 4,
        "classes": 5,
        "span": 2,
        "batch": 2,
        "length": 6,
    },
}


def tiny(model: str) -> Any:
    """The model's Sizes."""
    return dataclasses.replace(MODELS[model].sizes(), **TINY[model])
