"""Modules, under the ways in which torch splits a model."""

import torch
from cases import numbers
from dtensor.case import communication, on, whole
from reference import same_bits
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from fused_rmsnorm import AddRMSNorm, PRMSNorm, RMSNorm


class Block(nn.Module):
    """The parts of a pre-norm transformer that a norm has to do with; rows do not mix."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm = RMSNorm(width, weight_offset=1.0)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.add_norm = AddRMSNorm(width, bias=True)
        self.p_norm = PRMSNorm(width, p=0.25)

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(self.up(self.norm(x)).relu())
        y, s = self.add_norm(h, residual=x)
        return s + self.p_norm(y)


def same_block() -> Block:
    """The same numbers on every rank, of which no norm has those that it starts with."""
    block = Block()
    with torch.no_grad():
        for i, p in enumerate(block.parameters()):
            p.copy_(numbers(p.shape, p.dtype, "cpu", i, 0.3) + float(p.dim() == 1))
    return block


def trained(block: Block, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and parameters of one step on the whole batch."""
    y = block(x)
    y.square().mean().backward()
    optimizer = torch.optim.AdamW(block.parameters(), lr=0.1)
    grads = {f"grad of {name}": p.grad for name, p in block.named_parameters()}
    optimizer.step()
    return {"y": y, **grads, **dict(block.named_parameters())}


def assert_same_training(got: dict, want: dict) -> None:
    for name, t in want.items():
        found = whole(got[name]) if isinstance(got[name], DTensor) else got[name].detach()
        torch.testing.assert_close(
            found, t.detach(), rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def sequence_parallel(block: Block, mesh: DeviceMesh) -> Block:
    return parallelize_module(
        block,
        mesh,
        {
            "norm": SequenceParallel(),
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
            "add_norm": SequenceParallel(),
            "p_norm": SequenceParallel(),
        },
    )


@on(2)
def sequence_parallel_block(mesh):
    x = numbers((3, 6, 32), torch.float32, "cpu", 40)
    block = sequence_parallel(same_block(), mesh)
    split = distribute_tensor(x, mesh, [Shard(1)])
    assert_same_training(trained(block, split), trained(same_block(), x))
    for name, p in block.named_parameters():
        assert isinstance(p, DTensor), name
    split.requires_grad_()
    _, counted = communication(lambda: block.norm(split).sum().backward())
    assert counted == {}


@on(2)
def two_inputs_under_distribute_module(mesh):
    """SequenceParallel would drop a second positional input."""
    norm = distribute_module(AddRMSNorm(32), mesh)
    x, residual = (numbers((3, 6, 32), torch.float32, "cpu", i) for i in range(2))
    want = AddRMSNorm(32)(x, residual)
    split = [distribute_tensor(t, mesh, [Shard(1)]) for t in (x, residual)]
    got, counted = communication(norm, *split)
    assert counted == {}
    assert all(same_bits(whole(a), b.detach()) for a, b in zip(got, want, strict=True))


def fully_sharded(block: Block, mesh: DeviceMesh) -> Block:
    for part in (block.norm, block.add_norm):
        fully_shard(part, mesh=mesh)
    return fully_shard(block, mesh=mesh)


@on(2)
def fsdp2(mesh):
    x = numbers((4, 6, 32), torch.float32, "cpu", 40)
    block = fully_sharded(same_block(), mesh)
    mine = x.chunk(2)[mesh.get_local_rank()]
    got = trained(block, mine)
    got["y"] = DTensor.from_local(got["y"], mesh, [Shard(0)])
    assert_same_training(got, trained(same_block(), x))


@on(2)
def fsdp2_from_meta(mesh):
    with torch.device("meta"):
        block = Block()
    fully_sharded(block, mesh).to_empty(device="cpu")
    for part in block.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    start = {"norm.weight": 0, "add_norm.weight": 1, "add_norm.bias": 0, "p_norm.weight": 1}
    with torch.no_grad():
        for (name, p), want in zip(
            block.named_parameters(), same_block().parameters(), strict=True
        ):
            assert p.placements == (Shard(0),)
            assert name not in start or bool((whole(p) == start[name]).all()), name
            p.copy_(distribute_tensor(want, mesh, [Shard(0)]))
    x = numbers((4, 6, 32), torch.float32, "cpu", 40)
    y = block(x.chunk(2)[mesh.get_local_rank()])
    assert same_bits(y.detach(), same_block()(x).chunk(2)[mesh.get_local_rank()].detach())


@on(4)
def fsdp2_with_sequence_parallel(mesh):
    x = numbers((4, 6, 32), torch.float32, "cpu", 40)
    batch, sequence = mesh["outer"], mesh["inner"]
    block = fully_sharded(sequence_parallel(same_block(), sequence), batch)
    mine = x.chunk(2)[batch.get_local_rank()]
    y = block(distribute_tensor(mine, sequence, [Shard(1)]))
    y.square().mean().backward()
    want = trained(same_block(), x)
    expected = want["y"].chunk(2)[batch.get_local_rank()].detach()
    torch.testing.assert_close(whole(y), expected, rtol=1e-5, atol=1e-6)
    grads = {f"grad of {name}": p.grad for name, p in block.named_parameters()}
    assert_same_training(grads, {name: want[name] for name in grads})
