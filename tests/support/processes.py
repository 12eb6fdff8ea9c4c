"""Other processes, run to their end."""

import subprocess
from collections.abc import Callable
from typing import Any

# Before Python 3.14 a thread that wants the interpreter while that ends is ended by it, and C++
# calls std::terminate then. So a thread of torch's that lets go of a Python object too late aborts
# a process that was done, in one of three runs on some machines: gloo's (a core file shows
# ProcessGroupGloo::runLoop destroying an AsyncAllreduceWork), or the autograd engine's for another
# device.
ABORTED = "terminate called without an active exception"
ATTEMPTS = 5


def completed_together(
    commands: Callable[[int], list[list[str]]], timeout: float | None = None, **options: Any
) -> list["subprocess.CompletedProcess[str]"]:
    """commands(attempt), run at the same time, with their output as text; where one ends by that
    abort, and by nothing else, all are tried again."""
    for attempt in range(ATTEMPTS):
        running = [
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
            )
            for command in commands(attempt)
        ]
        try:
            told = [process.communicate(timeout=timeout) for process in running]
        finally:
            for process in running:
                process.kill()
        if attempt == ATTEMPTS - 1 or not any(ABORTED in err for _, err in told):
            break
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(running, told, strict=True)
    ]


def completed(command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """One process, likewise."""
    (done,) = completed_together(lambda attempt: [command], **options)
    return done
