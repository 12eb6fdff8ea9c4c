"""The harness: statistics with known answers, resuming, reporting, counting memory."""

import gc
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

bench_norms = pytest.importorskip(
    "benchmarks.norms.__main__", reason="needs the repository's root on the path"
)

import benchmarks.compile_modes.__main__ as compile_modes  # noqa: E402
from benchmarks.harness import environment, results, timing  # noqa: E402
from benchmarks.harness.copies import COPIES, copy_by  # noqa: E402
from benchmarks.harness.memory import saved_bytes  # noqa: E402
from benchmarks.harness.results import Results, load  # noqa: E402
from benchmarks.harness.tables import ratio, times_of  # noqa: E402
from benchmarks.harness.timing import (  # noqa: E402
    Contender,
    Timing,
    measure,
    speedup,
    summarise,
)
from benchmarks.norms import cases, speed  # noqa: E402
from benchmarks.norms.memory import memory_case  # noqa: E402
from benchmarks.paper.models.llama_block import Sizes  # noqa: E402

TINY = ["--threads", "1", "--seconds", "0.01", "--no-compile", "--dtypes", "float32"]


@pytest.fixture(autouse=True)
def _own_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's malloc settings would stay for the tests after these."""
    monkeypatch.setattr(bench_norms, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(compile_modes, "keep_freed_memory", lambda: None)


def synthetic(rng: np.random.Generator, median: float, rounds: int = 30) -> Timing:
    """A contender whose samples spread by 5 % and have outliers."""
    samples = median * np.exp(rng.normal(0, 0.05, (rounds, 2)))
    samples[rng.random((rounds, 2)) < 0.05] *= 3
    return summarise(samples, 1)


# --- statistics


@pytest.mark.parametrize("rounds", [5, 30])
def test_equal_contenders_get_no_ratio(rounds: int) -> None:
    rng = np.random.default_rng(0)
    ratios = [speedup(synthetic(rng, 1, rounds), synthetic(rng, 1, rounds)) for _ in range(200)]
    assert sum(r is not None for r in ratios) <= 4


def test_a_ratio_of_one_and_a_half_is_found_in_both_directions() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        fast, slow = synthetic(rng, 2e-6), synthetic(rng, 3e-6)
        assert speedup(fast, slow) == pytest.approx(1.5, rel=0.08)
        assert speedup(slow, fast) == pytest.approx(1 / 1.5, rel=0.08)


def test_summary_of_known_samples() -> None:
    t = summarise(np.arange(1.0, 12.0).repeat(2).reshape(-1, 2), 7)  # 1, 1, 2, 2 ... 11, 11
    assert (t.median, t.p20, t.p80) == (6, 3, 9)
    assert (t.samples, t.calls_per_sample, t.noise) == (22, 7, 0)


def test_noise_is_the_first_run_of_each_round_against_the_second() -> None:
    pairs = np.tile([2.0, 1.0], (20, 1))
    assert summarise(pairs, 1).noise == pytest.approx(math.log(2))
    # Rounds that differ from each other, with the same spread over all, are another thing.
    rounds = np.repeat(np.tile([2.0, 1.0], 10)[:, None], 2, axis=1)
    assert summarise(rounds, 1).noise == 0


def test_too_few_rounds_say_nothing() -> None:
    one, other = (summarise(np.full((2, 2), v), 1) for v in (1.0, 5.0))
    assert speedup(one, other) is None
    assert speedup(*(summarise(np.full((3, 2), v), 1) for v in (1.0, 5.0))) == 5
    json.loads(json.dumps(one.noise), parse_constant=pytest.fail)  # no NaN, no Infinity


def test_measure_interleaves_and_gives_every_contender_two_turns_per_round() -> None:
    turns: list[str] = []
    seen: dict[str, list[int]] = {"a": [], "b": [], "c": []}

    def timer(call, inputs, calls):
        for _ in range(calls):
            call(next(inputs))
        return {"a": 1.0, "b": 1.5, "c": 1.0}[turns[-1]] * calls * 1e-4

    def contender(name: str) -> Contender:
        def call(i: int) -> None:
            turns.append(name)
            seen[name].append(i)

        return Contender(name, call, [0, 1, 2])

    times = measure(
        [contender(n) for n in "abc"], seconds=0, min_rounds=40, sample_seconds=1e-4, timer=timer
    )
    rounds = [turns[-6 * (i + 1) : len(turns) - 6 * i] for i in range(40)]
    assert {t.calls_per_sample for t in times.values()} == {1}
    assert all(sorted(r) == list("aabbcc") for r in rounds)
    assert len({tuple(r) for r in rounds}) > 20  # of 90 orders
    assert all(s == [i % 3 for i in range(len(s))] for s in seen.values())
    assert speedup(times["a"], times["b"]) == pytest.approx(1.5)
    assert speedup(times["a"], times["c"]) is None
    assert times["a"].samples == 80


def test_measure_warms_up_what_is_slow_no_more_than_needed() -> None:
    """Each input, and one call more; a short call is also repeated until a sample is long."""
    took = {"slow": 5.0, "short": 1e-5}
    calls = dict.fromkeys(took, 0)

    def run(name: str) -> float:
        calls[name] += 1
        return took[name]

    def timer(call, inputs, n):
        return sum(call(next(inputs)) for _ in range(n))

    contenders = [Contender(name, lambda _, name=name: run(name), [0, 1]) for name in took]
    times = measure(contenders, seconds=0, min_rounds=3, sample_seconds=1e-4, timer=timer)
    assert calls == {"slow": 3 + 2 * 3, "short": 3 + 4 + 10 + 2 * 3 * 10}
    assert [times[name].calls_per_sample for name in took] == [1, 10]


def test_measure_refuses_one_name_twice_and_leaves_the_collector_as_it_was() -> None:
    same = Contender("a", lambda i: None, [0])
    with pytest.raises(ValueError, match="different names"):
        measure([same, same])
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        measure([Contender("a", lambda i: 1 // i, [0])])
    assert gc.isenabled()


def test_threads_are_as_before_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()

    def interrupted(case, device, seconds, runtimes):
        assert torch.get_num_threads() == before + 1
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "_time_case", interrupted)
    case = cases.Case("speed", 2, 8, torch.float32, "forward", before + 1, False)
    with pytest.raises(KeyboardInterrupt):
        speed.time_case(case, torch.device("cpu"), 0.01)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", COPIES)
def test_copies_copy_every_byte_and_no_more(name: str) -> None:
    copy = copy_by(name)
    if copy is None:
        pytest.skip("no C++ compiler, or not x86-64")
    for count in (1, 127, 1000, (1 << 17) + 1, 300_001):
        for threads in (1, 2, 3):
            x = torch.randint(0, 255, (count,), dtype=torch.uint8)
            y = torch.full((count + 200,), 255, dtype=torch.uint8)
            with timing.threads(threads):
                copy((y, x))
            assert torch.equal(y[:count], x)
            assert (y[count:] == 255).all()


def test_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_caches", lambda: {"L1": "48K", "L3": "32M", "L2": "2048K"})
    monkeypatch.setattr(environment, "cache_bytes", environment.cache_bytes.__wrapped__)
    kib = 1 << 10
    for bytes_, threads, name in (
        (48 * kib, 1, "L1"),
        (48 * kib + 1, 1, "L2"),
        (96 * kib, 2, "L1"),  # each core brings its own
        (4096 * kib, 2, "L2"),
        (32768 * kib, 2, "L3"),
        (32768 * kib + 1, 2, "memory"),  # the last level counts once
    ):
        assert environment.where_it_fits(bytes_, threads) == name
    monkeypatch.setattr(environment, "_caches", dict)
    assert environment.where_it_fits(1, 1) == ""


# --- results files


def run_grid(folder: Path, *options: str) -> int:
    shapes = ["--shapes", "2x8", "3x8"]
    return bench_norms.main([*shapes, "--only", "speed", *TINY, "--out", str(folder), *options])


def test_resume_after_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed: list[str] = []
    stop_at = 3

    def time_case(case, device, seconds, runtimes):
        if len(timed) == stop_at:
            raise KeyboardInterrupt
        timed.append(case.key)
        return {"made": len(timed), "times": {}}

    monkeypatch.setattr(bench_norms, "time_case", time_case)
    monkeypatch.setattr(bench_norms.report, "write", lambda path: "")
    assert run_grid(tmp_path) == 130
    partial = tmp_path / "norms.partial.json"
    assert "3 entries kept" in capsys.readouterr().out
    assert len(json.loads(partial.read_text())["entries"]) == 3
    assert not (tmp_path / "norms.json").exists()

    stop_at = 99
    assert run_grid(tmp_path) == 0
    assert "going on from 3 entries" in capsys.readouterr().out
    data = load(tmp_path / "norms.json")
    assert data["complete"]
    assert [e["made"] for e in data["entries"].values()] == [1, 2, 3, 4]  # none was made again
    assert len(timed) == len(set(timed)) == 4
    assert not partial.exists()

    timed.clear()
    assert run_grid(tmp_path) == 0  # a finished run is not gone on from
    assert len(timed) == 4


def stopped(folder: Path, **changes: object) -> Path:
    """What a run of kind "norms" and options {"a": [1]} leaves when it is stopped."""
    results = Results(folder / "norms.json", "norms", {"a": (1,)})
    results.put("one", {"times": {}})
    data = json.loads(results.partial.read_text())
    data.update(changes)
    results.partial.write_text(json.dumps(data))
    return results.partial


@pytest.mark.parametrize("changes", [{}, {"started": "1999"}])
def test_the_same_run_is_gone_on_from(tmp_path: Path, changes: dict[str, object]) -> None:
    partial = stopped(tmp_path, **changes)
    data = json.loads(partial.read_text())
    data["environment"]["cpu"]["clock_mhz"] = "1"  # moves by itself
    partial.write_text(json.dumps(data))
    assert "one" in Results(tmp_path / "norms.json", "norms", {"a": (1,)})


@pytest.mark.parametrize(
    "changes",
    [{"schema": 99}, {"options": {"a": [2]}}, {"kind": "paper"}, {"environment": None}],
    ids=str,
)
def test_another_run_is_set_aside(tmp_path: Path, changes: dict[str, object]) -> None:
    if "environment" in changes:
        changes = {"environment": {**environment.environment(), "torch": "1.0"}}
    old = stopped(tmp_path, **changes).read_text()
    results = Results(tmp_path / "norms.json", "norms", {"a": (1,)})
    assert not results.entries
    assert "norms.partial.old.json" in results.note
    assert (tmp_path / "norms.partial.old.json").read_text() == old


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "norms.json"
    path.write_text(json.dumps({"schema": results.SCHEMA + 1, "entries": {}}))
    with pytest.raises(ValueError, match=f"schema {results.SCHEMA + 1}, this code reads"):
        load(path)


# --- a real run, and its report


def test_report_of_a_tiny_real_run(tmp_path: Path) -> None:
    arguments = ["--shapes", "5x96", "--only", "speed", "add", "latency", "memory", *TINY]
    assert bench_norms.main([*arguments, "--out", str(tmp_path)]) == 0
    text = (tmp_path / "norms.md").read_text()
    entries = load(tmp_path / "norms.json")["entries"]
    assert {k.split("/")[0] for k in entries} == {"speed", "add", "latency", "memory"}
    for kind, ours in (("speed", "rms_norm"), ("add", "add_rms_norm")):
        for direction in ("forward", "forward+backward"):
            entry = entries[f"{kind}/1t/float32/5x96/{direction}"]
            times = times_of(entry)
            assert {"clone", "memcpy", "torch_layer_norm", "torch_rms_norm"} <= set(times)
            median = f"{times[ours].median * 1e6:.1f} ("
            (line,) = [
                line
                for line in text.splitlines()
                if line.startswith(f"| 5 × 96 | float32 | {direction} |") and median in line
            ]
            assert f" {ratio(times, 'torch_layer_norm', ours)} |" in line
    assert entries["add/1t/float32/5x96/forward"]["bytes"] == 4 * (4 * 5 * 96 + 96)
    assert "compiled" not in text  # was not run: has no column
    assert "best other" not in text
    assert "| 5 × 96 | float32 | add, norm |" in text
    assert "| module | forward+backward |" in text
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_a_ratio_inside_the_noise_is_not_shown() -> None:
    ours, theirs = Timing(1.0, 0.9, 1.1, 0.02, 100, 1), Timing(1.05, 1.0, 1.1, 0.1, 100, 1)
    times = {"rms_norm": ours, "torch_layer_norm": theirs}
    assert ratio(times, "torch_layer_norm") == "="
    times["torch_layer_norm"] = replace(theirs, median=1.2)
    assert ratio(times, "torch_layer_norm") == "1.20×"
    assert ratio(times, "quack") == ""


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import fused_rmsnorm.functional as ours

    right = ours.add_rms_norm
    monkeypatch.setattr(ours, "add_rms_norm", lambda x, r, *args: right(x, 1.001 * r, *args))
    arguments = ["--shapes", "5x96", "--only", "add", *TINY, "--out", str(tmp_path)]
    with pytest.raises(RuntimeError, match="wrong result"):
        bench_norms.main(arguments)


# --- memory


def test_saved_bytes_of_known_functions() -> None:
    x = torch.randn(10, 8, requires_grad=True)
    w = torch.randn(8, requires_grad=True)
    count = 10 * 8 * 4
    for call, bytes_ in (
        (lambda: x.exp(), count),  # its output
        (lambda: x.sin(), 0),  # its input, alive
        (lambda: (2 * x).sin(), count),  # its input, which only the graph keeps
        (lambda: x * w, 0),
        (lambda: (x * w) * (x + 1), 2 * count),
        (lambda: (lambda y: y[:3] * y[5:8])(2 * x), count),  # two views of one storage
        (lambda: x.detach().exp(), 0),
    ):
        assert saved_bytes(call, [x, w]) == bytes_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_the_norms_by_hand(dtype: torch.dtype) -> None:
    rows, n = 12, 40
    x, rstd = rows * n * dtype.itemsize, rows * 4
    cpu = torch.device("cpu")
    single = memory_case("speed", rows, n, dtype, cpu, compiled=False)
    assert single["input_bytes"] == x
    saved = single["saved"]
    assert saved["rms_norm"] == saved["prms_norm"] == rstd
    # mean and rstd, in the dtype of the parameters
    assert saved["torch_layer_norm"] == 2 * rows * dtype.itemsize
    # Composed of elementary operations, in fp32: x where it had to be converted, x * rstd, rstd.
    converted = dtype != torch.float32
    assert saved["torch_rms_norm"] == (1 + converted) * rows * n * 4 + rstd
    added = memory_case("add", rows, n, dtype, cpu, compiled=False)["saved"]
    assert added["add_rms_norm"] == added["rms_norm"] == x + rstd  # the sum


# --- compile modes

SIZES = Sizes(width=64, heads=2, key_heads=1, head=32, hidden=96, layers=1, batch=2, length=8)


@pytest.mark.parametrize("context", compile_modes.CONTEXTS)
def test_every_context_runs(context: str) -> None:
    entry = compile_modes.time_context(
        context, "forward+backward", torch.float32, SIZES, torch.device("cpu"), 0.01, compiled=False
    )
    names = {"rms_norm_eager", "torch_rms_norm_eager", "torch_layer_norm_eager"}
    assert set(entry["times"]) == names | ({"add_rms_norm_eager"} if context == "add" else set())
    assert 0 <= entry["differences"]["rms_norm_eager"] < 1e-5


def test_compiled_variants_and_their_table(tmp_path: Path) -> None:
    options = ["--contexts", "gelu", "--dtypes", "float32", "--length", "8", "--seconds", "0.01"]
    assert compile_modes.main([*options, "--out", str(tmp_path)]) == 0
    entries = load(tmp_path / "compile_modes.json")["entries"]
    assert list(entries) == [f"compile/gelu/float32/{d}" for d in compile_modes.DIRECTIONS]
    assert all(set(e["times"]) == set(compile_modes.VARIANTS) for e in entries.values())
    text = (tmp_path / "compile_modes.md").read_text()
    assert "| ours, opaque | ours, fuse |" in text
    assert "AddRMSNorm" not in text
    assert "| gelu | float32 | forward+backward |" in text


def test_another_function_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer_norm = compile_modes.make_norm("layer_norm")
    monkeypatch.setitem(compile_modes.VARIANTS, "rms_norm_eager", (layer_norm, False))
    arguments = ("gelu", "forward", torch.float32, SIZES, torch.device("cpu"), 0.01)
    with pytest.raises(RuntimeError, match="not the same function"):
        compile_modes.time_context(*arguments, compiled=False)
