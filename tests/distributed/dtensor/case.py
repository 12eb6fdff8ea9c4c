"""What every check starts from: whole tensors, and the same tensors split over a mesh of ranks."""

import itertools
from collections.abc import Callable

import torch
from cases import numbers
from reference import Options, assert_backward, assert_forward
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from fused_rmsnorm import functional

MESHES = {2: (2,), 4: (2, 2)}  # by number of ranks
CHECKS: dict[int, dict[str, Callable[[DeviceMesh], None]]] = {ranks: {} for ranks in MESHES}


def on(ranks: int) -> Callable[[Callable], Callable]:
    """A check, run with the mesh of that many ranks."""

    def register(check: Callable) -> Callable:
        CHECKS[ranks][check.__name__] = check
        return check

    return register


SHAPE = (3, 5, 33)  # of which two ranks get parts of different size
COLUMNS = Shard(2)
WHOLE = Replicate()


class Case:
    """Whole tensors, the same on every rank."""

    def __init__(self, x_type=torch.float32, w_type=torch.float32, shape=SHAPE, **options) -> None:
        self.options = Options(**options)
        self.x, self.residual, self.dsum = (numbers(shape, x_type, "cpu", i) for i in range(3))
        self.weight, self.bias = (numbers(shape[-1:], w_type, "cpu", i) for i in (3, 4))
        self.dy = numbers(shape, self.options.output_type(x_type, w_type), "cpu", 5)

    def norm(self, x, weight, bias):
        o = self.options
        return functional.rms_norm(x, x.shape[-1:], weight, o.eps, bias=bias, **o.keywords())

    def add_norm(self, x, residual, weight, bias):
        o, n = self.options, x.shape[-1:]
        return functional.add_rms_norm(x, residual, n, weight, o.eps, bias=bias, **o.keywords())

    def alone(self) -> list[Tensor]:
        """y, dx, dw, db of one device."""
        leaves = [t.clone().requires_grad_() for t in (self.x, self.weight, self.bias)]
        y = self.norm(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]

    def split(self, mesh, x_placements, w_placements=None):
        """y, dx, dw, db as DTensors; the collectives of the forward and of the backward."""
        w_placements = w_placements or [WHOLE] * mesh.ndim
        x = leaf(self.x, mesh, x_placements)
        weight, bias = (leaf(t, mesh, w_placements) for t in (self.weight, self.bias))
        y, forward = communication(self.norm, x, weight, bias)
        dy = distribute_tensor(self.dy, mesh, y.placements)
        grads, backward = communication(torch.autograd.grad, y, (x, weight, bias), dy)
        return [y, *grads], forward, backward

    def assert_right(self, y, dx, dw, db) -> None:
        inputs = (self.x, self.weight, self.bias)
        assert_forward(whole(y), *inputs, self.options)
        grads = [None if t is None else whole(t) for t in (dx, dw, db)]
        assert_backward(grads, *inputs, self.dy, self.options)


CASES = [
    Case(x_type, **options)
    for x_type, options in itertools.product(
        (torch.float32, torch.bfloat16),
        ({}, {"p": 0.3, "weight_offset": 1.0, "eps": 1e-5}, {"casting_mode": "llama"}),
    )
]


def leaf(t: Tensor, mesh: DeviceMesh, placements) -> DTensor:
    return distribute_tensor(t, mesh, placements).detach().requires_grad_()


def communication(function: Callable, *args) -> tuple:
    """What the function returns, and how many collectives of which kind it took."""
    with CommDebugMode() as mode:
        result = function(*args)
    return result, {op.__name__: n for op, n in mode.get_comm_counts().items() if n}


def whole(t: DTensor) -> Tensor:
    """What the ranks have of it, contiguous on each, in one tensor. That is contiguous, too, but
    torch 2.11 leaves it with strides where the parts differ in size."""
    own = t.to_local()
    assert t.dtype == own.dtype
    assert t.is_contiguous()
    assert own.is_contiguous()
    return t.detach().full_tensor().contiguous()


def placements(*tensors: DTensor) -> list[tuple]:
    return [tuple(t.placements) for t in tensors]
