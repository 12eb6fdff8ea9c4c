"""Random inputs for hypothesis: what varies is the structure (shape, strides, dtypes, options);
the numbers follow from a seed, so that a failure shrinks to a small structure."""

import torch
from hypothesis import strategies as st
from reference import FLOATS, Options
from torch import Tensor

N = st.one_of(
    st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 512]),
    st.integers(1, 300),
)
LEADING = st.one_of(
    st.sampled_from([(), (0,), (1,), (2, 0, 3), (5, 1), (3, 4), (2, 3, 2), (2, 1, 2, 3)]),
    st.tuples(st.integers(1, 40)),
)
SEEDS = st.integers(0, 2**31)
OPTIONS = st.builds(
    Options,
    eps=st.sampled_from([None, 0.0, 1e-8, 1e-6, 1e-5, 0.5]),
    p=st.one_of(st.none(), st.sampled_from([0.0625, 0.07, 0.5, 1.0]), st.floats(1e-6, 1)),
    weight_offset=st.sampled_from([0.0, 1.0, -0.3]),
    casting_mode=st.sampled_from(["torch", "llama"]),
)
# For tests that draw nothing; of which each option has another value somewhere (test_registration).
OPTION_SETS = (
    Options(),
    Options(eps=1e-3, p=0.3),
    Options(weight_offset=1.0),
    Options(p=0.5, weight_offset=-0.5, casting_mode="llama"),
)
# Relative to x's dtype: mostly its own, often fp32, sometimes any.
AFFINE_TYPES = st.sampled_from(["same", "same", "fp32", "fp32", *FLOATS])

LAYOUTS = (
    "contiguous",
    "slice of wider rows",
    "one of three packed",
    "leading dimensions transposed",
    "every second element",
    "last dimension first in memory",
    "expanded rows",
    "expanded last dimension",
    "misaligned",
)


def affine_type(choice, x_type: torch.dtype) -> torch.dtype:
    return {"same": x_type, "fp32": torch.float32}.get(choice, choice)


def numbers(shape, dtype, device, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # In fp64, so that fp64 inputs use all their bits.
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (values * scale).to(device, dtype)


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The numbers of t (of its first row or column, where it is expanded) in another layout. What
    lies between them in memory is NaN, so that a read outside of a row shows."""
    shape, n = list(t.shape), t.shape[-1]
    filled = lambda *sizes: t.new_full(sizes, float("nan"))  # noqa: E731
    if layout == "slice of wider rows":
        view = filled(*shape[:-1], n + 7)[..., 3 : 3 + n]
    elif layout == "one of three packed":
        view = filled(*shape[:-1], 3, n)[..., 1, :]
    elif layout == "leading dimensions transposed" and t.dim() > 2:
        view = filled(shape[1], shape[0], *shape[2:]).transpose(0, 1)
    elif layout == "every second element":
        view = filled(*shape[:-1], 2 * n)[..., ::2]
    elif layout == "last dimension first in memory":
        view = filled(n, *shape[:-1]).movedim(0, -1)
    elif layout == "expanded rows" and t.dim() > 1 and shape[0]:
        return t[:1].expand(shape)
    elif layout == "expanded last dimension":
        return t[..., :1].expand(shape)
    elif layout == "misaligned":
        view = filled(t.numel() + 1)[1:].view(shape)
    else:
        return t.contiguous()
    return view.copy_(t)
