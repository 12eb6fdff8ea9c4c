"""Many calls in processes of their own, forked from one that has imported all and run nothing.

A call that kills its process costs that process: the next goes on behind it. A call that does not
come back is ended. What was found is then shrunk, each attempt in another fork.
"""

from __future__ import annotations

import collections
import copy
import json
import logging
import mmap
import os
import re
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from .calls import OTHERS, TARGETS, Spec, draw_call
from .check import SKIPPED, check

HANG = float(os.environ.get("FUZZ_HANG", "60"))  # seconds without an answer
THREADS = 2


@dataclass
class Finding:
    call: Spec
    text: str  # "crash: ...", "hang: ...", or what check() says

    @property
    def kind(self) -> str:
        return self.text.split(":")[0]

    @property
    def key(self) -> tuple[str, str]:
        return self.call["target"].split(".")[1], self.text[:70]


class Told:
    """What a forked process leaves behind, also when it dies: where it was, and lines of JSON."""

    def __init__(self) -> None:
        self.at = mmap.mmap(-1, 16)
        self.file = tempfile.NamedTemporaryFile("a+", suffix=".jsonl")  # noqa: SIM115
        self.errors = tempfile.NamedTemporaryFile("w+", suffix=".txt")  # noqa: SIM115

    def start(self, index: int) -> None:
        self.at[:] = struct.pack("qd", index, time.monotonic())

    def where(self) -> tuple[int, float]:
        return struct.unpack("qd", self.at[:])

    def say(self, line: Any) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in Path(self.file.name).read_text().splitlines()]

    def last_words(self) -> str:
        """The lines that say what happened: a sanitizer's, else the last of the standard error."""
        lines = Path(self.errors.name).read_text(errors="replace").strip().splitlines()
        telling = [n for n in lines if re.search(r"ERROR:|runtime error| in .* csrc/", n)]
        return "\n  ".join(line.strip()[:200] for line in (telling[:8] or lines[-12:]))


def judged(call: Spec) -> str | None:
    """check(), and what the fuzzer itself gets wrong as a finding of its own kind."""
    try:
        return check(call)
    except Exception:
        return f"fuzzer: {traceback.format_exc()[-1500:]}"


def in_a_fork(told: Told, work: Any, deadline: float) -> str | None:
    """Runs work() in a fork; None, or how it ended other than by returning."""
    pid = os.fork()
    if pid == 0:
        try:
            errors = os.open(told.errors.name, os.O_WRONLY | os.O_TRUNC)
            os.dup2(errors, 2)
            logging.disable(logging.CRITICAL)
            torch.set_num_threads(THREADS)
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            break
        _, since = told.where()
        if time.monotonic() - since > HANG:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"hang: no answer in {HANG:.0f} s"
        if time.monotonic() > deadline + HANG:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.005)
    if status == 0:
        return None
    code = os.waitstatus_to_exitcode(status)
    how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return f"crash: {how}\n  {told.last_words()}"


def warm_up() -> None:
    """What torch imports when it is first asked for: here once, and not in every fork."""
    mode = FakeTensorMode()
    with mode:
        torch.func.vmap(torch.neg)(mode.from_tensor(torch.ones(2)))
    torch.func.jvp(torch.neg, (torch.ones(2),), (torch.ones(2),))
    make_fx(torch.neg)(torch.ones(2))


def run(first: int, count: int, seconds: float) -> tuple[collections.Counter[str], list[Finding]]:
    """Calls `first` to `first + count`, or until the time is up."""
    warm_up()
    told, deadline = Told(), time.monotonic() + seconds
    counts: collections.Counter[str] = collections.Counter()
    findings = []
    index = first
    while index < first + count and time.monotonic() < deadline:

        def work(index: int = index) -> None:
            for i in range(index, first + count):
                if time.monotonic() > deadline:
                    break
                told.start(i)
                told.say({"index": i, "text": judged(draw_call(i))})

        told.start(index)
        ended = in_a_fork(told, work, deadline)
        if ended is None:
            break
        index = told.where()[0]
        told.say({"index": index, "text": ended})
        index += 1
    for line in told.lines():
        call, text = draw_call(line["index"]), line["text"]
        counts["skipped" if text == SKIPPED else "calls"] += 1
        if text != SKIPPED:
            counts[f"target {call['target']}"] += 1
            counts[f"way {call['way']}"] += 1
            if text is not None:
                findings.append(Finding(call, text))
    return counts, findings


