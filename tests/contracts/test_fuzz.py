"""The fuzzer (`make fuzz`) in its short form, and that it finds what it is for."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fuzz.calls import OTHERS, TARGETS, WAYS, draw_call

ROOT = Path(__file__).parents[2]


def run_python(*arguments: str) -> subprocess.CompletedProcess:
    # Forks of it run torch's threads: it must not be a fork of this process, where they have run.
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), *sys.path])
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_short_form():
    done = run_python("-m", "fuzz", "--calls", "1000", "--seconds", "9")
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.endswith(": 0 failed")
    assert int(last.split()[0]) >= 100


def test_a_seed_is_a_call():
    """The same one each time, as JSON says it; between them they reach everything."""
    calls = [draw_call(seed) for seed in range(3000)]
    assert {c["target"] for c in calls} == {*TARGETS, *OTHERS}
    assert {c["way"] for c in calls} == set(WAYS)
    told = json.dumps(calls)
    assert told == json.dumps([draw_call(seed) for seed in range(3000)])
    assert told == json.dumps(json.loads(told))


PLANTED = """
import os, sys, time
import fused_rmsnorm.functional as functional
from fuzz import server

def lenient(real):
    def function(input, *args, **more):
        try:
            return real(input, *args, **more)
        except ValueError:
            return input
    return function

real = functional.rms_norm
def planted(*args, bias=None, p=None, weight_offset=0.0, **more):
    y = real(*args, bias=bias, p=p, weight_offset=weight_offset, **more)
    if bias is not None:
        os.abort()
    if weight_offset == -0.3:
        time.sleep(1000)
    return y * 1.01 if p is not None else y
functional.rms_norm = planted
for name in ("composite_rms_norm", "add_rms_norm", "rms_norm_gated"):
    setattr(functional, name, lenient(getattr(functional, name)))

server.HANG = 1
counts, findings = server.run(0, 250, 60)
found = {}
for finding in findings:
    found.setdefault(finding.kind.split(",")[0], finding)
print(sorted(found))
crash = server.shrink(found["crash"], 4).call
print({n: crash["args"].get(n) is not None for n in ("bias", "p", "eps", "group_size")})
wrong = server.shrink(found["wrong"], 4).call
print(wrong["args"]["bias"], wrong["args"]["p"] is not None, wrong["args"]["input"]["layout"])
"""


def test_it_finds_what_is_planted(tmp_path):
    """A crash, a hang, a wrong result, an argument that is not refused; and makes them small."""
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    done = run_python(str(script))
    assert done.returncode == 0, done.stdout + done.stderr
    found, crash, wrong = done.stdout.strip().splitlines()
    assert found == "['accepted', 'crash', 'hang', 'wrong']"
    assert crash == "{'bias': True, 'p': False, 'eps': False, 'group_size': False}"
    assert wrong == "None True contiguous"
