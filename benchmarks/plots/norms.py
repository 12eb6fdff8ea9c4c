"""The norms on a CPU: speed against size, ratios, host time, memory, the fused add, counts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..harness.results import RESULTS
from ..harness.tables import conditions, entries_of, times_of
from ..harness.timing import Timing, speedup
from ..norms.cases import QUICK_SHAPES
from .style import CONTENDERS, INK, MACHINE, NotMeasured, Source, figure, finish

__all__ = ["PLOTS"]

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
DIRECTIONS = ("forward", "forward+backward")
COPIES = ("clone", "memcpy", "nt_copy")
PEERS = ("torch_layer_norm", "torch_rms_norm", "compiled_rms_norm")


def shape(e: dict[str, Any]) -> str:
    return f"{e['rows']}×{e['n']}"


def chosen(
    source: Source, kind: str, dtype: str, direction: str, *, grid: bool = False
) -> list[dict[str, Any]]:
    """Plain cases with all threads, from small to large; of a full run the quick one's, or all."""
    found = [
        e
        for e in entries_of(source.data, kind)
        if (e["dtype"], e["direction"]) == (dtype, direction)
        and (e.get("weight", "same"), e.get("layout", "contiguous")) == ("same", "contiguous")
    ]
    most = max((e["threads"] for e in found), default=0)
    found = [e for e in found if e["threads"] == most]
    if not grid and len(found) > len(QUICK_SHAPES):
        found = [e for e in found if (e["rows"], e["n"]) in QUICK_SHAPES]
    return sorted(found, key=lambda e: (e["rows"] * e["n"], e["n"]))


def share_of_copy(e: dict[str, Any], t: Timing, times: dict[str, Timing]) -> float:
    """Bytes per second over those of the fastest copy, %."""
    copy = min(times[name].median for name in COPIES if name in times)
    return 100 * (e["bytes"] / t.median) / (e["copy_bytes"] / copy)


def line_of(points: Sequence[tuple[float, float]]) -> str:
    """No line where sizes between the points were not measured."""
    apart = any(b[0] - a[0] > 1 for a, b in itertools.pairwise(points))
    return "" if apart else "-"


def draw_line(
    axis: Any, name: str, places: Sequence[float], values: Sequence[float], **how: Any
) -> None:
    look = CONTENDERS[name]
    options = {"color": look.colour, "marker": look.marker, "label": look.label, **how}
    axis.plot(places, values, **options)


def speed(path: Path, results: Path = MACHINE / "norms.json") -> None:
    """Share of a copy's speed against the size, from one row to beyond the caches."""
    source = Source(results)
    fig, axes = figure(2, 2, (9.5, 7.0), sharey="row")
    for row, direction in zip(axes, DIRECTIONS, strict=True):
        for axis, (dtype, title) in zip(row, DTYPES.items(), strict=True):
            cases = chosen(source, "speed", dtype, direction)
            for name in ("torch_rms_norm", "compiled_rms_norm", "torch_layer_norm", "rms_norm"):
                points = [
                    (i, share_of_copy(e, times[name], times))
                    for i, (e, times) in enumerate(timed(cases))
                    if name in times
                ]
                if points:
                    draw_line(axis, name, *zip(*points, strict=True), linestyle=line_of(points))
            axis.axhline(100, color=INK, linewidth=1, linestyle="--", label="the fastest copy")
            axis.set_title(f"{title}, {direction.replace('+', ' + ')}")
            axis.set_xticks(
                range(len(cases)), [f"{shape(e)}\n{e['fits']}" for e in cases], fontsize=7.8
            )
            axis.set_ylim(bottom=0)
        row[0].set_ylabel("% of a copy's bytes per second")
    note = (
        f"{conditions(source.data)}. Below each size: what holds it. Small sizes are the host's "
        "time of a call. A copy: the fastest of torch.clone, memcpy and one past the caches."
    )
    finish(fig, path, [source], note, columns=5)


def speed_one_thread(path: Path) -> None:
    speed(path, MACHINE / "one-thread" / "norms.json")


