"""docs/ and README.md: their code runs, what they name exists, their plots are of the results."""

import ast
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fused_rmsnorm

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md"])
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
WITH_CODE = [name for name, text in TEXTS.items() if "```python" in text]
# What pages take from packages that need not be there: what their code says -> package.
NEEDS = {
    "from transformers": "transformers",
    "import Trainer": "accelerate",
    "import lightning": "lightning",
    "import onnxscript": "onnxscript",
}


def lacks(page: str) -> list[str]:
    """Packages that the page's code needs and that are not here."""
    wanted = [package for words, package in NEEDS.items() if words in TEXTS[page]]
    return [package for package in wanted if importlib.util.find_spec(package) is None]


# Pages of plain torch share a process, which is what most of their time goes to.
ALONE = [page for page in WITH_CODE if any(words in TEXTS[page] for words in NEEDS)]
GROUPS = [*([page] for page in ALONE), [page for page in WITH_CODE if page not in ALONE]]

# Not in this process: pages start process groups, and trainers that keep a state for ever.
RUN = """
import sys
import torch
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

for page in sys.argv[1:]:
    torch.manual_seed(0)
    document = Document.parse(page, PythonCodeBlockParser())
    if page.endswith("README.md"):
        layers = torch.nn.Linear(8, 4096), torch.nn.RMSNorm(4096)
        document.namespace["model"] = torch.nn.Sequential(*layers)
    examples = list(document.examples())
    for example in examples:
        example.evaluate()
    print("blocks:", len(examples))
"""


