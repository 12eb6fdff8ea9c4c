"""What a model is asked to do: read a prompt, decode one token, take a step of training."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .families import transformers

__all__ = ["WORKS", "Work", "decode", "loss_of", "prefill", "train"]

# ``run`` is the model or what torch.compile made of it.
Work = Callable[[nn.Module, Any, Tensor], Callable[[Any], Tensor]]

# Adam does all of its work and leaves the weights, which the variants share, where they were. At
# 1e-7 the first step of a model of full width moved the loss by 0.1 %, like another function.
RATE = 0.0


def _is_seq2seq(model: Any) -> bool:
    return bool(model.config.is_encoder_decoder)


def prefill(model: nn.Module, run: Any, tokens: Tensor) -> Callable[[Any], Tensor]:
    """The prompt's pass, for the logits of what follows; of T5 the encoder's and one token's."""
    first = {"decoder_input_ids": tokens[:, :1]} if _is_seq2seq(model) else {}
    last = {} if _is_seq2seq(model) else {"logits_to_keep": 1}

    @torch.no_grad()
    def call(_: Any) -> Tensor:
        return run(input_ids=tokens, use_cache=False, **first, **last).logits

    return call


def _rewind(cache: Any, length: int) -> None:
    """Makes a static cache forget what was put after ``length``; a state-space model's has none."""
    for layer in getattr(cache, "self_attention_cache", cache).layers:
        for name in (
            "cumulative_length",
            "cumulative_length_int",
        ):  # a tensor, or a number, or both
            seen = getattr(layer, name, None)
            if isinstance(seen, Tensor):
                seen.fill_(length)
            elif seen is not None:
                setattr(layer, name, length)


def _cache_argument(model: nn.Module) -> str:
    """What ``forward`` calls its cache, in the versions of transformers."""
    known = inspect.signature(model.forward).parameters
    return next(n for n in ("cache", "past_key_values", "cache_params") if n in known)


def decode(model: nn.Module, run: Any, tokens: Tensor) -> Callable[[Any], Tensor]:
    """One token after the prompt, always the same one, with a static cache as for torch.compile."""
    library, length, token = transformers(), tokens.size(1), tokens[:, :1]
    config: Any = model.config
    name = _cache_argument(model)
    with torch.no_grad():
        if _is_seq2seq(model):
            # Decoded so far: the first token. The cross-attention's cache is as long as the prompt.
            kept, sizes = 1, (length + 32, length)
            cache = library.EncoderDecoderCache(
                *(library.StaticCache(config=config, max_cache_len=size) for size in sizes)
            )
            encoded = model.get_encoder()(input_ids=tokens)  # type: ignore[operator]
            given = {
                "encoder_outputs": (encoded.last_hidden_state,),
                "decoder_input_ids": token,
                "use_cache": True,
            }
            model(**given, **{name: cache})
        else:
            kept, given = length, {"input_ids": token, "use_cache": True}
            attends = hasattr(config, "num_attention_heads")
            empty = library.StaticCache(config=config, max_cache_len=length + 32)
            first = {name: empty} if attends else {}  # a state-space model makes its own
            cache = getattr(model(input_ids=tokens, use_cache=True, **first), name)

    @torch.no_grad()
    def call(_: Any) -> Tensor:
        _rewind(cache, kept)
        return run(**given, **{name: cache}).logits

    return call


def loss_of(run: Any, tokens: Tensor) -> Tensor:
    """The mean cross-entropy of ``tokens``."""
    return run(input_ids=tokens, labels=tokens, use_cache=False).loss


def train(model: nn.Module, run: Any, tokens: Tensor) -> Callable[[Any], Tensor]:
    """Forward, loss, backward and Adam."""
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)

    def call(_: Any) -> Tensor:
        optimiser.zero_grad()
        loss = loss_of(run, tokens)
        loss.backward()
        optimiser.step()
        return loss

    return call


WORKS: dict[str, Work] = {"prefill": prefill, "decode": decode, "train": train}
