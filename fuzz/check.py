"""One call made and judged: None if all is well, else what is wrong, in words."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from functools import partial

from . import arguments, others, rules
from .calls import Spec
from .case import TORCHS_OWN, Case, Raised
from .ways import WAYS

SKIPPED = "skipped"
# Errors of the caller are one of these; anything else (an internal assert, an AttributeError from
# inside of a function) is not what a user should see.
KINDS = (TypeError, ValueError, RuntimeError)
INTERNAL = re.compile(r"INTERNAL ASSERT|_ASSERT FAILED|Please report a bug")


def check(call: Spec) -> str | None:
    """Raises nothing but what kills the process."""
    if call["target"].startswith("other."):
        verdict = rules.Verdict()
        plan = call["target"] == "other.launch_plan"
        return outcome(partial(others.check_plan if plan else others.check_swap, call), verdict)
    try:
        args = arguments.materialise(call)
    except arguments.Impossible:
        return SKIPPED
    verdict = rules.judge(call)
    return outcome(lambda verdict: WAYS[call["way"]](Case(call, args)), verdict)


def outcome(made: Callable[[rules.Verdict], None], verdict: rules.Verdict) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made(verdict)
        except Raised as raised:
            return refused(raised.error, verdict)
        except AssertionError as error:
            # Of a call that should have been refused, whatever it gives is the lesser fault.
            return accepted(verdict) or f"wrong: {error}"
        except Exception:
            # The definition cannot be asked about arguments that are at fault.
            if not verdict.faults:
                raise
    return accepted(verdict)


def accepted(verdict: rules.Verdict) -> str | None:
    if verdict.faults and verdict.sure:
        return f"accepted, though at fault: {', '.join(sorted(verdict.faults))}"
    return None


def refused(error: BaseException, verdict: rules.Verdict) -> str | None:
    text = f"{type(error).__name__}: {str(error)[:600]}"
    if isinstance(error, ArithmeticError) and "no number" in str(error):
        return None  # the argument's own, passed on
    if INTERNAL.search(str(error)) or not isinstance(error, KINDS):
        return f"an error that is not the caller's: {text}"
    if not verdict.faults:
        return None if not verdict.sure or TORCHS_OWN.search(str(error)) else f"refused: {text}"
    named = any(re.search(rf"\b{name}\b", str(error)) for name in verdict.faults)
    if named or not verdict.sure or TORCHS_OWN.search(str(error)):
        return None
    return f"names none of {', '.join(sorted(verdict.faults))}: {text}"
