"""Training for minutes: a small model with its norms replaced, in steps that differ in batch,
length, autocast, checkpointing and compilation. Memory has to stay flat, and every loss what it is
with torch's own norms."""

from __future__ import annotations

import ctypes
import gc
import resource
import time

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_rmsnorm import AddRMSNorm, RMSNorm, replace_rms_norm_

WIDTH, LAYERS, WORDS = 64, 3, 101
WARM = 60  # steps after which every shape and every way has been seen
# Few enough for torch's own caches of compiled matrix products to be full after that.
SHAPES = ((2, 2), (3, 40), (8, 17), (5, 33), (1, 64))
FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks")
FIELDS += ("fordblks", "keepcost")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.last, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor, keep: bool = True) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x) if keep else checkpoint(block, x, use_reentrant=False)
        return self.head(self.last(x))


class Trainer:
    """A model and its optimizer, in step with others of the same seed."""

    def __init__(self, fused: bool, compiled: bool = False) -> None:
        torch.manual_seed(0)
        self.model = Model()
        if fused:
            swapped = replace_rms_norm_(self.model)
            assert len(swapped) == LAYERS + 1, swapped
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.run = torch.compile(self.model, dynamic=True) if compiled else self.model

    def step(self, ids: Tensor, autocast: bool, keep: bool) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = self.run(ids[:, :-1]) if keep else self.model(ids[:, :-1], keep=False)
        loss = nn.functional.cross_entropy(y.float().flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        self.optimizer.step()
        return loss.item()


def allocated() -> int:
    """Bytes that malloc has handed out and not got back."""

    class Mallinfo2(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]

    gc.collect()
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def exercised(generator: torch.Generator) -> None:
    """Modules that are made and dropped, with results that outlive them."""
    x = torch.randn(7, WIDTH, generator=generator, requires_grad=True)
    y, s = AddRMSNorm(WIDTH, bias=True, p=0.5)(x, x)
    z = RMSNorm(WIDTH, group_size=16, casting_mode="llama")(y)
    (z * s).sum().backward()


def run(seconds: float, seed: int) -> int:
    torch.set_num_threads(1)  # the matrices are small
    generator = torch.Generator().manual_seed(seed)
    ours, again, theirs = Trainer(True), Trainer(True), Trainer(False)
    compiled = Trainer(True, compiled=True)
    begin, steps, worst, worst_compiled = time.monotonic(), 0, 0.0, 0.0
    at_first = 0
    marks: list[int] = []
    while time.monotonic() - begin < seconds or steps < 2 * WARM:
        batch, length = SHAPES[int(torch.randint(len(SHAPES), (1,), generator=generator))]
        ids = torch.randint(0, WORDS, (batch, length), generator=generator)
        autocast, keep = steps % 3 == 1, steps % 4 != 2
        loss = ours.step(ids, autocast, keep)
        # The same steps again, kept where they were checkpointed: the same bits.
        if again.step(ids, autocast, not keep) != loss:
            print(f"step {steps}: other bits with checkpointing the other way round")
            return 1
        expected = theirs.step(ids, autocast, keep)
        worst = max(worst, abs(loss - expected) / expected)
        other = compiled.step(ids, False, True) if not autocast else None
        if autocast:
            compiled.step(ids, True, True)
        elif other is not None:
            worst_compiled = max(worst_compiled, abs(other - loss) / loss)
        exercised(generator)
        steps += 1
        if steps == WARM:
            at_first = allocated()
        elif steps % WARM == 0:
            marks.append(allocated() - at_first)
    grown = min(marks[len(marks) // 2 :]) if marks else 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(
        f"{steps} steps of four trainings in {time.monotonic() - begin:.0f} s: losses differ from "
        f"those with torch.nn.RMSNorm by at most {worst:.1e}, compiled from eager by "
        f"{worst_compiled:.1e}, checkpointed from kept by no bit; {grown / 1024:.0f} KiB more "
        f"allocated than after {WARM} steps, peak {peak} MiB"
    )
    # bf16 rounds at other places in torch's norm; what it loses adds up over steps of training.
    flat = grown < 512 * 1024 + 64 * steps
    return int(not (flat and worst < 0.05 and worst_compiled < 0.05))