LARGE = 1 << 22  # elements: beyond L2
FIXED_N = 1024


CURVES = RESULTS / "amd-epyc-2-cores-avx512" / "curves" / "norms.json"


def curves(path: Path, results: Path = CURVES) -> None:
    """Share of a copy's speed against N, of large inputs (the smallest of each N), and against
    rows, at one N.

    Raises:
        NotMeasured: fewer than four points of a curve: the results are of a quick run.
    """
    source = Source(results)
    fig, axes = figure(2, 2, (9.5, 7.0), sharey=True)
    ways = {
        "n": (
            lambda e: e["rows"] * e["n"] >= LARGE,
            f"N, in inputs of {LARGE >> 20} M numbers or more",
        ),
        "rows": (lambda e: e["n"] == FIXED_N, f"rows of {FIXED_N}"),
    }
    for row, direction in zip(axes, DIRECTIONS, strict=True):
        for axis, (what, (belongs, label)) in zip(row, ways.items(), strict=True):
            for dtype, style in (("bfloat16", "-"), ("float32", ":")):
                cases = [
                    e for e in chosen(source, "speed", dtype, direction, grid=True) if belongs(e)
                ]
                cases.sort(key=lambda e: (e[what], -e["rows"]))
                cases = list({e[what]: e for e in cases}.values())  # the last of each
                if len(cases) < 4:
                    raise NotMeasured(f"{path.name}: too few sizes in {results.name} (a full run?)")
                for name in ("torch_rms_norm", "torch_layer_norm", "rms_norm"):
                    shown = [(e[what], share_of_copy(e, t[name], t)) for e, t in timed(cases)]
                    label_ = f"{CONTENDERS[name].label}, {DTYPES[dtype]}"
                    look = {"linestyle": style, "label": label_, **fill(name, dtype)}
                    draw_line(axis, name, *zip(*shown, strict=True), **look)
            axis.axhline(100, color=INK, linewidth=1, linestyle="--", label="the fastest copy")
            axis.set_xscale("log", base=2)
            axis.set_title(direction.replace("+", " + "))
            axis.set_xlabel(label)
            axis.set_ylim(bottom=0)
        row[0].set_ylabel("% of a copy's bytes per second")
    finish(fig, path, [source], conditions(source.data), columns=3)


def timed(cases: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Timing]]]:
    return [(e, times_of(e)) for e in cases]


def fill(name: str, dtype: str) -> dict[str, Any]:
    """Full marks for bf16, hollow ones for fp32."""
    return {"markerfacecolor": CONTENDERS[name].colour if dtype == "bfloat16" else "none"}


def ratios(path: Path) -> None:
    """How many times as fast, against the size."""
    source = Source(MACHINE / "norms.json")
    fig, axes = figure(1, 2, (9.5, 4.2), sharey=True)
    for axis, direction in zip(axes[0], DIRECTIONS, strict=True):
        for dtype, style in (("bfloat16", "-"), ("float32", ":")):
            cases = chosen(source, "speed", dtype, direction)
            for name in PEERS:
                points = [
                    (i, speedup(times["rms_norm"], times[name]) or 1.0)
                    for i, times in enumerate(map(times_of, cases))
                    if name in times
                ]
                label = f"{CONTENDERS[name].label}, {DTYPES[dtype]}"
                line = style if line_of(points) else ""
                draw_line(
                    axis,
                    name,
                    *zip(*points, strict=True),
                    linestyle=line,
                    label=label,
                    **fill(name, dtype),
                )
        axis.axhline(1, color=INK, linewidth=1)
        axis.set_yscale("log", base=2)
        axis.set_yticks([1, 2, 4, 8, 16], ["equal", "2×", "4×", "8×", "16×"])
        axis.set_ylim(0.9, 18)
        axis.set_xticks(range(len(cases)), [shape(e) for e in cases], fontsize=7.8)
        axis.set_title(direction.replace("+", " + "))
    axes[0][0].set_ylabel("times as fast as")
    finish(fig, path, [source], conditions(source.data), columns=3)


