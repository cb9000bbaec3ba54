"""The benchmark itself: it measures what it says, and notices wrong results and impossible speeds. No timings asserted."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from carerl_kernels.bench import cost, measure, probe, run, variants
from carerl_kernels.bench.cases import Inputs
from carerl_kernels.bench.cost import Case
from carerl_kernels.bench.expect import Expectation, WrongResult
from carerl_kernels.bench.logits import LogitsCase
from carerl_kernels.bench.measure import CaseResult, ImpossibleResult, Spread, VariantResult, check_possible
from carerl_kernels.bench.overhead import Line, sweep
from carerl_kernels.bench.probe import Bandwidth
from carerl_kernels.bench.variants import OURS, Variant
from carerl_kernels.cli import app
from places import DOCS
from rich.console import Console
from typer.testing import CliRunner

F32, BF16, F16, I8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
N = 3001  # odd, and no multiple of a vector, an int8 block or a window
PROBE = 1 << 20
PAGE = DOCS / "performance.md"


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def quiet() -> run.Printer:
    return run.Printer(Console(quiet=True))


def tiny(case: Case) -> Case:
    """The same case with few elements."""
    if case.op.startswith("token_logprobs"):
        return replace(case, B=9, N=N)
    return replace(case, N=N if not case.tensors else 20_000, tensors=min(case.tensors, 20))


# ------------------------------------------------------------------------------------------------- bytes, operations


def test_bytes_of_dacsp_by_hand():
    case = Case("dacsp_", D=3, k=8, B=2, N=1000, grad=F32, basis=BF16)
    # Pass 1 reads 24 rows of 2000 bytes and 2 gradients of 4000; pass 2 the same and writes the gradients.
    assert case.passes == [24 * 2000 + 2 * 4000, 24 * 2000 + 4 * 4000]
    assert replace(case, op="dacsp_.list").bytes == case.bytes == 120_000
    assert case.rereads == 24 * 2000 + 2 * 4000
    assert case.flops == 2 * (2 * 2 * 24 * 1000) + 2 * 1000


def test_bytes_of_int8_rows_count_their_scales():
    assert (
        Case("project", D=1, k=4, N=1000, grad=BF16, basis=I8).bytes == 4 * (1000 + 4 * 8) + 2000
    )  # 8 = ceil(1000 / 128)


@pytest.mark.parametrize("grad", [F32, BF16], ids=str)
def test_formulas_of_the_documentation(grad):
    letters = {"K": 15, "k": 5, "B": 2, "u": 2, "g": grad.itemsize, "N": 700}
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \|$", PAGE.read_text(), re.M)
    assert {op for op, *_ in rows} == set(cost.OPS)
    for op, moved, operations in rows:
        case = Case(op, D=3, k=5, B=2, N=700, grad=grad, basis=F16)
        for formula, counted in ((moved, case.bytes), (operations, case.flops)):
            product = re.sub(r"(?<=[\w)]) (?=[\w(])|(?<=\))(?=\()", "*", formula)
            assert eval(product, {}, letters) * 700 == pytest.approx(counted), (op, formula)


# ------------------------------------------------------------------------------------------------------- whole run


def test_quick_preset_on_tiny_shapes(tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(run, "compiling", lambda preset, case: case.op == "dacsp_" and case.grad == case.basis == F32)
    chosen = [tiny(case) for case in cost.cases("quick")]
    run.run_bench(
        "quick",
        tmp_path / "bench.json",
        tmp_path / "roofline.png",
        own_cases=chosen,
        seconds=1e-9,
        probe_bytes=PROBE,
        printer=quiet,
    )
    report = json.loads((tmp_path / "bench.json").read_text())
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert report["environment"]["bandwidth_gbps"] > 0
    assert report["failures"] == []
    assert [found["case"]["name"] for found in report["cases"]] == [case.name for case in chosen]
    for found, case in zip(report["cases"], chosen, strict=True):
        assert {OURS, "textbook", "sharp"} <= found["variants"].keys(), found["missing"]
        assert found["case"]["bytes"] == case.bytes
        assert found["variants"][OURS]["ratio"]["median"] == 1.0
        for result in found["variants"].values():
            assert result["seconds"]["low"] <= result["seconds"]["median"] <= result["seconds"]["high"]
            assert result["errors"]
    first = report["cases"][0]
    assert "compiled" in first["variants"] or first["missing"]["compiled"].startswith("failed: ")


def test_full_preset_measures_every_op():
    assert {case.packet for case in cost.cases("full")} == set(cost.OPS)


@pytest.mark.parametrize("case", [tiny(case) for case in cost.cases("full")], ids=lambda case: case.name)
def test_every_competitor_of_the_full_preset_is_right(case):
    if case.op.startswith("token_logprobs"):
        x = expectation = LogitsCase(case)
        found, missing = x.variants(compiling=False)
    else:
        x = Inputs(replace(case, k=min(case.k, 16)))
        expectation = Expectation(x)
        found, missing = variants.variants(x, expectation, compiling=False)
    assert "sharp" in found, missing
    for name, variant in found.items():
        for _ in range(2):  # the second call starts from the same inputs
            x.reset()
            variant.reset()
            (variant.expectation or expectation).check(name, variant.call(), variant.exact)


@pytest.mark.parametrize("op", [op for op in cost.OPS if not op.startswith("token")])
def test_what_is_called_compiled_is_compiled(op, monkeypatch):
    class Compiled(Exception):
        pass

    def compile(function, **options):
        def call(*arguments):
            raise Compiled

        return call

    monkeypatch.setattr(torch, "compile", compile)
    call = variants.textbook_call(Inputs(tiny(Case(op, D=1))), compiled=True)
    with pytest.raises(Compiled):
        call()


def test_list_tensors_are_separate_and_odd():
    x = Inputs(Case("dacsp_.list", N=20_000, tensors=20))
    assert len(x.tensors) == 20
    assert all(t.numel() % 2 for t in x.tensors)
    assert all(o % 128 == 0 for o in x.offsets)


# ------------------------------------------------------------------------------------------------- wrong results


@pytest.mark.parametrize(
    "case",
    [
        *(tiny(Case(op, D=1, B=2)) for op in ("project", "gram", "edit_", "rotate_", "edit_rotate_", "dacsp_")),
        *(tiny(Case(op, D=1, B=2)) for op in ("pca_update_", "input_project", "input_confine_", "input_dacsp_")),
        tiny(Case("dacsp_.list", tensors=20)),
    ],
    ids=lambda case: case.op,
)
def test_one_wrong_number_is_noticed(case):
    x = Inputs(case)
    expectation, call = Expectation(x), variants.ours(x)
    expectation.check(OURS, call(), exact=True)
    for name in expectation.expected.keys() - {"energy"}:
        x.reset()
        outputs = call()
        target = outputs[name][-1] if isinstance(outputs[name], list) else outputs[name]
        target.view(-1)[-1].add_(0.1 * float(target.double().abs().max()))  # of N-sized results the very last element
        with pytest.raises(WrongResult, match=rf"{re.escape(case.op)}.* somebody returned \w+ with relative error"):
            expectation.check("somebody", outputs, exact=True)


def test_a_missing_output_and_a_nan_are_noticed():
    x = Inputs(tiny(Case("dacsp_")))
    expectation = Expectation(x)
    with pytest.raises(WrongResult, match="missing"):
        expectation.check("somebody", {"grads": x.grads}, exact=True)
    x.grads[0, 0] = torch.nan
    with pytest.raises(WrongResult):
        expectation.check("somebody", {"grads": x.grads, "coeffs": expectation.expected["coeffs"]}, exact=True)


@pytest.mark.parametrize("op", ["token_logprobs", "token_logprobs_backward"])
def test_one_wrong_token_is_noticed(op):
    x = LogitsCase(tiny(Case(op)))
    outputs = x.variants(compiling=False)[0][OURS].call()
    x.check(OURS, outputs, exact=True)
    next(iter(outputs.values()))[-1] *= 1.01
    with pytest.raises(WrongResult, match="somebody returned"):
        x.check("somebody", outputs, exact=True)


def test_a_wrong_variant_stops_its_case():
    x = Inputs(tiny(Case("project")))
    found = {
        OURS: Variant(variants.ours(x)),
        "halved": Variant(lambda: {"coeffs": variants.ours(x)()["coeffs"] / 2}),
    }
    with pytest.raises(WrongResult, match="halved returned coeffs"):
        measure.measure(x, found, {}, Expectation(x), Bandwidth(PROBE), 1e-9)


def test_a_wrong_kernel_fails_the_run_after_writing_the_rest(tmp_path, quiet, monkeypatch):
    right = variants.ours

    def ours(x: Inputs):
        return (lambda: {"grads": x.grads}) if x.case.op == "edit_" else right(x)  # forgets to edit

    monkeypatch.setattr(variants, "ours", ours)
    chosen = [tiny(Case("edit_")), tiny(Case("project"))]
    with pytest.raises(run.BenchError, match=r"edit_ .*carerl returned grads"):
        run.run_bench("quick", tmp_path / "b.json", own_cases=chosen, seconds=1e-9, probe_bytes=PROBE, printer=quiet)
    report = json.loads((tmp_path / "b.json").read_text())
    assert [found["case"]["op"] for found in report["cases"]] == ["project"]
    assert len(report["failures"]) == 1


# --------------------------------------------------------------------------------------------- impossible bandwidth


def result_at(case: Case, seconds: float) -> CaseResult:
    spread = Spread(seconds, seconds, seconds)
    own = VariantResult(spread, case.bytes / seconds / 1e9, spread, spread, None, 5, {}, "")
    return CaseResult(case, Spread(10.0, 10.0, 10.0), 5, {OURS: own}, {})


def test_faster_than_memory_is_an_error():
    case = Case("project")
    at_bandwidth = case.bytes / 10e9
    check_possible(result_at(case, at_bandwidth), 10.0, cache=32 << 20)
    with pytest.raises(ImpossibleResult, match=r"project fp32 .*110 %"):
        check_possible(result_at(case, at_bandwidth / 1.1), 10.0, cache=32 << 20)


def test_what_a_cache_may_hold_between_passes_is_no_error():
    case = Case("dacsp_", N=1_000_000)  # 100 MB a pass
    seconds = (case.bytes - (32 << 20)) / 10e9
    check_possible(result_at(case, seconds), 10.0, cache=32 << 20)
    with pytest.raises(ImpossibleResult):
        check_possible(result_at(case, seconds), 10.0, cache=0)


def test_measurement_spread_is_allowed_for():
    case = Case("project")
    result = replace(result_at(case, case.bytes / 10.5e9), bandwidth=Spread(10.0, 9.5, 10.3))
    check_possible(result, 10.0, cache=0)


# ------------------------------------------------------------------------------------------------------------ the rest


def test_peak_memory_sees_what_a_call_takes():
    taken = probe.peak_extra_memory(lambda: torch.ones(16 << 20))
    if taken is None:
        pytest.skip("this system does not say")
    assert 60 << 20 <= taken <= 80 << 20


def test_line_is_fitted():
    line = Line.fit([10**6, 10**7, 10**8], [1e-5 + 1e-4, 1e-5 + 1e-3, 1e-5 + 1e-2])
    assert line.fixed == pytest.approx(1e-5)
    assert line.per_byte == pytest.approx(1e-10)
    assert line.r_squared == pytest.approx(1.0)


def test_sweep_on_tiny_shapes():
    found = sweep({"N": [tiny(Case("dacsp_", k=k)) for k in (1, 2)]}, Bandwidth(PROBE), seconds=1e-9)
    assert [p["K"] for p in found["N"]["points"]] == [3, 6]


def test_pca_beside_scikit_learn():
    pytest.importorskip("sklearn")
    from carerl_kernels.bench.sklearn_pca import SharedStream

    stream = SharedStream(Case("pca_update_", D=1, k=8, B=4, N=2000), batches=4)
    result = measure.measure(stream, stream.variants(), {}, stream, Bandwidth(PROBE), 1e-9)
    assert set(result.variants) == {OURS, "scikit-learn"}
    energy = stream.captured()
    assert energy[OURS] >= energy["scikit-learn"] - 1e-6
    stream.values[0] *= 1.01
    with pytest.raises(WrongResult):
        stream.check("somebody", {"singular_values": stream.values}, exact=True)


def test_guard_on_a_training_step(quiet):
    pytest.importorskip("transformers")
    from carerl_kernels.bench.llm import Setting, guard_overhead
    from carerl_kernels.tasks.characters import character_tokenizer, tiny_model

    def load():
        tokenizer = character_tokenizer()
        return tiny_model(tokenizer, 0), tokenizer

    settings = [Setting("full", 4, 2, dtype) for dtype in (F32, I8)] + [Setting("full", 4, record_every=2)]
    results = guard_overhead(quiet, settings, rounds=1, load=load, new_tokens=3, prompts=("c:dba>", "m:372>", "s:3b!>"))
    for result in results:
        assert 0 < result.share.median < 100
        assert result.bases_bytes >= 8 * result.N


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "fast"], "preset: expected one of quick"),
        (["--op", "dascp_"], "op: expected one of dacsp_"),
        (["--preset", "llm", "--plot", "roofline.png"], "--plot: expected the preset quick or full"),
        (["--predict", "h100", "--op", "gram"], "--predict: expected no --op"),
        (["--gpu", "--op", "dascp_"], "op: expected one of dacsp_"),
        (["--preset", "sweep", "--op", "dacsp_", "--op", "gram"], "op: expected one for the sweep, found dacsp_, gram"),
    ],
)
def test_command_line_says_what_it_expected(arguments, message, monkeypatch):
    monkeypatch.setattr(run, "PROBE_BYTES", PROBE)
    monkeypatch.setattr(run.run_bench, "__kwdefaults__", {**run.run_bench.__kwdefaults__, "probe_bytes": PROBE})
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 1
    assert message in result.output
