"""Fixtures of the op tests: every test that takes ``op`` runs once per backend that can run here."""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read at numpy's import: the oracle shall not fight the kernels

import pytest
import torch
from helpers import BACKENDS, GPU_BACKENDS, Backend
from hypothesis import settings

FRESH = "CARERL_TEST_SEED" in os.environ
settings.register_profile("carerl", deadline=None, derandomize=not FRESH, max_examples=40)
settings.load_profile("carerl")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU, or runs GPU kernels under emulation")
    torch.set_num_threads(1)  # workers share the cores; tests of threading ask for more themselves


SLOW_WHEN_INTERPRETED = (
    "threads",
    "a_million",
    "long_all_positive",
    "unbiased",
    "peak_memory",
    "never_a_nan",
    "reproducible",
)
"""Tests of what the interpreter does not have (threads, its memory is numpy's) or that call an op hundreds of times."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what Triton's interpreter, some thousand times slower than a kernel, would take minutes for."""
    slow = [item for item in items if "triton-interpreted" in item.name and _slow(item)]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


def _slow(item: pytest.Item) -> bool:
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    heavy = case is not None and case.n > 10_000 and max(case.batch, 1) * case.dk[0] * case.dk[1] > 50
    return heavy or any(word in item.name for word in SLOW_WHEN_INTERPRETED)


def _parameter(backend: Backend):
    return pytest.param(backend, id=backend.name, marks=[pytest.mark.gpu] if backend.name in GPU_BACKENDS else [])


@pytest.fixture(params=[_parameter(b) for b in BACKENDS if b.missing() is None])
def op(request: pytest.FixtureRequest) -> Backend:
    """The kernels under test, called by overload: ``op("project.list", ...)``."""
    return request.param


@pytest.fixture(params=[1, 2, 3], ids=lambda threads: f"{threads}threads")
def threads(request: pytest.FixtureRequest):
    """Runs the test with this many intra-op threads; an odd count leaves an uneven last share."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