def grouped_bars(
    axis: Any,
    groups: Sequence[str],
    names: Sequence[str],
    value: Callable[[int, str], float | None],
    text: Callable[[float], str] = "{:.3g}".format,
) -> None:
    """Vertical bars, a group for each of ``groups``, with their numbers above them."""
    width = 0.8 / len(names)
    for j, name in enumerate(names):
        places = [
            (i + (j - (len(names) - 1) / 2) * width, value(i, name)) for i in range(len(groups))
        ]
        kept = [(place, v) for place, v in places if v is not None]
        if not kept:
            continue
        look = CONTENDERS[name]
        bars = axis.bar(*zip(*kept, strict=True), width * 0.92, color=look.colour, label=look.label)
        axis.bar_label(bars, [text(v) for _, v in kept], fontsize=7.5, color=INK, padding=1)
    axis.set_xticks(range(len(groups)), groups, fontsize=9)
    axis.grid(axis="x", visible=False)


def latency(path: Path) -> None:
    """Host time of one call on a row of 128."""
    source = Source(MACHINE / "norms.json")
    entries = entries_of(source.data, "latency")
    names = ("rms_norm", "prms_norm", "torch_layer_norm", "torch_rms_norm")
    fig, axes = figure(1, 2, (9.5, 3.6), width_ratios=(2, 1))
    parts = (
        [e for e in entries if e["mode"] != "forward+backward"],
        [e for e in entries if e["mode"] == "forward+backward"],
    )
    for axis, part in zip(axes[0], parts, strict=True):
        grouped_bars(
            axis,
            [f"{e['kind']}\n{e['mode'].replace('+', ' + ')}" for e in part],
            names,
            lambda i, name, part=part: 1e6 * times_of(part[i])[name].median,  # type: ignore[misc]
        )
    axes[0][0].set_ylabel("µs of the host, lower is better")
    note = f"One row of 128 numbers, fp32. {conditions(source.data)}"
    finish(fig, path, [source], note)


def memory(path: Path) -> None:
    """What autograd keeps between forward and backward."""
    source = Source(MACHINE / "norms.json")
    entries = entries_of(source.data, "memory")
    names = ("rms_norm", "add_rms_norm", "torch_layer_norm", "compiled_rms_norm", "torch_rms_norm")
    fig, axes = figure(1, 2, (9.5, 3.5), sharey=True)
    for axis, (kind, title) in zip(
        axes[0], {"speed": "the norm alone", "add": "residual add and norm"}.items(), strict=True
    ):
        part = [e for e in entries if e["kind"] == kind]
        wanted = [n for n in names if n != ("add_rms_norm" if kind == "speed" else "rms_norm")]
        grouped_bars(
            axis,
            [DTYPES[e["dtype"]] for e in part],
            wanted,
            lambda i, name, part=part: part[i]["saved"][name] / part[i]["input_bytes"],  # type: ignore[misc]
            "{:.3f}".format,
        )
        axis.set_title(title)
    axes[0][0].set_ylabel("times the input's bytes,\nlower is better")
    note = (
        "Kept for the backward beside inputs and parameters, 4096 rows of 1024. "
        f"{conditions(source.data)}"
    )
    finish(fig, path, [source], note, columns=3)


def add(path: Path) -> None:
    """The residual add and the norm in one pass, against the add and each norm after it."""
    source = Source(MACHINE / "norms.json")
    fig, axes = figure(1, 2, (9.5, 3.6), sharey=True)
    for axis, direction in zip(axes[0], DIRECTIONS, strict=True):
        cases = [e for dtype in DTYPES for e in chosen(source, "add", dtype, direction)]
        times = [times_of(e) for e in cases]
        grouped_bars(
            axis,
            [f"{shape(e)}\n{DTYPES[e['dtype']]}" for e in cases],
            ("rms_norm", *PEERS),
            lambda i, name, times=times: speedup(times[i]["add_rms_norm"], times[i][name]) or 1.0,  # type: ignore[misc]
            "{:.1f}".format,
        )
        axis.axhline(1, color=INK, linewidth=1)
        axis.set_title(direction.replace("+", " + "))
    axes[0][0].set_ylabel("times as fast as\nthe add, then")
    finish(fig, path, [source], conditions(source.data))


