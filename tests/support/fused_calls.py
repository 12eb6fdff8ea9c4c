"""Which operators run: what a test asserts when it says that something stays on the fused ones."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Counts the operators that reach a backend while it is entered, by their name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))

    def fused(self) -> dict[str, int]:
        """Calls of this package's operators, without its prefix."""
        prefix = "fused_rmsnorm::"
        return {k.removeprefix(prefix): n for k, n in self.count.items() if k.startswith(prefix)}

    def arithmetic(self) -> dict[str, int]:
        """Calls of torch's operators that read or write numbers: views and allocation left out."""
        free = {"detach", "view", "expand", "empty", "empty_like", "alias", "t", "transpose"}
        free |= {"permute", "unsqueeze", "squeeze", "_unsafe_view", "as_strided", "slice"}
        names = {k.removeprefix("aten::"): n for k, n in self.count.items() if "aten::" in k}
        return {k: n for k, n in names.items() if k not in free}


def profiled(function) -> Counter[str]:
    """Every operator that ran, also those inside of a kernel, where no dispatch mode looks."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return Counter(event.name for event in profile.events() if "::" in event.name)