@pytest.mark.parametrize("pages", GROUPS, ids=lambda pages: pages[0] if len(pages) == 1 else "rest")
def test_the_code_runs(pages: list[str], tmp_path: Path) -> None:
    """Every Python block of a page, one after the other, with the names of those before it.

    Blocks in HTML comments (``<!-- invisible-code-block: python``) make what readers have: a model.
    """
    pytest.importorskip("sybil", reason="sybil is not installed")
    if missing := [package for page in pages for package in lacks(page)]:
        pytest.skip(f"the code of {', '.join(pages)} needs {', '.join(missing)}")
    done = subprocess.run(
        [sys.executable, "-c", RUN, *(str(ROOT / page) for page in pages)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = [int(count) for count in re.findall(r"blocks: (\d+)", done.stdout)]
    written = [len(re.findall(r"^\s*```python", TEXTS[page], re.MULTILINE)) for page in pages]
    assert all(r >= w > 0 for r, w in zip(run, written, strict=True))


# -- what they name --------------------------------------------------------------------------------

FOLDERS = (
    *("benchmarks", "cmake", "conda", "csrc", "docs", "examples", "python", "release"),
    *("requirements", "tests", "torch-ext"),
)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
PATH = re.compile(
    rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./*-]*\w/?|[\w-]+\.(?:toml|cff))(?![\w*])"
)
NAMED_FILE = re.compile(r"`([\w-]+\.(?:py|pyi|h|cpp|cu|cuh|cmake|txt))`")
CODE = re.compile(r"```.*?```", re.DOTALL)


def files() -> set[str]:
    """Of the repository, as far as it is known what belongs to it."""
    if shutil.which("git") and (ROOT / ".git").exists():
        said = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return {name for name in said.stdout.splitlines() if (ROOT / name).exists()}
    return {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()}


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_paths_lead_somewhere(page: str) -> None:
    text, folder = TEXTS[page], (ROOT / page).parent
    links = [link for link in LINK.findall(text) if "://" not in link]
    assert [link for link in links if not (folder / link).exists()] == []
    prose = LINK.sub("](", text)
    paths = [path for path in PATH.findall(prose) if "*" not in path and "NAME" not in path]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    names = {name.rsplit("/", 1)[-1] for name in files()}
    assert [name for name in NAMED_FILE.findall(CODE.sub("", text)) if name not in names] == []


def names_of_tests() -> set[str]:
    """Names of test files and of the tests in them, those of tests/dtensor included."""
    found = set()
    for path in (ROOT / "tests").rglob("*.py"):
        found.add(path.stem)
        tree = ast.parse(path.read_text())
        found |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return found | {path.stem for path in (ROOT / "tests").rglob("*.cpp")}


def test_every_test_that_is_named_exists() -> None:
    known = names_of_tests()
    named = {
        (page, name)
        for page, text in TEXTS.items()
        for name in re.findall(r"(?<![\w/])test_\w+", text)
    }
    assert len(named) > 100
    assert [(page, name) for page, name in sorted(named) if name not in known] == []


def test_tests_are_named_beside_their_files() -> None:
    """``test_file: `test_one`, `test_two` ``: each is in that file."""
    wrong = []
    sources = {path.stem: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for page, text in TEXTS.items():
        for file, listed in re.findall(r"`?(test_\w+)`?:\s+((?:`test_\w+`(?:,\s+)?)+)", text):
            for name in re.findall(r"test_\w+", listed):
                if f"def {name}(" not in sources.get(file, ""):
                    wrong.append((page, file, name))
    assert wrong == []


def test_arguments_of_the_modules_are_those_of_their_forward() -> None:
    """In the table of docs/api.md, which people call them by."""
    line = r"^\| `(\w+)\(.*`forward\(([^)]*)\)"
    found = dict(re.findall(line, TEXTS["docs/api.md"], re.MULTILINE))
    assert found.keys() == {"RMSNorm", "AddRMSNorm", "RMSNormGated"}
    for name, given in found.items():
        parameters = list(inspect.signature(getattr(fused_rmsnorm, name).forward).parameters)
        assert [p.partition("=")[0].strip() for p in given.split(",")] == parameters[1:], name


# -- the site --------------------------------------------------------------------------------------


def test_every_page_is_in_the_menu() -> None:
    menu = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert menu == {path.name for path in DOCS.glob("*.md")}


def test_the_reference_has_all_that_is_public() -> None:
    shown = set(re.findall(r"^::: fused_rmsnorm\.(\S+)", TEXTS["docs/reference.md"], re.MULTILINE))
    public = set(fused_rmsnorm.__all__) - {"functional"}
    public |= {f"functional.{name}" for name in fused_rmsnorm.functional.__all__}
    types = {"functional.Activation", "functional.CastingMode"}
    assert public - types <= {
        re.sub(r"^(modules|replace|_build_info|_info)\.", "", s) for s in shown
    }


@pytest.mark.parametrize("plot", sorted(DOCS.glob("plots/*.svg")), ids=lambda path: path.stem)
def test_plots_are_of_the_results(plot: Path) -> None:
    """Each says which files it was drawn from: as they are, or as they were committed last.

    When this fails after results were measured anew: ``make plots``, and commit what it writes.
    """
    (said,) = re.findall(r"drawn from ([^<]+)<", plot.read_text())
    for stamp in said.split("; "):
        name, digest = stamp.split()
        texts = [(RESULTS / name).read_bytes()]
        if shutil.which("git"):
            path = (RESULTS / name).relative_to(ROOT).as_posix()
            shown = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True)
            texts.append(shown.stdout)
        assert digest in {hashlib.sha256(text).hexdigest()[:16] for text in texts}, name


def test_every_plot_is_shown() -> None:
    shown = {name for text in TEXTS.values() for name in re.findall(r"plots/([\w-]+)\.svg", text)}
    assert shown == {path.stem for path in DOCS.glob("plots/*.svg")}


QUICK = {(1, 128), (32, 512), (80, 1000), (512, 1024), (4096, 4096), (4096, 4097)}


def test_curves_are_drawn_where_sizes_were_measured(tmp_path: Path) -> None:
    """A quick run has too few sizes for curves over rows and N, a full one has them."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from benchmarks.norms.cases import FULL_SHAPES
    from benchmarks.plots import norms, style

    path = RESULTS / "intel-xeon-2-cores-avx512" / "norms.json"
    quick = json.loads(path.read_text())
    entries = quick["entries"]
    quick["entries"] = {
        key: e for key, e in entries.items() if (e.get("rows"), e.get("n")) in QUICK
    }
    few, many = tmp_path / "few.json", tmp_path / "many.json"
    few.write_text(json.dumps(quick))
    with pytest.raises(style.NotMeasured, match="too few sizes"):
        norms.curves(tmp_path / "few.svg", few)
    for dtype in ("float32", "bfloat16"):
        for direction in ("forward", "forward+backward"):
            like = entries[f"speed/2t/{dtype}/4096x4096/{direction}"]
            for rows, n in FULL_SHAPES:
                entry = {**like, "rows": rows, "n": n}
                quick["entries"][f"speed/2t/{dtype}/{rows}x{n}/{direction}"] = entry
    many.write_text(json.dumps(quick))
    norms.curves(tmp_path / "many.svg", many)
    assert "drawn from" in (tmp_path / "many.svg").read_text()
    source = style.Source(many)
    assert len(norms.chosen(source, "speed", "float32", "forward")) == len(QUICK)


# -- figures in the text ---------------------------------------------------------------------------


def committed(name: str) -> dict:
    """A results file as it was committed last; make bench writes over the files."""
    if shutil.which("git"):
        shown = subprocess.run(
            ["git", "show", f"HEAD:benchmarks/results/{name}"], cwd=ROOT, capture_output=True
        )
        if shown.returncode == 0:
            return json.loads(shown.stdout)
    return json.loads((RESULTS / name).read_text())


def test_figures_of_large_inputs() -> None:
    found: dict[str, list[int]] = {}
    for entry in committed("intel-xeon-2-cores-avx512/norms.json")["entries"].values():
        if entry.get("rows") == 4096 and "copy_bytes" in entry and "rms_norm" in entry["times"]:
            times = {name: t["median"] for name, t in entry["times"].items()}
            if "add_rms_norm" in times:
                continue
            copy = min(times[name] for name in ("clone", "memcpy", "nt_copy"))
            share = (entry["bytes"] / times["rms_norm"]) / (entry["copy_bytes"] / copy)
            found.setdefault(entry["n"], []).append(round(100 * share))
    text = " ".join(TEXTS["docs/performance.md"].split())
    even, odd = found[4096], found[4097]
    assert f"4096 × 4096 runs at {min(even)} to {max(even)} %" in text
    assert f"it is {min(odd)} to {max(odd)} %" in text


def test_figures_of_the_model() -> None:
    models = committed("compiled/counts.json")["models"]
    lanes_idle = (72, 80, 96, 192)  # columns that leave lanes of a warp without work

    def shares(
        gpu: str, names: str = r"(?:forward|backward) (\d+) bf16$"
    ) -> dict[int, list[float]]:
        found: dict[int, list[float]] = {}
        for name, model in models[gpu].items():
            if m := re.match(names, name):
                found.setdefault(int(m[1]), []).append(model["share of memory"])
        return {n: f for n, f in found.items() if n % 8 == 0 and n <= 131072}

    def percents(of: list[float]) -> str:
        return f"{100 * min(of):.0f} to {100 * max(of):.0f} %"

    text = " ".join(TEXTS["docs/performance.md"].split())
    assert min(min(f) for f in shares("H100").values()) == 1
    plain = shares("B200")
    full = [share for n, f in plain.items() if n not in lanes_idle for share in f]
    assert f"at {percents(full)} of a copy's speed" in text
    every = shares("B200", r"(?:forward|backward) (\d+) bf16(?: heads of a packed QKV)?$")
    idle = [share for n in lanes_idle for share in every[n]]
    assert f"without work, at {percents(idle)}" in text
    gates = shares("B200", r"(?:forward|backward) (\d+) bf16 gate (?:last|first)$")
    longer = [share for n, f in gates.items() if n > 128 for share in f]
    assert f"gates of 128 numbers are at {percents(gates[128])} and" in text
    assert f"longer ones at {percents(longer)}, weights" in text
    weights = shares("B200", r"(?:forward|backward) (\d+) bf16 weight (?:per head|and bias per)")
    assert f"several rows at {percents([s for f in weights.values() for s in f])}, by" in text


def test_the_papers_table_beside_ours() -> None:
    """Each line of paper.md's table is made from the results."""
    from benchmarks.harness.tables import entries_of, times_of
    from benchmarks.paper.models import MODELS
    from benchmarks.paper.report import published, saved

    for e in entries_of(committed("intel-xeon-2-cores-avx512/paper_scale_1.json"), "time"):
        times = times_of(e)
        cells = [
            MODELS[e["model"]].title,
            *(published(e["model"], norm) for norm in ("rms_norm", "prms_norm")),
            *(saved(times, n, "layer_norm_composed") for n in ("rms_norm", "prms_norm", "none")),
        ]
        assert "| " + " | ".join(cells) + " |" in TEXTS["docs/paper.md"]
