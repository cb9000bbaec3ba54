"""Fixtures of the op tests: every test that takes `op` runs once per backend that can run here."""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read at numpy's import: the oracle shall not fight the kernels
os.environ["PYTHONPATH"] = os.pathsep.join(  # for processes that tests start; pyproject.toml has the same for the tests
    filter(None, (os.path.dirname(__file__), os.environ.get("PYTHONPATH")))
)

import pytest
import torch
from helpers import BACKENDS, GPU_BACKENDS, Backend
from hypothesis import settings

FRESH = "CARERL_TEST_SEED" in os.environ
settings.register_profile("carerl", deadline=None, derandomize=not FRESH, max_examples=40)
settings.load_profile("carerl")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU, or runs GPU kernels under emulation")
    config.addinivalue_line("markers", "slow: takes a minute or so; deselect with -m 'not slow'")
    torch.set_num_threads(1)  # workers share the cores; tests of threading ask for more themselves


# What is not done under emulation: tests of threads and memory, which mean nothing there, and those that a kernel some thousand
# times slower takes minutes for.
TOO_LONG = {
    "cuda-emulated": ("long_all_positive", "two_thousand_updates", "a_million"),
    "triton-interpreted": (
        "threads",
        "a_million",
        "long_all_positive",
        "unbiased",
        "peak_memory",
        "never_a_nan",
        "never_reverses",
        "reproducible",
        "two_thousand_updates",
        "what_batch_pca_captures",
    ),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    dropped = [item for item in items if _too_long(item)]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in dropped]


def _too_long(item: pytest.Item) -> bool:
    backend = next((name for name in TOO_LONG if name in item.name), None)
    if backend is None:
        return False
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    large = case is not None and case.n > 10_000 and max(case.batch, 1) * case.dk[0] * case.dk[1] > 50
    return (backend == "triton-interpreted" and large) or any(word in item.name for word in TOO_LONG[backend])


def _parameter(backend: Backend):
    return pytest.param(backend, id=backend.name, marks=[pytest.mark.gpu] if backend.name in GPU_BACKENDS else [])


@pytest.fixture(params=[_parameter(b) for b in BACKENDS if b.missing() is None])
def op(request: pytest.FixtureRequest) -> Backend:
    """The kernels under test, called by overload: `op("project.list", ...)`."""
    return request.param


@pytest.fixture(params=[1, 2, 3], ids=lambda threads: f"{threads}threads")
def threads(request: pytest.FixtureRequest):
    """Runs the test with this many intra-op threads; an odd count leaves an uneven last share."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
