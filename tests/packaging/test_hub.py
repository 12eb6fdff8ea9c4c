"""The form that Hugging Face's kernel-builder wants: build.toml, torch-ext, the layers.

The builder itself needs Nix. What can be had without it: build.toml names everything and compiles
it as CMakeLists.txt does, the Python side keeps the Hub's rules, and a build under another name
works beside the installed package in one process.
"""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fused_rmsnorm

tomllib = pytest.importorskip("tomllib", reason="reads build.toml; part of Python from 3.11 on")

ROOT = Path(__file__).parents[2]
TORCH_EXT = ROOT / "torch-ext" / "fused_rmsnorm"
# As the builder makes it: name, backend, a hash of the sources.
NAME = "_fused_rmsnorm_cpu_0123abcd"
CONFIG: dict[str, Any] = tomllib.loads((ROOT / "build.toml").read_text())


def sections(backend: str) -> list[dict[str, Any]]:
    kernels = [k for k in CONFIG["kernel"].values() if k["backend"] == backend]
    return [CONFIG["torch"], *kernels]


def files(*patterns: str) -> set[str]:
    return {str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern)}


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_build_toml_names_every_source(backend: str) -> None:
    wanted = files("csrc/*.h", "csrc/include/*/*.h", "csrc/binding/*", "csrc/cpu/*")
    wanted |= files("csrc/cuda/*") if backend == "cuda" else set()
    wanted -= {"csrc/binding/cuda.cpp"} if backend == "cpu" else set()
    wanted -= files("csrc/cpu/*neon*")  # build.toml is for x86-64
    named = [path for section in sections(backend) for path in section["src"]]
    assert set(named) == wanted | {"torch-ext/torch_binding.cpp"}
    # norm.h is in [torch] and with the CPU kernels, half_exp.h with both backends' kernels.
    assert len(named) == len(set(named)) + (2 if backend == "cuda" else 1)


def test_build_toml_has_the_keys_of_edition_5() -> None:
    assert set(CONFIG) == {"general", "torch", "kernel"}
    assert CONFIG["general"]["edition"] == 5
    assert CONFIG["general"].keys() <= {"name", "version", "edition", "license", "backends", "hub"}
    assert CONFIG["torch"].keys() <= {"include", "minver", "maxver", "src", "cxx-flags"}
    common = {"backend", "cxx-flags", "depends", "include", "src"}
    own = {"cpu": set(), "cuda": {"cuda-flags"}}
    for section in CONFIG["kernel"].values():
        assert section.keys() <= common | own[section["backend"]]


def test_instruction_sets_have_the_flags_of_the_cmake_build() -> None:
    cmake = (ROOT / "cmake" / "cpu.cmake").read_text()
    (common,) = re.findall(r"set\(CPU_OPTIONS (.*)\)", cmake)
    of_file = dict(
        re.findall(
            r"\$\{CPU_FOLDER\}/(\w+\.cpp) PROPERTIES\s+COMPILE_OPTIONS \"?([^\")]*)\"?\)", cmake
        )
    )
    assert len(of_file) == 3
    for backend in ("cpu", "cuda"):
        for section in sections(backend)[1:]:
            source = Path(section["src"][0])
            if source.parent.name != "cpu":
                continue
            flags = {f for f in section["cxx-flags"] if not f.startswith("-W")}
            wanted = common.split() + of_file.get(source.name, "").split(";")
            wanted += ["-std=c++20", "-fvisibility=hidden"]
            assert flags == {f for f in wanted if f and not f.startswith("-W")}, source


def test_python_imports_torch_and_itself_only() -> None:
    for path in TORCH_EXT.glob("*.py"):
        tree = ast.parse(path.read_text(), feature_version=(3, 9))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            else:
                continue
            for name in names:
                assert name.split(".")[0] in {"torch", *sys.stdlib_module_names}, (path, name)
        assert "torch.ops" not in path.read_text()


def test_layers_are_a_forward_and_nothing_else() -> None:
    tree = ast.parse((TORCH_EXT / "layers.py").read_text())
    layers = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert [layer.name for layer in layers] == ["RMSNorm", "GemmaRMSNorm", "RMSNormGated"]
    for layer in layers:
        methods = [n.name for n in layer.body if isinstance(n, ast.FunctionDef)]
        variables = {t.id for n in layer.body if isinstance(n, ast.Assign) for t in n.targets}
        assert methods == ["forward"]
        assert variables == {"has_backward", "can_torch_compile"}


