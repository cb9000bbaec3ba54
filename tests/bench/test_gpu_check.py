"""What can be tested of the GPU check without a GPU: predictions, the documentation's tables, reports and exit codes."""

from __future__ import annotations

import json
import time

import pytest
import torch
from carerl_kernels.bench import gpu, gpu_check, gpu_others, roofline
from carerl_kernels.bench.cases import OUTPUTS, Inputs
from carerl_kernels.bench.cost import OPS, Case
from carerl_kernels.bench.variants import ours
from carerl_kernels.cli import app
from places import DOCS
from typer.testing import CliRunner

PAGE = DOCS / "gpu.md"
BF16 = torch.bfloat16


def test_memory_bound_predictions_are_bytes_over_the_bandwidth_that_a_kernel_gets():
    """project reads 24 rows and one gradient of 2 bytes: 50 bytes an element."""
    p = roofline.predict(Case("project", N=10**9, grad=BF16, basis=BF16), roofline.DEVICES["h100"])
    assert p.seconds == pytest.approx(50e9 / (0.98 * 0.9 * 3.35e12))
    assert p.bound == "memory"
    measured = roofline.predict(p.case, roofline.DEVICES["h100"], bandwidth=2e12)
    assert measured.seconds == pytest.approx(50e9 / (0.98 * 2e12))
    assert set(roofline.STREAMED) == set(OPS) and max(roofline.STREAMED.values()) < 1


def test_arithmetic_bound_predictions_are_operations_over_rate():
    """gram of 68 rows and a gradient: 45 pairs of eight rows, 128 operations each, beyond the ridge of an A100."""
    p = roofline.predict(Case("gram", D=1, k=68, N=10**8, grad=BF16, basis=BF16), roofline.DEVICES["a100"])
    assert p.seconds == pytest.approx(45 * 128 * 1e8 / (0.75 * 19.5e12))
    assert p.bound == "arithmetic"
    both = roofline.predict(Case("pca_update_", D=1, k=68, N=10**8, grad=BF16, basis=BF16), roofline.DEVICES["a100"])
    assert both.seconds == pytest.approx(p.seconds + 2 * 68 * 69 * 1e8 / (0.75 * 19.5e12))


@pytest.mark.parametrize(
    ("op", "matrix", "directions", "products"),
    [("input_project", BF16, BF16, 1), ("input_project", BF16, torch.float32, 2),
     ("input_project", torch.float32, torch.float32, 3), ("input_confine_", BF16, torch.float32, 5),
     ("input_confine_", torch.float32, torch.float32, 6), ("input_dacsp_", BF16, BF16, 3)],
)  # fmt: skip
def test_inputs_of_matrices_are_products_of_terms(op, matrix, directions, products):
    """40 directions are padded to 64."""
    case = Case(op, D=1, k=40, B=100, N=200, grad=matrix, basis=directions)
    assert roofline.operations(case) == {"tf32": products * 2 * 100 * 64 * 200}


def test_overhead_is_what_the_planner_counts():
    inputs, block, flat, coded = roofline.overhead("h100")
    shard = 7.6e9 / 8
    assert flat.bases == pytest.approx(shard * 24 * 2, rel=0.01)
    moved, operations = shard * (2 * 24 * 2 + 3 * 2), 4 * 24 * shard
    seconds = moved / (0.9 * 3.35e12) + operations / (0.75 * 67e12) + 20e-6
    assert flat.guard == pytest.approx(seconds, rel=0.01)
    assert flat.step == pytest.approx(6 * 7.6e9 * 2**20 / (8 * 0.4 * 989e12), rel=0.01)
    assert coded.bases < 0.6 * flat.bases
    assert max(inputs.bases, block.bases) < flat.bases / 10
    assert max(inputs.guard, block.guard) < flat.guard


@pytest.mark.parametrize("name", roofline.DEVICES)
def test_the_documentation_holds_what_the_command_prints(name):
    printed = CliRunner().invoke(app, ["bench", "--predict", name])
    assert printed.exit_code == 0
    assert printed.stdout.strip() in PAGE.read_text(), f"paste the output of: carerl bench --predict {name}"


