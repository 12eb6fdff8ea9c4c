"""What this build is."""

from . import _eager, _info


def build_info() -> dict[str, str | bool | None]:
    """What this build is: versions, instruction set in use, CUDA or why not.

    ``torch`` is the version that the operators in use were built against; it agrees with the torch
    that runs in its first two numbers.
    """
    return {"torch": _eager.torch_version, **_info.build_info()}