REGISTRATION = """
#pragma once
#include <Python.h>
#define EXPAND_PASTE(a, b) a##b
#define PASTE(a, b) EXPAND_PASTE(a, b)
#define EXPAND_QUOTE(a) #a
#define QUOTE(a) EXPAND_QUOTE(a)
#define REGISTER_EXTENSION(NAME)                                              \\
  PyMODINIT_FUNC PASTE(PyInit_, NAME)() {                                      \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, QUOTE(NAME), nullptr,  \\
                                 0, nullptr, nullptr, nullptr, nullptr, nullptr}; \\
    return PyModule_Create(&module);                                           \\
  }
"""
OPS = """
import torch
from . import {name}
ops = torch.ops.{name}

def add_op_namespace_prefix(op_name):
    return f"{name}::{{op_name}}"
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """torch-ext as the builder packs it, imported beside the installed package."""
    generated = tmp_path_factory.mktemp("generated")
    (generated / "registration.h").write_text(REGISTRATION)
    section = CONFIG["torch"]
    sources = [s for s in section["src"] if s.endswith(".cpp")]
    build = ROOT / "build" / "hub"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        [
            *("cmake", "-S", ROOT / "tests" / "packaging" / "hub", "-B", build, *generator),
            *(f"-DNAME={NAME}", f"-DSOURCES={';'.join(sources)}"),
            f"-DFLAGS={';'.join(section['cxx-flags'])}",
            f"-DGENERATED={generated}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_PREFIX_PATH={fused_rmsnorm.__path__[-1]}",
            f"-DTORCH_ROOT={torch.__path__[0]}",
        ],
        ["cmake", "--build", build, "--parallel", str(os.cpu_count() or 1)],
    ):
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    # kernels are loaded from a folder that is on no path, under a name that nobody else has
    package = tmp_path_factory.mktemp("hub") / f"hub{NAME}"
    shutil.copytree(TORCH_EXT, package)
    shutil.copy(build / f"{NAME}.abi3.so", package)
    (package / "_ops.py").write_text(OPS.format(name=NAME))
    sys.path.insert(0, str(package.parent))
    try:
        return importlib.import_module(package.name)
    finally:
        sys.path.pop(0)


@pytest.mark.slow
def test_two_builds_in_one_process(hub: ModuleType) -> None:
    """Every operator is there twice, with its own schema, kernels and derivatives."""
    ours, theirs = torch.ops.fused_rmsnorm, getattr(torch.ops, NAME)
    assert hub.rms_norm.__module__ != fused_rmsnorm.functional.rms_norm.__module__
    for name in ("rms_norm", "rms_norm_fwd", "rms_norm_bwd", "add_rms_norm_fwd", "add_rms_norm_"):
        a, b = getattr(ours, name).default, getattr(theirs, name).default
        assert str(a._schema).replace("fused_rmsnorm::", f"{NAME}::", 1) == str(b._schema)
        installed, built = (
            {
                line.split(": ")[0]
                for line in torch._C._dispatch_dump(op.name()).splitlines()
                if ": registered at" in line
            }
            for op in (a, b)
        )
        assert installed - {"CUDA"} == built  # the build of this test is for CPUs
    x = torch.randn(5, 96, requires_grad=True)
    w = torch.randn(96, requires_grad=True)
    results = []
    for op in (ours.rms_norm, theirs.rms_norm):
        y = op(x, w, None, 1e-6)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, w))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_layers_do_what_they_replace(hub: ModuleType) -> None:
    """As kernelize does it: the module keeps its state and gets another forward."""

    class Llama(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(96) + 0.5)
            self.variance_epsilon = self.eps = 1e-5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            return self.weight * wide.to(x.dtype)

    class Gemma(Llama):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
            return (wide * (1.0 + self.weight.float())).type_as(x)

    x = torch.randn(4, 7, 96).bfloat16()
    for theirs, ours in ((Llama, hub.layers.RMSNorm), (Gemma, hub.layers.GemmaRMSNorm)):
        module = theirs().bfloat16()
        given = x.clone().requires_grad_()
        results = []
        for forward in (theirs.forward, ours.forward):
            y = forward(module, given)
            results.append((y, *torch.autograd.grad(y.float().sin().sum(), (given, module.weight))))
        (y, dx, dw), (y2, dx2, dw2) = results
        torch.testing.assert_close(y2, y, rtol=2**-7, atol=0)  # one rounding of bf16
        torch.testing.assert_close(dx2, dx, rtol=2**-5, atol=2**-5)
        torch.testing.assert_close(dw2, dw, rtol=2**-5, atol=2**-5)
        module.forward = ours.forward.__get__(module)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(given), y2)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gated_layer_does_what_it_replaces(hub: ModuleType, activation: str) -> None:
    act = getattr(torch.nn.functional, activation)

    class Gated(torch.nn.Module):
        """silu as in Qwen3-Next, sigmoid as in Kimi Linear."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(96) + 0.5)
            self.variance_epsilon, self.activation = 1e-5, activation

        def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            if activation == "silu":
                wide = self.weight * wide.to(x.dtype)
            else:
                wide = self.weight.float() * wide
            return (wide * act(gate.float())).to(x.dtype)

    module = Gated().bfloat16()
    leaves = [torch.randn(4, 7, 96).bfloat16().requires_grad_() for _ in range(2)]
    results = []
    for forward in (Gated.forward, hub.layers.RMSNormGated.forward):
        y = forward(module, *leaves)
        inputs = (*leaves, module.weight)
        results.append((y, *torch.autograd.grad(y.float().sin().sum(), inputs)))
    (y, *gradients), (y2, *gradients2) = results
    torch.testing.assert_close(y2, y, rtol=2**-6, atol=2**-9)
    # One in three has another bit with the other rounding.
    assert (y2 != y).float().mean() < 0.02
    for theirs, ours in zip(gradients, gradients2, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-5, atol=2**-5)
    module.forward = hub.layers.RMSNormGated.forward.__get__(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*leaves), y2)
