"""examples/: each runs by its own command, in its small form, and learns."""

import ast
import os
import re
import sys
from pathlib import Path

import pytest
from processes import completed

FOLDER = Path(__file__).parents[2] / "examples"
# What each needs beside torch; distributed ones run on two ranks.
NEEDS = {
    "finetune_transformers": ("transformers", "accelerate"),
    "fsdp2": (),
    "gru_prmsnorm": (),
    "lightning_module": ("lightning",),
    "tensor_parallel": (),
}
ON_RANKS = ("fsdp2", "tensor_parallel")


def run(name: str) -> str:
    """What the example prints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *(launcher if name in ON_RANKS else ())]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",  # tiny models: more threads would wait for each other
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    script = [str(FOLDER / f"{name}.py"), "--small"]
    done = completed([*command, *script], env=environment, timeout=500)  # or a rank waits for ever
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", NEEDS)
def test_example(name: str):
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"the example needs {package}")
    text = run(name)
    first, last = map(float, re.findall(r"loss ([\d.]+) -> ([\d.]+)", text)[0])
    assert last < 0.97 * first, text
    if name != "gru_prmsnorm":
        assert re.search(r"swapped [1-9]\d* norms", text), text
    if name in ON_RANKS:
        on_ranks, alone = map(float, re.findall(r"first step: (\S+) on 2 ranks, (\S+) on", text)[0])
        assert on_ranks == pytest.approx(alone, rel=1e-4), text
    if name == "finetune_transformers":
        difference = re.findall(r"without the swap: (\S+)", text)
        assert float(difference[0]) < 1e-4


def test_every_example_is_run_and_says_how():
    files = {path.stem: path.read_text() for path in FOLDER.glob("*.py")}
    assert files.keys() == NEEDS.keys()
    for name, text in files.items():
        how = ast.get_docstring(ast.parse(text)) or ""
        launcher = "torchrun --standalone --nproc-per-node 2" if name in ON_RANKS else "python"
        assert f"{launcher} examples/{name}.py " in how
        assert f"{launcher} examples/{name}.py --small" in how
        for package in NEEDS[name]:
            assert package in how.split("Needs: pip install ")[1]