def test_an_unknown_device_is_named():
    result = CliRunner().invoke(app, ["bench", "--predict", "v100"])
    assert result.exit_code == 1
    assert "expected one of a100, h100, b200, found 'v100'" in result.output
    assert roofline.device_named("NVIDIA H100 80GB HBM3") is roofline.DEVICES["h100"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails(tmp_path):
    target = tmp_path / "gpu-check.json"
    result = CliRunner().invoke(gpu_check.app, ["--json", str(target)])
    assert result.exit_code == gpu_check.NO_GPU == 2
    assert "no GPU: " in result.output
    assert "Nothing was tested or measured." in result.output
    assert not target.exists()
    result = CliRunner().invoke(app, ["bench", "--gpu"])
    assert result.exit_code == 1
    assert "no GPU: " in result.output


RATES = {"copy_gbps": 2800.0, "read_gbps": 3000.0}


def recorded(**changes) -> dict:
    """A report as :func:`gpu_check.check` writes it, with made-up times."""
    result = {
        "case": "project bf16 D=3 k=8 B=1 N=3.2e7", "op": "project", "bytes": 1_600_000_000, "flops": 1_536_000_000,
        "predicted_ms": 0.571, "data_sheet_ms": 0.531, "errors": {"coeffs": 1e-7}, "wrong": None,
        "ms": [0.61, 0.62, 0.64], "gbps": 2580.6, "percent_of_copy": 92.2,
        "others": {"mm": 1.24, "mv": 3.1, "torch.compile": "RuntimeError: no compiler"},
    }  # fmt: skip
    device = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "torch": "2.13.0", "cuda": "13.0", "hip": None}
    run = {"device": device, "bandwidth": RATES, "serves": {"project": "triton"}, "results": [result | changes]}
    tests = {"exit": 0, "passed": 900, "failed": 0, "errors": 0, "skipped": 3, "failures": []}
    return {"tests": tests, "runs": {"triton": run}}


def test_a_report_shows_measured_beside_predicted(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(recorded()))
    shown = CliRunner().invoke(gpu_check.app, ["--show", str(path)])
    assert shown.exit_code == 0
    row = "| project bf16 D=3 k=8 B=1 N=3.2e7 | triton | 0.62 [0.61, 0.64] | 2581 | 92 | 0.571 | 0.531 | mm 1.24 ms, 2.0 x |"
    assert row in shown.output
    assert "900 passed, 0 failed, 0 errors, 3 skipped" in shown.output
    assert "copy 2800 GB/s, read 3000 GB/s" in shown.output
    assert "Nothing is wrong." in shown.output


def broken_tests() -> dict:
    report = recorded()
    report["tests"] |= {"exit": 1, "failed": 1, "failures": ["tests/ops/test_ops_edit.py::test_x[triton]"]}
    return report


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (recorded(wrong="project: carerl returned coeffs with relative error 0.3"), "relative error 0.3"),
        (broken_tests(), "tests/ops/test_ops_edit.py::test_x[triton]"),
        (recorded() | {"tests": None}, "the tests were not run"),
        ({**recorded(), "runs": {"cuda": {"error": "the benchmark of cuda exited with 1"}}}, "exited with 1"),
        (recorded() | {"tests": recorded()["tests"] | {"passed": 0}}, "0 passed"),
    ],
    ids=["wrong", "failed", "untested", "crashed", "nothing_ran"],
)
def test_a_report_with_a_problem_exits_with_1(tmp_path, report, message):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    shown = CliRunner().invoke(gpu_check.app, ["--show", str(path)])
    assert shown.exit_code == gpu_check.FAILED == 1
    assert message in shown.output
    assert "Nothing is wrong." not in shown.output


def test_what_pytest_printed_is_counted():
    output = "....F\nFAILED tests/a.py::test_b[cuda] - assert 1 == 2\nERROR tests/c.py::test_d\n"
    output += "1 failed, 4 passed, 2 skipped, 30 deselected, 1 error in 2.5s\n"
    expected = {"passed": 4, "failed": 1, "errors": 1, "skipped": 2}
    assert gpu_check.summary(output) == {**expected, "failures": ["tests/a.py::test_b[cuda]", "tests/c.py::test_d"]}
    assert gpu_check.summary("no tests ran in 0.1s")["passed"] == 0


def test_tests_are_run_in_a_process_and_counted(tmp_path):
    (tmp_path / "test_small.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_a(): pass\n@pytest.mark.gpu\ndef test_b(): assert 0\ndef test_c(): pass\n"
    )
    found = gpu_check.run_tests(tmp_path)
    assert (found["passed"], found["failed"], found["exit"]) == (1, 1, 1)


