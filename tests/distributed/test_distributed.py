"""DTensor, FSDP2 and tensor parallelism between gloo processes; and that it costs nothing before.

The checks are in the folder dtensor. A group of processes runs all of them; each is a test here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dtensor.run import CHECKS

HERE = Path(__file__).parent


def environment() -> dict[str, str]:
    paths = [str(HERE), *sys.path]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "GLOO_SOCKET_IFNAME": "lo"}
    return {**os.environ, **ours, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, list[str]]]]:
    """By number of ranks, what each rank left behind: check -> outcome and why."""
    left = {}
    for ranks in CHECKS:
        folder = tmp_path_factory.mktemp(f"{ranks}-ranks")
        logs = [folder / f"{rank}.log" for rank in range(ranks)]
        processes = []
        for rank, log in enumerate(logs):
            command = [sys.executable, "-m", "dtensor.run", str(rank), str(ranks), str(folder)]
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(command, stdout=out, stderr=out, env=environment())
                )
        try:
            codes = [process.wait(timeout=1800) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert not any(codes), "\n".join(log.read_text() for log in logs)
        left[ranks] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    return left


@pytest.mark.parametrize(
    ("ranks", "check"),
    [
        pytest.param(ranks, check, id=f"{check}-{ranks}")
        for ranks, checks in CHECKS.items()
        for check in checks
    ],
)
def test_on_ranks(outcomes, ranks, check):
    why = {"passed": [], "failed": [], "skipped": []}
    for rank in outcomes[ranks]:
        outcome, text = rank[check]
        why[outcome].append(text)
    assert not why["failed"], "\n".join(why["failed"])
    if why["skipped"]:
        pytest.skip(why["skipped"][0])


def run_alone(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:fused_rmsnorm", "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


REGISTERED = """
from torch.distributed.tensor import DTensor
known = DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
assert torch.ops.fused_rmsnorm.rms_norm_fwd.default in known
assert not any(type(finder).__module__.startswith("fused_rmsnorm") for finder in sys.meta_path)
"""


def test_waits_for_dtensor():
    """Nothing is imported for it before; looking for the module is not importing it."""
    run_alone(
        "import importlib.util, sys, torch, fused_rmsnorm\n"
        "fused_rmsnorm.RMSNorm(8)(torch.ones(2, 8))\n"
        "assert importlib.util.find_spec('torch.distributed.tensor') is not None\n"
        "assert 'torch.distributed.tensor' not in sys.modules\n"
        "assert 'fused_rmsnorm.distributed' not in sys.modules\n" + REGISTERED
    )


@pytest.mark.parametrize("first", ["torch.distributed.tensor", "fused_rmsnorm.distributed"])
def test_order_of_imports(first):
    run_alone(f"import sys, torch, {first}, fused_rmsnorm\n" + REGISTERED)


@pytest.mark.parametrize(
    "before",
    [
        "importlib.reload(fused_rmsnorm)",
        "[sys.modules.pop(m) for m in list(sys.modules) if m.startswith('fused_rmsnorm')]; "
        "import fused_rmsnorm",
        "sys.meta_path.insert(0, type('Old', (), {'find_module': lambda *_: None})())",
    ],
    ids=["reloaded", "imported anew", "a finder without find_spec"],
)
def test_beside_other_finders(before):
    """One of our own kind, of a package that was imported twice, and one of before Python 3.4."""
    run_alone(f"import importlib, sys, torch, fused_rmsnorm\n{before}\n" + REGISTERED)


def test_another_dtensor_is_no_reason_to_fail():
    """A later torch may move what the rules are made of: then a warning, and torch works."""
    run_alone(
        "import sys, warnings, torch, fused_rmsnorm\n"
        "sys.modules['fused_rmsnorm.distributed'] = None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    import torch.distributed.tensor\n"
        "assert any('fused_rmsnorm.distributed does not fit' in str(w.message) for w in caught)\n"
        "assert torch.distributed.tensor.DTensor\n"
    )
