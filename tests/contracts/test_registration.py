"""How the operators are registered: schemas, tags, and a kernel behind every key that counts."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from cases import OPTION_SETS
from reference import Options

import fused_rmsnorm

OPTIONS = 'float? eps=None, float? p=None, float weight_offset=0.0, str casting_mode="torch"'
GATED = f'str activation="silu", bool norm_before_gate=True, {OPTIONS}'
AFFINE = "Tensor? weight=None, Tensor? bias=None, "
SCHEMAS = {
    "rms_norm": f"(Tensor input, {AFFINE}{OPTIONS}) -> Tensor",
    "rms_norm_composite": f"(Tensor input, {AFFINE}{OPTIONS}) -> Tensor",
    "rms_norm_fwd": f"(Tensor input, {AFFINE}{OPTIONS}) -> (Tensor y, Tensor rstd)",
    "rms_norm_bwd": "(Tensor grad_output, Tensor input, Tensor? weight, Tensor rstd, "
    f"Tensor? grad_sum, bool[3] output_mask, {OPTIONS}) -> (Tensor dx, Tensor dw, Tensor db)",
    "add_rms_norm": f"(Tensor input, Tensor residual, {AFFINE}{OPTIONS}) -> (Tensor y, Tensor sum)",
    "add_rms_norm_fwd": f"(Tensor input, Tensor residual, {AFFINE}{OPTIONS}) -> "
    "(Tensor y, Tensor sum, Tensor rstd)",
    "rms_norm_gated": f"(Tensor input, Tensor gate, {AFFINE}{GATED}) -> Tensor",
    "rms_norm_gated_composite": f"(Tensor input, Tensor gate, {AFFINE}{GATED}) -> Tensor",
    "rms_norm_gated_fwd": f"(Tensor input, Tensor gate, {AFFINE}{GATED}) -> "
    "(Tensor y, Tensor rstd)",
    "rms_norm_gated_bwd": "(Tensor grad_output, Tensor input, Tensor gate, Tensor? weight, "
    f"Tensor? bias, Tensor rstd, bool[4] output_mask, {GATED}) -> "
    "(Tensor dx, Tensor dgate, Tensor dw, Tensor db)",
    "add_rms_norm_": f"(Tensor(a!) input, Tensor(b!) residual, {AFFINE}{OPTIONS}) -> ()",
}
COMPOSITE = (
    "rms_norm",
    "rms_norm_composite",
    "add_rms_norm",
    "rms_norm_gated",
    "rms_norm_gated_composite",
)
KERNELS = tuple(name for name in SCHEMAS if name not in COMPOSITE)
KEYS = ["CPU", "Meta", "CompositeExplicitAutograd", "FuncTorchBatched", "Autograd"]


def test_tests_vary_every_option():
    """Each is drawn by the contracts, and has more than one value in what all else takes."""
    names = [f.name for f in fields(Options)]
    assert names == re.findall(r"(\w+)=", OPTIONS)
    for name in names:
        assert len({getattr(o, name) for o in OPTION_SETS}) > 1, name


def registered(name: str) -> list[str]:
    """The lines of the dispatcher's table: "KEY: registered at FILE ..."."""
    return torch._C._dispatch_dump(f"fused_rmsnorm::{name}").splitlines()


def keys(name: str) -> set[str]:
    found = {line.split(": ")[0] for line in registered(name) if ": registered at" in line}
    return {key.removesuffix("[alias]") for key in found} - {"debug"}  # the schema's own line


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema_and_tag(name):
    op = getattr(torch.ops.fused_rmsnorm, name).default
    assert op._schema == torch._C.parse_schema(f"fused_rmsnorm::{name}{SCHEMAS[name]}")
    assert torch.Tag.pt2_compliant_tag in op.tags
    assert op._schema.is_mutable == name.endswith("_")


def test_nothing_else_is_registered():
    found = {
        schema.name.removeprefix("fused_rmsnorm::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("fused_rmsnorm::")
    }
    assert found == set(SCHEMAS)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("key", KEYS)
def test_kernels(name, key):
    assert key in keys(name)


@pytest.mark.parametrize("name", KERNELS)
def test_cuda_kernels_follow_the_build(name):
    assert ("CUDA" in keys(name)) == fused_rmsnorm.build_info()["cuda"]


@pytest.mark.parametrize("name", COMPOSITE)
def test_composites_have_nothing_beside_them(name):
    """A kernel under Autograd beside a CompositeImplicitAutograd one would never run; vmap needs it
    to be named once more."""
    assert keys(name) == {"CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"}


def test_build_info():
    info = fused_rmsnorm.build_info()
    assert set(info) == {
        "version",
        "torch",
        "cpu_capability",
        "cuda",
        "cuda_reason",
        "cuda_version",
        "cub_version",
        "cuda_archs",
    }
    version = (Path(fused_rmsnorm.__file__).parent / "VERSION").read_text().strip()
    assert info["version"] == fused_rmsnorm.__version__ == version
    assert (
        info["torch"].split("+")[0].split(".")[:2] == torch.__version__.split("+")[0].split(".")[:2]
    )
    assert info["cpu_capability"] in ("AVX512", "AVX2", "NEON", "baseline")
    cuda = [info[k] for k in ("cuda_version", "cub_version", "cuda_archs")]
    if info["cuda"]:
        assert info["cuda_reason"] is None
        assert all(cuda)
    else:
        assert info["cuda_reason"]
        assert cuda == [None] * 3


def test_public_names():
    for name in fused_rmsnorm.__all__:
        assert getattr(fused_rmsnorm, name) is not None
        assert fused_rmsnorm.__dict__[name].__doc__
    for name in fused_rmsnorm.functional.__all__:
        assert getattr(fused_rmsnorm.functional, name) is not None


def test_import_is_quiet_and_needs_only_torch():
    code = (
        "import sys; blocked = ('transformers', 'triton', 'hypothesis')\n"
        "for name in blocked: sys.modules[name] = None\n"
        "import fused_rmsnorm, torch\n"
        "fused_rmsnorm.RMSNorm(8)(torch.ones(2, 8))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