# Name in the results -> contender whose colour it has.
COMPILED = {
    "rms_norm_fuse": "fuse",
    "torch_rms_norm_compiled": "compiled_rms_norm",
    "torch_layer_norm_compiled": "torch_layer_norm",
}
CONTEXTS = {
    "block": "transformer block",
    "add": "add before it",
    "gelu": "GELU before it",
    "linear": "linear after it",
}


def compiled_contexts(path: Path) -> None:
    """Under torch.compile, in small contexts: time over that of the fused operator."""
    source = Source(MACHINE / "compile_modes.json")
    fig, axes = figure(1, 2, (9.5, 3.9), sharey=True)
    for axis, dtype in zip(axes[0], DTYPES, strict=True):
        cases = [e for e in entries_of(source.data, "compile") if e["dtype"] == dtype]
        for j, (in_file, name) in enumerate(COMPILED.items()):
            look = CONTENDERS[name]
            for i, e in enumerate(cases):
                times = times_of(e)
                base = next(n for n in ("rms_norm_opaque", "add_rms_norm_opaque") if n in times)
                t = times.get(in_file) or times["add_rms_norm_fuse"]
                hollow = speedup(times[base], t) is None
                axis.plot(
                    t.median / times[base].median,
                    i + (j - 1) * 0.2,
                    color=look.colour,
                    marker=look.marker,
                    markersize=6.5,
                    markerfacecolor="none" if hollow else look.colour,
                    linestyle="",
                    label=look.label + (", compiled" if name == "torch_layer_norm" else ""),
                )
        axis.axvline(1, color=CONTENDERS["rms_norm"].colour, label="RMSNorm (ours), fused operator")
        axis.set_xlim(0.85, 1.15)
        axis.set_title(DTYPES[dtype])
        axis.set_xlabel("time over that of the fused operator\n(right: that is faster)")
    names = [f"{CONTEXTS[e['context']]}, {e['direction'].replace('+', ' + ')}" for e in cases]
    axes[0][0].set_yticks(range(len(cases)), names, fontsize=9)
    axes[0][0].invert_yaxis()
    note = f"Hollow: inside the noise. {conditions(source.data)}"
    finish(fig, path, [source], note, columns=2)


def instructions(path: Path) -> None:
    """Instructions per element, counted: what holds on every machine."""
    source = Source(RESULTS / "counts" / "cpu_instructions.json")
    sets = [name for name in ("AVX2", "AVX512") if name in source.data]
    fig, axes = figure(1, 2, (9.5, 4.2))
    for axis, direction in zip(axes[0], ("forward", "backward"), strict=True):
        names = [name for name in source.data[sets[0]] if name.startswith(direction)]
        for j, kernels in enumerate(sets):
            counts: dict[str, float] = source.data[kernels]
            bars = axis.barh(
                [i + (j - (len(sets) - 1) / 2) * 0.38 for i in range(len(names))],
                [counts[name] for name in names],
                0.36,
                color=CONTENDERS["rms_norm"].colour,
                alpha=(0.5, 1)[j],
                label=f"{kernels} (ours)",
            )
            axis.bar_label(bars, fmt="%.2f", fontsize=8, color=INK, padding=2)
        labels = [name.removeprefix(direction).strip().replace("x", "×", 1) for name in names]
        axis.set_yticks(range(len(names)), labels, fontsize=9)
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_title(direction)
        axis.set_xlabel("instructions per element")
    note = f"{source.data['compiler']}; counted, not sampled."
    finish(fig, path, [source], note)


PLOTS = {
    "speed": speed,
    "speed-one-thread": speed_one_thread,
    "curves": curves,
    "ratios": ratios,
    "latency": latency,
    "memory": memory,
    "add": add,
    "compile": compiled_contexts,
    "instructions": instructions,
}
