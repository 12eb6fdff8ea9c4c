"""Other processes, run to their end."""

import subprocess
from typing import Any

# Before Python 3.14 a thread that wants the interpreter while that ends is ended by it, and C++
# calls std::terminate then. So a thread of torch's (gloo's, or the autograd engine's for another
# device) that lets go of a Python object too late aborts a process that was done, in one of ten
# runs here.
ABORTED = "terminate called without an active exception"


def completed(command: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """subprocess.run with its output as text; that abort, and nothing else, is tried again."""
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
        if ABORTED not in done.stderr:
            break
    return done
