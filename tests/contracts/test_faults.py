"""Faults from outside: memory that runs out, interrupts, workers and ranks that die, files that are
missing or not ours, other OpenMP runtimes. Each ends with its message; nothing hangs, and what
comes after is right."""

import ctypes.util
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from processes import completed_together
from torch import nn

import fused_rmsnorm
from fused_rmsnorm import AddRMSNorm, RMSNorm, _library
from fused_rmsnorm import functional as F

HERE = Path(__file__).parent
PACKAGE = Path(fused_rmsnorm.__file__).parent

# Results of a training step in two dtypes, as one line.
DIGEST = """
import hashlib, os, sys
import torch
from fused_rmsnorm import functional as F

def digest():
    told = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16):
        g = torch.Generator().manual_seed(0)
        shapes = ((900, 700), 700, 700, (900, 700))
        x, w, b, dy = (torch.randn(s, generator=g).to(dtype) for s in shapes)
        leaves = [t.requires_grad_() for t in (x, w, b)]
        y = F.rms_norm(x, 700, w, bias=b, p=0.3)
        for t in (y, *torch.autograd.grad(y, leaves, dy)):
            told.update(t.detach().view(torch.uint8).numpy().tobytes())
    return told.hexdigest()
"""


def start(code: str, *, env: dict[str, str] | None = None, path: str | None = None, cwd=None):
    path = path or os.pathsep.join([str(HERE), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out.strip(), err.strip()


def openmp_runtimes() -> list[str]:
    """Those of this machine that torch may meet: of GCC, LLVM and Intel."""
    found = (ctypes.util.find_library(name) for name in ("gomp", "omp", "omp5", "iomp5"))
    return [name for name in found if name]


FORKED = """
pid = os.fork()
if pid == 0:
    print(digest(), flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""


def test_the_same_bits_in_every_environment():
    """One thread, one core, other OpenMP runtimes loaded first, a fork before anything has run."""
    ends = {"as it is": start(DIGEST + "print(digest())")}
    ends["one thread"] = start(DIGEST + "print(digest())", env={"OMP_NUM_THREADS": "1"})
    one_core = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    ends["one core"] = start(one_core + DIGEST + "print(digest())")
    ends["forked before use"] = start(DIGEST + FORKED)
    for runtime in openmp_runtimes():
        ends[runtime] = start(DIGEST + "print(digest())", env={"LD_PRELOAD": runtime})
    if len(openmp_runtimes()) > 1:
        together = " ".join(openmp_runtimes())
        ends["together"] = start(DIGEST + "print(digest())", env={"LD_PRELOAD": together})
    results = {name: end(process) for name, process in ends.items()}
    assert all(code == 0 for code, _, _ in results.values()), results
    assert len({out for _, out, _ in results.values()}) == 1, results


# posix_memalign is what torch's CPU allocator calls; operator new what all else in C++ does.
FAILING = """
#include <cerrno>
#include <cstdlib>
#include <dlfcn.h>
#include <new>
static thread_local long memory_left = -1, objects_left = -1;
extern "C" {
void fail_memory(long n) { memory_left = n; }
void fail_objects(long n) { objects_left = n; }
long left_memory() { return memory_left; }
long left_objects() { return objects_left; }
int posix_memalign(void** p, size_t alignment, size_t size) {
  static auto next = (int (*)(void**, size_t, size_t))dlsym(RTLD_NEXT, "posix_memalign");
  if (memory_left > 0 && --memory_left == 0) return ENOMEM;
  return next(p, alignment, size);
}
}
void* operator new(size_t size) {
  if (objects_left > 0 && --objects_left == 0) throw std::bad_alloc();
  if (void* p = malloc(size ? size : 1)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept { free(p); }
void operator delete(void* p, size_t) noexcept { free(p); }
"""

SWEEP = """
import ctypes
import torch
from fused_rmsnorm import functional as F
shim = ctypes.CDLL({shim!r})
torch.set_num_threads(1)
x, w, b, dy = (torch.randn(s) for s in ((300, 64), 64, 64, (300, 64)))
leaves = [t.requires_grad_() for t in (x, w, b)]

def step():
    y, s = F.add_rms_norm(x.t().contiguous().t(), dy, 64, w, 1e-6, bias=b)
    return (y, s, *torch.autograd.grad((y, s), leaves, (dy, dy)))

def forward():
    with torch.no_grad():
        return F.add_rms_norm(x.t().contiguous().t(), dy, 64, w, 1e-6, bias=b)

def in_place():
    a, r = x.detach().clone(), dy.clone()[:, :]
    with torch.no_grad():
        F.add_rms_norm_(a, r, 64, w, bias=b)
    return a, r

memory = (shim.fail_memory, shim.left_memory)
objects = (shim.fail_objects, shim.left_objects)
# Of a training step only tensors: for lack of an object torch's engine ends the process.
for work, (arm, left) in ((step, memory), (forward, memory), (in_place, memory),
                          (forward, objects), (in_place, objects)):
    expected = work()
    failed = n = 0
    while True:
        n += 1
        arm(n)
        try:
            result = work()
        except (RuntimeError, MemoryError) as error:
            failed += 1
            told = str(error)
            assert "memory" in told or "bad_alloc" in told or "alloc" in told, told
        else:
            if left() > 0:
                break
        finally:
            arm(-1)
    assert failed, arm
    again = work()
    assert all(torch.equal(a, e) for a, e in zip(again, expected, strict=True))
    print(work.__name__, n - 1, "allocations,", failed, "refused")
"""


def test_every_allocation_of_a_call_fails(tmp_path):
    """The n-th, for every n: an exception, and the next call is right."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not here")
    source, shim = tmp_path / "failing.cpp", tmp_path / "failing.so"
    source.write_text(FAILING)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], check=True)
    code, out, err = end(start(SWEEP.format(shim=str(shim)), env={"LD_PRELOAD": str(shim)}))
    assert code == 0, err
    assert len(out.splitlines()) == 5


INTERRUPTED = """
import signal
import torch
from fused_rmsnorm import functional as F
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
x, w = torch.randn(2000, 2048, requires_grad=True), torch.randn(2048, requires_grad=True)
expected = F.rms_norm(x, 2048, w)
print("ready", flush=True)
try:
    while True:
        F.rms_norm(x, 2048, w).sum().backward()
except KeyboardInterrupt:
    assert torch.equal(F.rms_norm(x, 2048, w), expected)
    print("interrupted")
"""


def test_interrupt():
    process = start(INTERRUPTED)
    assert process.stdout.readline().strip() == "ready"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    code, out, err = end(process, 30)
    assert (code, out) == (0, "interrupted"), err


WORKER = """
import os, signal
import torch
from torch.utils.data import DataLoader, Dataset
from fused_rmsnorm import RMSNorm

norm, x = RMSNorm(64), torch.randn(100, 64)
class Dies(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        y = norm(x)
        if i == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return y.detach()

if __name__ == "__main__":
    torch.set_num_threads(1)
    expected = norm(x)
    try:
        list(DataLoader(Dies(), batch_size=None, num_workers=2, multiprocessing_context="fork"))
    except RuntimeError as error:
        assert "exited unexpectedly" in str(error), error
    assert torch.equal(norm(x), expected)
    print("right")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_worker_that_dies(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    code, out, err = end(
        start(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')")
    )
    assert (code, out) == (0, "right"), err


RANK = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from fused_rmsnorm import functional as F
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2,
                        timeout=timedelta(seconds=900))
mesh = init_device_mesh("cpu", (2,))
x = distribute_tensor(torch.ones(4, 8), mesh, [Shard(0)]).requires_grad_()
w = distribute_tensor(torch.ones(8), mesh, [Replicate()]).requires_grad_()
y = F.rms_norm(x, 8, w)
if rank == 1:
    raise ValueError("the fault of this rank")
y.sum().full_tensor().backward()
w.grad.full_tensor()
"""


def test_a_rank_that_raises(tmp_path):
    """The others end with an error of the collective, and not by its time limit."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)

    def ranks(attempt: int) -> list[list[str]]:
        store = str(tmp_path / f"store {attempt}")
        return [[sys.executable, str(script), number, store] for number in "01"]

    rank, it = completed_together(
        ranks,
        timeout=200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert it.returncode == 1, it.stderr
    assert "ValueError: the fault of this rank" in it.stderr
    assert rank.returncode == 1, rank.stderr
    assert "Connection" in rank.stderr or "peer" in rank.stderr, rank.stderr


def without(file: Path, folder: Path) -> Path:
    """A copy of the package that lacks one file."""
    copy = folder / "fused_rmsnorm"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / file.relative_to(PACKAGE)).unlink()
    return copy


def test_missing_files(tmp_path):
    """An ImportError that says what is missing, for each library that was built."""
    # For this torch and this Python. Beside them may lie those for others: a wheel holds several,
    # and so does a checkout that was built anew after an upgrade of torch.
    minor = _library.minor(torch.__version__)
    folders = {PACKAGE.name, "lib", f"torch-{minor}"}
    endings = {".so", sysconfig.get_config_var("EXT_SUFFIX")}
    libraries = sorted(
        file
        for file in PACKAGE.rglob("*.so")
        if file.parent.name in folders and "".join(file.suffixes) in endings
    )
    processes = []
    for i, file in enumerate(libraries):
        folder = tmp_path / str(i)
        folder.mkdir()
        without(file, folder)
        processes.append(start("import fused_rmsnorm", path=str(folder), cwd=folder))
    assert len(libraries) == 4
    others = [version for version in _library.built_for() if version != minor]
    for file, process in zip(libraries, processes, strict=True):
        code, _, err = end(process)
        assert code == 1
        last = err.splitlines()[-1]
        assert last.startswith(("ImportError: ", "ModuleNotFoundError: ")), last
        what = file.name.split(".")[0]
        if what == "libfused_rmsnorm" and others:  # which are all that this copy is for
            what = f"is for torch {', '.join(others)}, but torch is {torch.__version__}"
        assert what in last, last


def test_a_read_only_package(tmp_path):
    """Nothing is written beside it, not even what Python keeps compiled."""
    copy = tmp_path / "fused_rmsnorm"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    before = sorted(copy.rglob("*"))
    for path in (copy, *before):
        path.chmod(path.stat().st_mode & ~0o222)
    code = "import torch, fused_rmsnorm; fused_rmsnorm.RMSNorm(8)(torch.ones(2, 8)); print('right')"
    env = {"PYTHONDONTWRITEBYTECODE": "1"}
    try:
        told = end(start(code, path=str(tmp_path), cwd=tmp_path, env=env))
        assert told[:2] == (0, "right"), told
        assert sorted(copy.rglob("*")) == before
    finally:
        for path in (copy, *before):
            path.chmod(path.stat().st_mode | 0o200)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"Missing key\(s\) in state_dict: \"weight\""),
        ({"weight": torch.ones(9)}, "size mismatch for weight"),
        ({"weight": torch.ones(2, 8)}, "size mismatch for weight"),
        ({"weight": torch.ones(8), "bias": torch.ones(8)}, r"Unexpected key\(s\).*\"bias\""),
        ({"gamma": torch.ones(8)}, "Missing key"),
        ({"weight": [1.0] * 8}, "expected torch.Tensor or Tensor-like object"),
        ({"weight": torch.ones(8).to_sparse()}, "weight"),
    ],
    ids=str,
)
def test_foreign_state_dicts(state, message):
    """Refused by the name of the key; the module is as before."""
    for cls in (RMSNorm, AddRMSNorm):
        norm = cls(8)
        with pytest.raises(RuntimeError, match=message):
            norm.load_state_dict(state)
        assert torch.equal(norm.weight, torch.ones(8))
        assert (
            norm(torch.ones(2, 8), *([torch.ones(2, 8)] if cls is AddRMSNorm else [])) is not None
        )


def test_a_cut_off_checkpoint(tmp_path):
    file = tmp_path / "norm.pt"
    torch.save(RMSNorm(64).state_dict(), file)
    whole = file.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        file.write_bytes(whole[:length])
        with pytest.raises((RuntimeError, EOFError, OSError)):
            RMSNorm(64).load_state_dict(torch.load(file))


HOOKS = [
    lambda m: m.register_forward_pre_hook(fail),
    lambda m: m.register_forward_hook(fail),
    lambda m: m.register_full_backward_pre_hook(fail),
    lambda m: m.register_full_backward_hook(fail),
    lambda m: m.weight.register_hook(fail),
    lambda m: m.weight.register_post_accumulate_grad_hook(fail),
    lambda m: nn.modules.module.register_module_forward_hook(fail),
]


def fail(*_):
    raise OSError("the hook's own")


@pytest.mark.parametrize("number", range(len(HOOKS)))
def test_a_hook_that_raises(number):
    """Its exception comes out, wherever it stands; without it all is as before."""
    norm, x = RMSNorm(16), torch.randn(4, 16, requires_grad=True)
    expected = torch.autograd.grad(norm(x).sum(), (x, norm.weight))
    handle = HOOKS[number](norm)
    with pytest.raises(OSError, match="the hook's own"):
        norm(x).sum().backward()
    handle.remove()
    norm.zero_grad()
    x.grad = None
    norm(x).sum().backward()
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(norm.weight.grad, expected[1])


def test_a_hook_of_the_graph_that_raises():
    x, w = torch.randn(4, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    for which in ("register_hook", "register_prehook"):
        y, _ = F.add_rms_norm(x, x, 16, w)
        getattr(y.grad_fn, which)(fail)
        with pytest.raises(OSError, match="the hook's own"):
            y.sum().backward()
