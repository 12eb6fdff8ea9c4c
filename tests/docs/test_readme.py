"""README.md: its example runs, its links lead somewhere, its measured tables are the results'."""

import re
import shutil
import subprocess
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_the_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    model = nn.Sequential(nn.Linear(8, 4096), nn.RMSNorm(4096))
    names = {"model": model}
    exec(code, names)
    x = torch.randn(2, 4096)
    torch.testing.assert_close(names["norm"](x), nn.RMSNorm(4096)(x))
    assert type(model[1]) is names["RMSNorm"]


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)", TEXT) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def committed(path: Path) -> str:
    """The text in the last commit, if there is one; make bench writes a new one over it."""
    if shutil.which("git") is None:
        return ""
    name = path.relative_to(ROOT).as_posix()
    found = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True)
    return found.stdout.decode() if found.returncode == 0 else ""


def test_measured_tables_are_those_of_the_results():
    """Line for line: a figure that was measured anew and committed cannot stay behind here."""
    measured = TEXT.split("## Measured\n")[1].split("\n## ")[0]
    shown = [line for line in measured.splitlines() if line.startswith("|")]
    results = [*(ROOT / "benchmarks/results").glob("*/*.md")]
    texts = [path.read_text() for path in results] + [committed(path) for path in results]
    lines = {line for text in texts for line in text.splitlines()}
    assert shown
    assert [line for line in shown if line not in lines] == []
