"""A few lines of PTX as an entry of their own, for the tests of the interpreter itself."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .counters import Counts
from .machine import Launch, Options, run
from .memory import Global
from .parse import Module
from .program import Program

Array = NDArray[Any]
# Registers by width, %in and %out: addresses of this thread's elements; %t: the thread.
ENTRY = """
.version 9.0
.target sm_90
.extern .shared .align 16 .b8 dynamic[];
.visible .entry snippet(.param .u64 from, .param .u64 to)
{{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<40>;
    .reg .f32 %f<9>;
    .reg .f64 %fd<9>;
    .reg .b64 %rd<20>;
    .reg .b32 %t;
    .reg .b64 %in, %out, %place;
    ld.param.u64 %in, [from];
    ld.param.u64 %out, [to];
    cvta.to.global.u64 %in, %in;
    cvta.to.global.u64 %out, %out;
    mov.u32 %r30, %ctaid.x;
    mov.u32 %r31, %ntid.x;
    mov.u32 %r32, %tid.x;
    mad.lo.s32 %t, %r30, %r31, %r32;
    mul.wide.u32 %place, %t, {size_in};
    add.s64 %in, %in, %place;
    mul.wide.u32 %place, %t, {size_out};
    add.s64 %out, %out, %place;
{body}
    ret;
}}
"""


def run_snippet(
    body: str,
    given: Array,
    out: Any = np.uint32,
    *,
    outputs: int = 1,
    threads: int = 32,
    ctas: int = 1,
    cluster: int = 1,
    shared: int = 0,
    options: Options | None = None,
) -> tuple[Array, Counts]:
    """`given`: a row per thread, which finds its own at [%in]. Each writes `outputs` numbers of
    the type `out` at [%out], which are returned as rows, with what was counted."""
    given = np.ascontiguousarray(given)
    total = threads * ctas
    assert given.shape[0] == total
    size_in, size_out = given.nbytes // total, outputs * np.dtype(out).itemsize
    options = options or Options(count=True)
    memory = Global(1 << 20, options.races)
    source = memory.new(given.nbytes, "in", content=given)
    to = memory.new(size_out * total, "out", writable=True)
    text = ENTRY.format(body=body, size_in=size_in, size_out=size_out)
    program = Program(Module(text).entry("snippet"))
    args = tuple(a.to_bytes(8, "little") for a in (source, to))
    launch = Launch("snippet", ctas, threads, shared, cluster, args)
    counts = run(program, memory, launch, options)
    return memory.read(to, size_out * total, out).reshape(total, outputs), counts
