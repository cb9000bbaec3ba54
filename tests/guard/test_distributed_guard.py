"""2 and 4 processes (gloo) equal the single process: FSDP2, DDP, plain lists; recording, acting, saving, going on, faults."""

from __future__ import annotations

import json
import os
import time
import warnings
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from carerl_kernels import CapabilityGuard, DomainBasis
from carerl_kernels.subspace import StoredBasis
from distributed_worker import SCENARIOS, K, R
from guard_helpers import make_model
from processes import start, wait

WORLDS = (2, 4)
# A process of four costs more than one of two. Shards are uneven in both and empty in four alone, where kinds of bases and of
# corrections that share their sums with fsdp_flat are looked at; a compiled replica is whole, however many there are.
IN_FOUR = (
    "fsdp_per_matrix",
    "fsdp_block",
    "fsdp_input",
    "probed_per_matrix",
    "probed_input",
    "gradient_mode",
    "mixed_precision",
)
IN_TWO = ("ddp_compiled_input",)
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


def scenarios_of(world: int) -> list[str]:
    return [name for name in SCENARIOS if name not in {2: IN_FOUR, 4: IN_TWO}[world]]


def everywhere(*names: str):
    """These scenarios in every number of processes that runs them."""
    cases = [(name, world) for name in names for world in WORLDS if name in scenarios_of(world)]
    return pytest.mark.parametrize(("name", "world"), cases)


def launch(scenarios: list[str], world: int, folder: Path) -> list[BaseProcess]:
    return [
        start("distributed_worker.main", scenarios, rank, world, folder, log=folder / f"log-{world}-{rank}")
        for rank in range(world)
    ]


def run_world(scenarios: list[str], world: int, folder: Path) -> None:
    codes = wait(launch(scenarios, world, folder))
    logs = "\n".join((folder / f"log-{world}-{rank}").read_text()[-3000:] for rank in range(world))
    assert codes == [0] * world, logs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every scenario in the single process, then in 2 and in 4; once for all test processes."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return run_all(tmp_path_factory.mktemp("distributed"))
    path = tmp_path_factory.getbasetemp().parent / "distributed"
    try:
        path.mkdir()
    except FileExistsError:  # another test process is at it
        deadline = time.monotonic() + 900
        while not (path / "done").exists():
            assert not (path / "failed").exists(), "another test process could not run the scenarios; its log says why"
            assert time.monotonic() < deadline, "another test process did not finish the scenarios in 15 minutes"
            time.sleep(0.2)
        return path
    try:
        run_all(path)
    except BaseException:
        (path / "failed").touch()
        raise
    (path / "done").touch()
    return path


def run_all(path: Path) -> Path:
    run_world([name for name in SCENARIOS if name != "load_elsewhere"], 1, path)
    DomainBasis.load(path / "fsdp_flat-1.safetensors").quantized().save(path / "int8.safetensors")
    run_world(["load_elsewhere"], 1, path)
    for world in WORLDS:
        run_world(scenarios_of(world), world, path)
    return path


def results(folder: Path, name: str, world: int) -> list[dict]:
    return [torch.load(folder / f"{name}-{world}-{rank}.pt") for rank in range(world)]


def assert_close(a, b, bound=1e-6):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        assert float((x.detach().double() - y.detach().double()).abs().amax()) <= bound


@everywhere("fsdp_flat", "fsdp_per_matrix", "fsdp_block", "fsdp_input", "gradient_mode")
def test_fully_sharded_equals_single_process(folder, name, world):
    """Uneven and empty shards (dimension 0 is 11, 7 and 3), accumulation, clipping; recording and acting."""
    (single,) = results(folder, name, 1)
    for one in results(folder, name, world):
        assert_close(one["parameters"], single["parameters"])
        for share, value in one["energy"].items():
            assert value == pytest.approx(single["energy"][share], abs=1e-6)
        if single["displacement"] is not None:  # not measured in grad mode
            assert one["displacement"] == pytest.approx(single["displacement"], rel=1e-4, abs=1e-6)
    first, *others = results(folder, name, world)
    for other in others:  # not just close: every process decides on the same numbers
        assert all(torch.equal(a, b) for a, b in zip(first["parameters"], other["parameters"], strict=True))


