"""The models: configurations of transformers at published widths, with random weights.

Fewer layers, since all are alike, and a small vocabulary: of a model with two layers the published
one would be most of the work, in embedding, head and optimiser, none of which a norm changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["FAMILIES", "LAYERS", "VOCABULARY", "Family", "transformers"]

LAYERS = 2
VOCABULARY = 8192


def transformers() -> Any:
    """The library, imported when needed.

    Raises:
        SystemExit: it is missing.
    """
    try:
        import transformers as library
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"python -m benchmarks.models needs transformers: pip install transformers ({error})"
        ) from error
    return library


@dataclass(frozen=True)
class Family:
    """``published``: what the configuration says beside layers and vocabulary; ``tiny``: of tests.

    ``layers``: the names that the configuration has for their number. ``published_layers``: how
    many the model has.
    """

    title: str
    model: str
    config: str
    published: Mapping[str, Any]
    tiny: Mapping[str, Any]
    published_layers: int
    layers: tuple[str, ...] = ("num_hidden_layers",)

    def make(self, small: bool, layers: int) -> nn.Module:
        """The model in fp32, for training."""
        sizes = {**self.published, **(self.tiny if small else {})}
        sizes |= dict.fromkeys(self.layers, layers)
        # No token ends a sequence: nothing is generated here.
        ids = {"vocab_size": 64 if small else VOCABULARY, "pad_token_id": 0}
        ids |= {"bos_token_id": 1, "eos_token_id": 2}
        library = transformers()
        torch.manual_seed(0)
        return getattr(library, self.model)(getattr(library, self.config)(**sizes, **ids))


_TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "Llama-3.2-1B",
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
        },
        _TINY,
        16,
    ),
    "qwen3": Family(
        "Qwen3-0.6B",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
        _TINY,
        28,
    ),
    "gemma3": Family(
        "Gemma 3 1B",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
        },
        _TINY,
        26,
    ),
    "olmo2": Family(
        "OLMo 2 1B",
        "Olmo2ForCausalLM",
        "Olmo2Config",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
        },
        {k: v for k, v in _TINY.items() if k != "head_dim"},
        16,
    ),
    "mamba2": Family(
        "Mamba 2 370M",
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "hidden_size": 1024,
            "num_heads": 32,
            "head_dim": 64,
            "state_size": 128,
            "n_groups": 1,
            "chunk_size": 64,
            "tie_word_embeddings": True,
        },
        {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 8, "chunk_size": 8},
        48,
    ),
    "t5": Family(
        "T5 v1.1 base",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 768,
            "d_kv": 64,
            "d_ff": 2048,
            "num_heads": 12,
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4},
        12,
        ("num_layers", "num_decoder_layers"),
    ),
}
