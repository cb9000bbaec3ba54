"""Fixtures of the op tests: every test that takes `op` runs once per backend that can run here."""

from __future__ import annotations

import gc
import os
from functools import partial

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read at numpy's import: the oracle shall not fight the kernels
os.environ["PYTHONPATH"] = os.pathsep.join(  # for processes that tests start; pyproject.toml has the same for the tests
    filter(None, (os.path.dirname(__file__), os.environ.get("PYTHONPATH")))
)

import behind
import pytest
import torch
from helpers import BACKENDS, GPU_BACKENDS, Backend
from hypothesis import settings

FRESH = "CARERL_TEST_SEED" in os.environ
settings.register_profile("carerl", deadline=None, derandomize=not FRESH, max_examples=40)
settings.load_profile("carerl")


MARKERS = {
    "gpu": "needs a GPU, or runs GPU kernels under emulation",
    "slow": "takes a minute or so; deselect with -m 'not slow'",
    "behind(made=function)": "needs what function() makes (tests/behind.py), and comes last",
    "native_speed": "long enough that no emulated or interpreted kernel is put through it",
    "compiled": "needs compiled kernels: long, or about memory and random numbers, which mean nothing to an interpreter",
    **{f"on_{backend.name.replace('-', '_')}": f"runs on the {backend.name} backend" for backend in BACKENDS},
}


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    torch.set_num_threads(1)  # workers share the cores; tests of threading ask for more themselves


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    dropped = {item for item in items if _too_long(item)}
    config.hook.pytest_deselected(items=list(dropped))
    kept = [item for item in items if item not in dropped]
    items[:] = sorted(kept, key=_place)


def _place(item: pytest.Item) -> int:
    if item.get_closest_marker("behind"):
        return 2
    return 0 if item.get_closest_marker("slow") else 1  # at the end others would wait for a slow one


def pytest_collection_finish(session: pytest.Session) -> None:
    wanted = dict.fromkeys(mark.kwargs["made"] for item in session.items for mark in item.iter_markers("behind"))
    first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    if wanted and first and not session.config.option.collectonly:
        session.config.add_cleanup(partial(behind.end, behind.start(wanted)))
    # Torch, transformers and the tests are a million objects that stay: looking through them for garbage again and again would
    # take a twentieth of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def _too_long(item: pytest.Item) -> bool:
    """Whether kernels that are some thousand times slower than native ones would take minutes for it."""
    interpreted = item.get_closest_marker("on_triton_interpreted") is not None
    emulated = item.get_closest_marker("on_cuda_emulated") is not None
    if item.get_closest_marker("native_speed"):
        return interpreted or emulated
    return interpreted and item.get_closest_marker("compiled") is not None


def _parameter(backend: Backend):
    marks = [getattr(pytest.mark, f"on_{backend.name.replace('-', '_')}")]
    return pytest.param(backend, id=backend.name, marks=marks + [pytest.mark.gpu] * (backend.name in GPU_BACKENDS))


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