@everywhere("probed_per_matrix", "probed_input")
def test_probes_see_what_a_single_process_sees(folder, name, world):
    """Micro-batches of a probe are sharded and averaged like gradients; signs, intervals and edits agree."""
    (single,) = results(folder, name, 1)
    assert single["probes"]["rounds"] > 1 and single["probes"]["agreement"]
    for one in results(folder, name, world):
        assert_close(one["parameters"], single["parameters"])
        for what in ("rounds", "interval", "fallback"):
            assert one["probes"][what] == single["probes"][what]
        for domain, agreement in single["probes"]["agreement"].items():
            assert one["probes"]["agreement"][domain] == pytest.approx(agreement, abs=1e-5)


@everywhere("fsdp_flat", "fsdp_per_matrix", "fsdp_block", "fsdp_input")
def test_recorded_files_are_whole_and_alike(folder, name, world):
    """One file, whatever the number of processes: same directions, spectra, displacement, start."""
    a, b = (StoredBasis.load(folder / f"{name}-{n}.safetensors") for n in (1, world))
    assert (a.info.names, a.info.shapes, a.info.architecture) == (b.info.names, b.info.shapes, b.info.architecture)
    assert a.info.start_hash == b.info.start_hash  # does not depend on sharding; the end differs by rounding
    assert a.info.displacement_capture == pytest.approx(b.info.displacement_capture, abs=1e-6)
    if isinstance(a, DomainBasis):
        assert_close([a.singular_values, a.displacement], [b.singular_values, b.displacement], 1e-5)
        assert_close([a.directions], [b.directions], 1e-4)
    else:
        for moved in a.moved:
            for mine, theirs in ((a.left, b.left), (a.right, b.right)):
                assert (moved in mine) == (moved in theirs)
                if moved in mine:
                    assert_close([mine[moved] @ mine[moved].mT], [theirs[moved] @ theirs[moved].mT], 1e-5)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["load_flat", "load_per_matrix", "load_block", "load_input", "load_int8"])
def test_files_load_onto_any_number_of_processes(folder, name, world):
    (single,) = results(folder, name, 1)
    # int8: blocks of 128 begin elsewhere, so codes are rounded again: .0065 of components that moved by about .05
    bound = 1e-6 if name != "load_int8" else 5e-4
    for one in results(folder, name, world):
        assert_close(one["parameters"], single["parameters"], bound)


@pytest.mark.parametrize("world", WORLDS)
def test_a_sharded_basis_saves_again_bit_by_bit(folder, world):
    for kind in ("flat", "per_matrix"):
        a, b = folder / f"fsdp_{kind}-1.safetensors", folder / f"again_{kind}-{world}.safetensors"
        assert torch.equal(DomainBasis.load(a).directions, DomainBasis.load(b).directions)


@everywhere("ddp_per_matrix", "ddp_input", "ddp_compiled_input")
def test_ddp_equals_single_process(folder, name, world):
    (single,) = results(folder, name, 1)
    for one in results(folder, name, world):
        assert_close(one["parameters"], single["parameters"])
        assert one["communication"]["elements"] == 0  # parameters are whole everywhere: nothing to sum
    guard = CapabilityGuard.load(folder / f"{name}-{world}.safetensors", model=make_model())  # names without "module."
    assert guard.history == ["math"]


@pytest.mark.parametrize("world", WORLDS)
def test_plain_lists_equal_single_process(folder, world):
    (single,) = results(folder, "lists", 1)
    parts = [one["parts"] for one in results(folder, "lists", world)]
    assert_close([torch.cat(list(p)) for p in zip(*parts, strict=True)], [p.reshape(-1) for p in single["parts"]])


@pytest.mark.parametrize("world", WORLDS)
def test_communication_is_counted_and_small(folder, world):
    """A correction sums T*K coefficients and one flag, as every step its own; to track energy the coefficients before and after
    once more, and three numbers. A recorded step sums a Gram of (k + 5)^2 per row."""

    def ran(name: str) -> list[dict]:
        return results(folder, name, world) if name in scenarios_of(world) else []

    for name, width in (("fsdp_flat", K), ("fsdp_per_matrix", K), ("fsdp_block", R * R)):
        for one in ran(name):
            assert one["communication"]["elements_last_step"] <= 3 * one["T"] * width + 5
            assert one["communication"]["all_reduces_last_step"] <= 8
    for one in ran("fsdp_per_matrix"):
        assert one["recording"]["elements_last_step"] == one["T"] * (K + 5) ** 2 + 1
    for one in ran("lists"):
        assert one["communication"]["elements_last_step"] == K + 1
    for one in ran("fsdp_input"):  # coefficients stay where the outputs are; sums for the report
        assert one["communication"]["elements_last_step"] <= 3 * R + 5
    assert results(folder, "fsdp_flat", 1)[0]["communication"]["elements"] == 0
    assert json.loads(results(folder, "fsdp_flat", world)[0]["report"])["communication"]["elements"] > 0