def once(call: Spec) -> str | None:
    """One call in a fork: what is wrong with it."""
    told = Told()
    told.start(0)

    def work() -> None:
        told.say(judged(call))

    ended = in_a_fork(told, work, time.monotonic() + HANG)
    return ended or told.lines()[-1]


DEFAULTS = {
    "weight": None,
    "bias": None,
    "grad_sum": None,
    "eps": None,
    "p": None,
    "weight_offset": 0.0,
    "casting_mode": "torch",
    "activation": "silu",
    "norm_before_gate": True,
    "group_size": None,
}


def simpler(call: Spec) -> Iterator[Spec]:
    """Calls that are simpler by one step, the largest steps first."""

    def changed(**args: Any) -> Spec:
        return {**call, "args": {**copy.deepcopy(call["args"]), **args}}

    tensors = {k: v for k, v in call["args"].items() if isinstance(v, dict) and "shape" in v}
    for name, default in DEFAULTS.items():
        if name in call["args"] and call["args"][name] != default:
            yield changed(**{name: default})
    for way in ("no_grad", "plain"):
        if call["way"] not in ("no_grad", "plain"):
            yield {**copy.deepcopy(call), "way": way}
    for name, spec in tensors.items():
        for key, default in (
            ("kind", None),
            ("fill", None),
            ("grad", False),
            ("layout", "contiguous"),
        ):
            if spec.get(key, default) != default:
                yield changed(**{name: {**spec, key: default}})
    if len({t["dtype"] for t in tensors.values()} | {"float32"}) > 1:
        yield changed(**{n: {**t, "dtype": "float32"} for n, t in tensors.items()})
    # Sizes: the same change to all that have the same one.
    sizes = sorted({s for t in tensors.values() for s in t["shape"] if s > 1}, reverse=True)
    for size in sizes:
        for less in {1, size // 2, size - 1}:
            smaller = {
                n: {**t, "shape": [less if s == size else s for s in t["shape"]]}
                for n, t in tensors.items()
            }
            own = call["args"].get("normalized_shape")
            if isinstance(own, list):
                smaller["normalized_shape"] = [less if s == size else s for s in own]
            elif own == size:
                smaller["normalized_shape"] = less
            yield changed(**smaller)
    ranks = {n: len(t["shape"]) for n, t in tensors.items()}
    top = max(ranks.values(), default=0)
    if top > 1:
        yield changed(
            **{
                n: {**t, "shape": t["shape"][1:] if ranks[n] == top else t["shape"]}
                for n, t in tensors.items()
            }
        )


def shrink(finding: Finding, seconds: float = 30) -> Finding:
    """The simplest call found that fails in the same way."""
    deadline = time.monotonic() + seconds
    best, progress = finding, True
    while progress and time.monotonic() < deadline:
        progress = False
        for call in simpler(best.call):
            text = once(call)
            if text and text != SKIPPED and text.split(":")[0] == finding.kind:
                best, progress = Finding(call, text), True
                break
            if time.monotonic() > deadline:
                break
    return best


def report(findings: list[Finding], most: int = 12) -> None:
    """Each kind of finding once, shrunk, with what makes it again."""
    by_key: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        by_key.setdefault(finding.key, []).append(finding)
    for alike in list(by_key.values())[:most]:
        again = once(alike[0].call)
        shrunk = shrink(alike[0]) if again else alike[0]
        seed = alike[0].call["seed"]
        print(f"\n{len(alike)} x {shrunk.call['target']}, {shrunk.call['way']}: {shrunk.text}")
        print(f"first: --seed {seed} --calls 1{'' if again else ' (only after others before it)'}")
        print(f"shrunk: --call '{json.dumps(shrunk.call)}'")
    if len(by_key) > most:
        print(f"\n... and {len(by_key) - most} more kinds")
    sys.stdout.flush()


def kinds(counts: collections.Counter[str]) -> str:
    targets = sum(1 for k in counts if k.startswith("target "))
    ways = sum(1 for k in counts if k.startswith("way "))
    return f"{targets} of {len(TARGETS) + len(OTHERS)} targets in {ways} ways"