CASES = [
    Case("project", D=2, k=3, N=5003, grad=BF16, basis=torch.int8),
    Case("edit_rotate_", D=2, k=3, N=5003),
    Case("pca_update_", D=1, k=4, N=5003),
    Case("dacsp_.list", D=2, k=3, N=50_048, tensors=7),
    Case("token_logprobs", D=0, k=0, B=9, N=701),
    Case("token_logprobs_backward", D=0, k=0, B=9, N=701),
]


@pytest.fixture
def _clock_of_the_host(monkeypatch):
    """CUDA events need a GPU; all the rest of a measurement does not."""

    def elapsed(call, before, device, rounds):
        seconds = []
        for _ in range(rounds):
            before()
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        return seconds

    monkeypatch.setattr(gpu, "elapsed", elapsed)
    monkeypatch.setattr(gpu, "FLUSHED", 1 << 10)


@pytest.mark.usefixtures("_clock_of_the_host")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_a_case_is_checked_and_timed(case):
    with torch.no_grad():
        found = gpu.measure_case(case, torch.device("cpu"), "NVIDIA H100 80GB HBM3", RATES, rounds=3, competing=False)
    assert found["wrong"] is None
    assert found["errors"]
    assert max(found["errors"].values()) < 1e-2
    assert found["gbps"] == pytest.approx(case.bytes / found["ms"][1] / 1e6)
    assert found["percent_of_copy"] == pytest.approx(100 * found["gbps"] / 2800)
    share = roofline.STREAMED[case.op.split(".")[0]]
    assert found["predicted_ms"] == pytest.approx(case.bytes / (share * 2800e9) * 1e3, rel=0.3)
    json.dumps(found)
    assert case.name in gpu.line(found)


@pytest.mark.usefixtures("_clock_of_the_host")
@pytest.mark.parametrize("op", ["project", "edit_", "dacsp_", "gram", "rotate_", "edit_rotate_", "input_confine_"])
def test_what_the_ops_compete_with_computes_the_same(op, monkeypatch):
    """In fp32; but for what the compiler and products with an output of another type make of it, which need a GPU."""
    monkeypatch.setattr(gpu_others, "CHUNK", 1000)
    case = Case(op, D=1 if op.startswith("input_") else 2, k=3, B=2, N=5003)
    x = Inputs(case)
    output = OUTPUTS[op][0]
    expected = ours(x)()[output].clone().float()
    found = {name: way for name, way in gpu_others.ways(x).items() if name != "torch.compile"}
    assert "mm" in found
    for way in found.values():
        x.reset()
        torch.testing.assert_close(way()[output].view(expected.shape).float(), expected, rtol=2e-4, atol=2e-3)


@pytest.mark.usefixtures("_clock_of_the_host")
def test_a_competitor_that_fails_is_named_and_the_others_are_timed(monkeypatch):
    def broken():
        raise RuntimeError("no such product\nhere")

    monkeypatch.setattr(gpu, "ways", lambda x: {"mm": lambda: x.grads + 1, "bmm": broken})
    case = Case("project", D=2, k=3, N=5003)
    found = gpu.measure_case(case, torch.device("cpu"), "unknown", RATES, rounds=3)
    assert found["others"]["bmm"] == "RuntimeError: no such product"
    assert found["others"]["mm"] > 0
    assert "mm " in gpu.line(found) and "bmm: RuntimeError" in gpu.line(found)


@pytest.mark.usefixtures("_clock_of_the_host")
def test_a_wrong_kernel_is_reported_not_timed(monkeypatch):
    monkeypatch.setattr(gpu, "ours", lambda x: lambda: {"coeffs": torch.zeros(1, 6)})
    found = gpu.measure_case(Case("project", D=2, k=3, N=5003), torch.device("cpu"), "unknown", RATES)
    assert "relative error 1" in found["wrong"]
    assert "ms" not in found
    assert found["data_sheet_ms"] is None


def test_the_cases_of_a_check_cover_every_op():
    seen = {case.op for case in gpu.gpu_cases()}
    assert seen == {*OPS, "dacsp_.list"}
    assert all(case.bytes > 100e6 for case in gpu.gpu_cases())
