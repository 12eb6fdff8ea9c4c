"""The public functions that take no tensors: launch_plan and the two that swap norms in a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fused_rmsnorm

from .calls import REAL, Spec
from .case import Raised
from .rules import WIDTH, Verdict

WIDE = 8


class OwnNorm(nn.RMSNorm):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OddNorm(nn.Module):
    """Named a norm; looking at it raises."""

    def forward(self, x: Tensor) -> Tensor:
        return x

    @property
    def weight(self) -> Tensor:
        raise LookupError("none here")


def part(name: str, made: list[nn.Module]) -> nn.Module:
    if name == "again" and made:
        return made[0]
    if name == "hooked":
        norm = nn.RMSNorm(WIDE)
        norm.register_forward_hook(lambda module, args, y: y + 1)
        return norm
    kinds: dict[str, Any] = {
        "rms": lambda: nn.RMSNorm(WIDE),
        "rms64": lambda: nn.RMSNorm([2, WIDE // 2], eps=0.1, elementwise_affine=False),
        "layer": lambda: nn.LayerNorm(WIDE),
        "ours": lambda: fused_rmsnorm.RMSNorm(WIDE, p=0.5),
        "subclass": lambda: OwnNorm(WIDE),
        "odd": OddNorm,
    }
    return kinds.get(name, lambda: nn.Linear(WIDE, WIDE))()


class Shaped(nn.Module):
    """Norms over two dimensions see them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.unflatten(-1, (2, -1))).flatten(-2)


def model_of(args: Spec) -> tuple[Any, list[nn.Module]]:
    made: list[nn.Module] = []
    for name in args["parts"]:
        made.append(part(name, made))
    wrapped = [
        Shaped(m) if isinstance(m, nn.RMSNorm) and len(m.normalized_shape) > 1 else m for m in made
    ]
    model: Any = nn.Sequential(*wrapped)
    if args["model"] == "list":
        model = wrapped
    elif args["model"] == "none":
        model = None
    elif args["model"] == "tensor":
        model = torch.ones(3)
    elif args["model"] == "norm":
        model = nn.LayerNorm(WIDE) if "p" in args else nn.RMSNorm(WIDE)
    return model, made


def filter_of(name: str | None) -> Any:
    def raises(name: str, module: nn.Module) -> bool:
        raise RuntimeError("filter_fn has raised")

    return {
        None: None,
        "none of them": lambda name, module: False,
        "all": lambda name, module: True,
        "raises": raises,
        "number": 3,
    }[name]


def check_swap(call: Spec, verdict: Verdict) -> None:
    args = call["args"]
    model, made = model_of(args)
    layers = call["target"].endswith("layer_norm_")
    if not isinstance(model, nn.Module) or args["model"] == "norm":
        verdict.faults.add("model")
    if args["filter_fn"] == "number":
        verdict.faults.add("filter_fn")
    if args["filter_fn"] == "raises":
        verdict.sure = False
    p = args.get("p")
    if p is not None and not (isinstance(p, float) and 0 < p <= 1):
        verdict.faults.add("p")
    more = {"p": p} if layers else {}
    x = torch.randn(3, WIDE, generator=torch.Generator().manual_seed(call["seed"]))
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    before = model(x) if isinstance(model, nn.Sequential) else None
    swap = fused_rmsnorm.replace_layer_norm_ if layers else fused_rmsnorm.replace_rms_norm_
    try:
        report = swap(model, filter_fn=filter_of(args["filter_fn"]), **more)
    except Exception as error:
        raise Raised(error) from error
    if verdict.faults:
        return
    after = list(model.parameters())
    assert all(a is b for a, b in zip(after, parameters, strict=True)), "parameters are others"
    assert all(isinstance(m, fused_rmsnorm.RMSNorm) for m in report.values())
    known = {"layer"} if layers else {"rms", "rms64"}
    expected = sum(1 for name, m in zip(args["parts"], made, strict=True) if name in known)
    if args["filter_fn"] in (None, "all") and "again" not in args["parts"]:
        assert len(report) == expected, f"{len(report)} of {expected} swapped"
    if not layers or not report:
        torch.testing.assert_close(model(x), before)


def check_plan(call: Spec, verdict: Verdict) -> None:
    a = call["args"]
    n = a["n"]
    if not isinstance(n, int) or not 1 <= n <= 1 << 48:
        verdict.faults.add("n")
    if a["dtype"] not in REAL:
        verdict.faults.add("dtype")
    if not isinstance(a["arch"], int) or abs(a["arch"]) >= 1 << 31:
        verdict.faults.add("arch")
    if not isinstance(a["backward"], bool):
        verdict.faults.add("backward")
    grad = a["grad_dtype"]
    if grad is not None and (grad not in REAL or WIDTH[grad] < WIDTH.get(a["dtype"], 0)):
        verdict.faults.add("grad_dtype")
    try:
        plan = fused_rmsnorm.launch_plan(**a)
    except Exception as error:
        raise Raised(error) from error
    if verdict.faults:
        return
    assert plan["family"] in ("registers", "cluster", "two_pass")
    assert 1 <= plan["threads"] * plan["rows_per_block"] <= 1024, plan
    assert 1 <= plan["max_grid"] < 1 << 31, plan
    assert 0 <= plan["shared_bytes"] <= 232448, plan
    if plan["family"] == "registers":
        assert plan["threads"] * plan["vector"] * plan["items"] * plan["cluster"] >= n, plan