@everywhere("mixed_precision")
def test_mixed_precision_protects(folder, name, world):
    runs = results(folder, name, world)
    for one in runs:
        assert one["displacement"] < 1e-4
        assert all(p.dtype == torch.float32 for p in one["parameters"])
    assert all(torch.equal(a, b) for a, b in zip(runs[0]["parameters"], runs[1]["parameters"], strict=True))


@pytest.mark.parametrize("world", WORLDS)
def test_one_process_with_a_nan_makes_all_drop_the_step(folder, world):
    for one in results(folder, "non_finite", world):
        assert one["same"] and one["dropped"] == 1


@pytest.mark.parametrize("world", [1, *WORLDS])
def test_every_process_hears_of_a_full_disk(folder, world):
    for one in results(folder, "full_disk", world):
        assert one["intact"] and "unchanged; free space" in one["message"]


@pytest.mark.parametrize("world", WORLDS)
def test_a_stage_goes_on_with_another_number_of_processes(folder, world):
    """torch.distributed.checkpoint of the single process, loaded by 2 and 4; the guard's state and a stage half recorded."""
    (single,) = results(folder, "checkpoint", 1)
    for one in results(folder, "checkpoint", world):
        assert_close(one["parameters"], single["parameters"])
    a, b = (DomainBasis.load(folder / f"resumed-{n}.safetensors") for n in (1, world))
    assert_close([a.directions, a.displacement], [b.directions, b.displacement], 1e-4)
    assert a.info.start_hash == b.info.start_hash and a.info.steps == b.info.steps == 8


@pytest.mark.parametrize("world", WORLDS)
def test_gradient_cosines_of_shards_are_those_of_the_whole(folder, world):
    (single,) = results(folder, "monitor_gradients", 1)
    for one in results(folder, "monitor_gradients", world):
        assert one["cosine"] == pytest.approx(single["cosine"], abs=1e-6)
        assert one["norm"] == pytest.approx(single["norm"], rel=1e-6)
        assert_close(one["parameters"], single["parameters"])


@pytest.mark.parametrize(("name", "world"), [("heard", 2), ("heard", 4), ("heard_compiled", 2)])
def test_calls_of_replicas_are_heard(folder, name, world):
    """Each process keeps its share of the sample; together they show what one process would have shown."""
    (single,) = results(folder, name, 1)
    for result in results(folder, name, world):
        assert result["sums"] == pytest.approx(single["sums"], rel=1e-4)


@pytest.mark.parametrize("world", WORLDS)
def test_observation_equals_single_process(folder, world):
    """Moments are summed over processes; one that runs out of batches shows its last one uncounted."""
    (single,) = results(folder, "observed", 1)
    whole = StoredBasis.load(folder / "observed-1.safetensors")
    for result in results(folder, "observed", world):
        assert result["batches"] == single["batches"] == 9
        for name, values in result["values"].items():
            torch.testing.assert_close(values, single["values"][name], rtol=1e-5, atol=1e-6)
    basis = StoredBasis.load(folder / f"observed-{world}.safetensors")
    for side in ("left", "right"):
        for name, columns in getattr(whole, side).items():
            torch.testing.assert_close(getattr(basis, side)[name].abs(), columns.abs(), rtol=0, atol=1e-3)


def test_copies_that_see_different_inputs_are_named(monkeypatch):
    """Replicas outside of DistributedDataParallel: nobody knows that they belong together."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *group: 2)
    with pytest.warns(UserWarning, match="guard in 2 processes, built from a whole model") as told:
        CapabilityGuard(make_model())
    assert [Path(one.filename).name for one in told] == [Path(__file__).name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CapabilityGuard(make_model(), basis="per_matrix", k=2)  # of gradients, which are averaged
