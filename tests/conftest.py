"""Devices, random numbers and hypothesis settings for all tests."""

import getpass
import os
import random
import tempfile
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import settings

import fused_rmsnorm

# Deterministic by default, so that a run in CI says something about the change it tests.
# HYPOTHESIS_PROFILE=explore draws new examples, and more of them.
settings.register_profile("ci", deadline=None, derandomize=True, database=None, max_examples=60)
settings.register_profile("explore", deadline=None, database=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Of each test's random numbers, which depend on its name alone: neither on the tests before it nor
# on how the tests are spread over workers. TESTS_SEED=1 draws others.
SEED = os.environ.get("TESTS_SEED", "0")

# Inductor's cache goes by graphs and knows no operator's schema: what another checkout compiled, or
# this one yesterday, would call the operators with arguments that they do not have.
schemas = sorted(str(s) for s in torch._C._jit_get_all_schemas() if "fused_rmsnorm::" in s.name)
cache = f"fused_rmsnorm_inductor_{getpass.getuser()}_{zlib.crc32(repr(schemas).encode()):08x}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / cache))

DEVICES = ["cpu"]
if fused_rmsnorm.build_info()["cuda"] and torch.cuda.is_available():
    DEVICES.append("cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # A parameter rather than a fixture: hypothesis takes no function-scoped fixtures.
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


def pytest_runtest_setup(item: pytest.Item) -> None:
    seed = zlib.crc32(f"{SEED} {item.nodeid}".encode())
    torch.manual_seed(seed), random.seed(seed), numpy.random.seed(seed)
