"""Confinement and sums of finished checkpoints against dense float64 oracles, and their files."""

from __future__ import annotations

import errno
import json
import resource
import signal
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from carerl_kernels import BasisError
from carerl_kernels.cli import app
from carerl_kernels.guard import changes
from carerl_kernels.guard.checkpoints import confine, merge
from carerl_kernels.guard.sums import task_arithmetic, ties
from carerl_kernels.subspace import fingerprint, portions, weights
from checkpoint_helpers import SHAPES, SIDES, bases, checkpoints, dense, frame, load, save
from typer.testing import CliRunner

COVERED = list(SIDES)


@pytest.fixture
def two(tmp_path):
    start, end = checkpoints()
    return save(tmp_path / "start", start), save(tmp_path / "end", end, config__json="{}"), start, end


def relative(found: torch.Tensor, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.double().numpy() - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("bound", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("room", [0.3, 1.0])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.99, 1.0])
def test_confined_is_the_dense_projection(overlap, room, bound, two, tmp_path):
    start, end, a, b = two
    given = bases(overlap=overlap, moved=0.3)
    result = confine(start, end, given, tmp_path / "out", bound, room)
    found, wanted = load(tmp_path / "out"), dense(a, b, given, bound, room)
    assert found.keys() == wanted.keys()
    for name in found:
        assert found[name].dtype == b[name].dtype
        assert relative(found[name], wanted[name]) < 1e-6, name
    assert set(result.corrected) == set(COVERED)
    assert result.uncovered == ["free.weight"]


def test_shares_are_those_of_the_whole_change(two, tmp_path):
    start, end, a, b = two
    given = bases(overlap=0.5)
    result = confine(start, end, given, tmp_path / "out", 0.0, 1.0)
    wanted = dense(a, b, given, 0.0, 1.0)
    energy = {name: float((b[name] - a[name]).double().square().sum()) for name in a}
    whole = sum(energy.values())
    left = sum(float(((wanted[name] - a[name].double().numpy()) ** 2).sum()) for name in a)
    assert result.norm == pytest.approx(whole**0.5)
    assert result.remained == pytest.approx(left / whole)
    assert result.free == pytest.approx((energy["free.weight"] + energy["norm.weight"]) / whole)
    for basis in given:
        before = 0.0
        for name, side in SIDES.items():
            change = (b[name] - a[name]).double()
            V = (basis.left if side == "left" else basis.right)[name].double()
            before += float(((change.mT if side == "left" else change) @ V).square().sum())
        share = result.domains[basis.info.domain]
        assert share.before == pytest.approx(before / whole)
        assert share.after < 1e-10
        assert share.norm == pytest.approx(before**0.5)


def test_what_needs_no_correction_is_bitwise_the_end(tmp_path):
    start, end = checkpoints()
    given = bases()
    end["b.weight"] = start["b.weight"].clone()
    off = torch.from_numpy(frame("a.weight", given, 1.0)[0])
    change = torch.randn(7, 13, dtype=torch.float64)
    end["a.weight"] = (start["a.weight"].double() + change - change @ off @ off.mT).float()
    end["b.weight"][0, 0] = start["b.weight"][0, 0] = -0.0
    folders = save(tmp_path / "start", start), save(tmp_path / "end", end)
    result = confine(*folders, given, tmp_path / "out", room=1.0)
    assert result.corrected == ["embed.weight"]
    assert result.kept == len(SHAPES) - 1
    found = load(tmp_path / "out")
    for name in set(SHAPES) - {"embed.weight"}:
        assert torch.equal(found[name].view(torch.int32), end[name].view(torch.int32)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_changed_gives_the_same_bytes(dtype, tmp_path):
    start, _ = checkpoints(dtype=dtype)
    folders = save(tmp_path / "start", start), save(tmp_path / "end", start)
    result = confine(*folders, bases(), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()
    assert (result.norm, result.corrected) == (0.0, [])


def test_confining_again_changes_no_bit(two, tmp_path):
    start, end, _, _ = two
    for bound in (0.0, 0.3):
        given = bases(overlap=0.9, moved=0.3)
        confine(start, end, given, tmp_path / f"once{bound}", bound)
        again = confine(start, tmp_path / f"once{bound}", given, tmp_path / f"twice{bound}", bound)
        assert again.corrected == []


def along(size: float, dtype: torch.dtype):
    """A matrix that moves along its 24 directions alone, in low precision; size 0.01 is about a unit in bfloat16's last place."""
    torch.manual_seed(0)
    U, shape = torch.linalg.qr(torch.randn(256, 24))[0], (96, 256)
    start = {"a.weight": torch.randn(shape).to(dtype)}
    end = {"a.weight": start["a.weight"].float() + size * torch.randn(96, 24) @ U.mT / 10}
    (basis,) = bases(domains=("math",))
    return (
        start,
        end,
        U.double(),
        replace(
            basis,
            info=replace(basis.info, k=24, names=("a.weight",), shapes=(shape,)),
            left={},
            right={"a.weight": U},
            values={"a.weight": torch.ones(24, dtype=torch.float64)},
            moved={"a.weight": torch.zeros(96, 24, dtype=torch.float64)},
        ),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.001, 0.01, 0.1])
def test_rounding_takes_part_in_the_projection(size, dtype, tmp_path, monkeypatch):
    start, end, U, given = along(size, dtype)
    end = {name: t.to(dtype) for name, t in end.items()}
    folders = save(tmp_path / "start", start), save(tmp_path / "end", end)
    shares = []
    for passes in (1, changes.PASSES):
        monkeypatch.setattr(changes, "PASSES", passes)
        result = confine(*folders, [given], tmp_path / f"out{passes}")
        shares.append(result.domains["math"].after / result.domains["math"].before)
        found = load(tmp_path / f"out{passes}")["a.weight"]
        left, before = ((t.double() - start["a.weight"].double()) @ U for t in (found, end["a.weight"]))
        assert shares[-1] == pytest.approx(float(left.square().sum() / before.square().sum()), rel=1e-3)
    assert shares[1] <= shares[0]
    if (size, dtype) == (0.01, torch.bfloat16):
        assert shares[1] < 0.3 * shares[0]


def test_rounded_sums_keep_what_lies_along_directions(tmp_path, monkeypatch):
    start, end, U, given = along(0.01, torch.bfloat16)
    save(tmp_path / "start", start), save(tmp_path / "end", end)
    lost = []
    for passes in (1, changes.PASSES):
        monkeypatch.setattr(changes, "PASSES", passes)
        merge(tmp_path / "start", {"math": tmp_path / "end"}, [given], tmp_path / f"{passes}")
        missing = load(tmp_path / f"{passes}")["a.weight"].double() - end["a.weight"].double()
        lost.append(float((missing @ U).square().sum()))
    assert lost[1] < 0.3 * lost[0]


def test_dtypes_may_differ(tmp_path):
    start, end = checkpoints()
    start = {name: t.to(torch.bfloat16) for name, t in start.items()}
    folders = save(tmp_path / "start", start), save(tmp_path / "end", end)
    given = bases()
    confine(*folders, given, tmp_path / "out", 0.0, 1.0)
    wanted = dense(start, end, given, 0.0, 1.0)
    assert all(relative(t, wanted[name]) < 1e-6 for name, t in load(tmp_path / "out").items())


@pytest.mark.parametrize("shards", [2, 4])
def test_shards_and_portions_do_not_matter(shards, tmp_path, monkeypatch):
    start, end = checkpoints()
    given = bases(moved=0.3)
    a, b = save(tmp_path / "start", start, 2), save(tmp_path / "end", end, shards, config__json="{}")
    whole = save(tmp_path / "whole", end)
    confine(a, whole, given, tmp_path / "out", room=1.0)
    monkeypatch.setattr(portions, "GROUP", 4 * 13 * 3)  # three rows of a matrix, one column of the embedding
    result = confine(a, b, given, tmp_path / "sharded", room=1.0)
    one, other = load(tmp_path / "out"), load(tmp_path / "sharded")
    assert all(torch.allclose(one[name], other[name], atol=1e-6, rtol=0) for name in SHAPES)
    assert sorted(p.name for p in (tmp_path / "sharded").iterdir()) == sorted(p.name for p in b.iterdir())
    assert sorted(result.corrected) == sorted(COVERED)


def test_memory_is_that_of_a_portion(tmp_path, monkeypatch):
    """Of both checkpoints together no more than two portions are in memory, however large their files are."""
    alive, most = {}, []

    class Watched(weights.Weights):
        def read(self, *where, **how):
            tensor = super().read(*where, **how).clone()
            alive[id(tensor)] = tensor.numel()
            weakref.finalize(tensor, alive.pop, id(tensor), None)
            most.append(sum(alive.values()))
            return tensor

    monkeypatch.setattr("carerl_kernels.guard.checkpoints.Weights", Watched)
    monkeypatch.setattr(portions, "GROUP", 4 * 13 * 19)
    many = [{f"{i}.{name}": t.clone() for i in range(20) for name, t in part.items()} for part in checkpoints()]
    info = bases()[0].info
    names = tuple(f"{i}.{name}" for i in range(20) for name in SHAPES)
    given = [
        replace(
            basis,
            info=replace(info, domain=basis.info.domain, names=names, shapes=tuple(SHAPES.values()) * 20),
            **{
                what: {f"{i}.{name}": t for i in range(20) for name, t in getattr(basis, what).items()}
                for what in ("left", "right", "values", "moved")
            },
        )
        for basis in bases()
    ]
    confine(save(tmp_path / "start", many[0]), save(tmp_path / "end", many[1]), given, tmp_path / "out")
    assert max(most) <= 2 * portions.GROUP // 4


def test_bases_of_different_ranks_and_coverage(two, tmp_path):
    start, end, a, b = two
    one, other = bases(r=3, domains=("math",)) + bases(r=2, domains=("chat",), seed=1)
    for what in ("right", "values", "moved"):
        getattr(other, what).pop("a.weight")  # nothing of it was seen
    confine(start, end, [one, other], tmp_path / "out", 0.0, 1.0)
    found = load(tmp_path / "out")
    assert relative(found["a.weight"], dense(a, b, [one], 0.0, 1.0)["a.weight"]) < 1e-6
    wanted = dense({"b.weight": a["b.weight"]}, {"b.weight": b["b.weight"]}, [one, other], 0.0, 1.0)
    assert relative(found["b.weight"], wanted["b.weight"]) < 1e-6


def test_prefixes_of_files_and_bases(two, tmp_path):
    start, end, a, b = two
    given = bases()
    confine(start, end, given, tmp_path / "plain")
    plain = load(tmp_path / "plain")
    longer = [{f"model.{name}": t for name, t in part.items()} for part in (a, b)]
    confine(save(tmp_path / "s", longer[0]), save(tmp_path / "e", longer[1]), given, tmp_path / "longer")
    assert all(torch.equal(t, plain[name.removeprefix("model.")]) for name, t in load(tmp_path / "longer").items())
    named = [
        replace(
            basis,
            info=replace(basis.info, names=tuple(f"model.{n}" for n in basis.info.names)),
            **{
                w: {f"model.{n}": t for n, t in getattr(basis, w).items()} for w in ("left", "right", "values", "moved")
            },
        )
        for basis in given
    ]
    confine(start, end, named, tmp_path / "shorter")
    assert all(torch.equal(t, plain[name]) for name, t in load(tmp_path / "shorter").items())


def test_single_files(two, tmp_path):
    start, end, _, _ = two
    (tmp_path / "out").mkdir()  # empty: taken
    confine(start / "model.safetensors", end / "model.safetensors", bases(), tmp_path / "out")
    confine(start, end, bases(), tmp_path / "whole")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert all(torch.equal(t, load(tmp_path / "whole")[n]) for n, t in load(tmp_path / "out").items())


def test_slices_of_stacked_matrices(tmp_path):
    torch.manual_seed(0)
    stack = torch.randn(4, 6, 13)
    start, end = {"w": stack}, {"w": stack + 0.1 * torch.randn(4, 6, 13)}
    V = {e: torch.linalg.qr(torch.randn(13, 3))[0] for e in (0, 1, 3)}  # nothing was routed to expert 2
    info = replace(bases()[0].info, names=("w",), shapes=((4, 6, 13),))
    given = replace(
        bases()[0],
        info=info,
        left={},
        right={f"w[{e}]": v for e, v in V.items()},
        values={f"w[{e}]": torch.ones(3) for e in V},
        moved={f"w[{e}]": torch.zeros(6, 3) for e in V},
    )
    result = confine(save(tmp_path / "s", start), save(tmp_path / "e", end), [given], tmp_path / "out")
    found = load(tmp_path / "out")["w"]
    for e in range(4):
        change = end["w"][e] - stack[e]
        wanted = end["w"][e] - (change @ V[e] @ V[e].mT if e in V else 0.0)
        assert torch.allclose(found[e], wanted, atol=1e-6)
    assert torch.equal(found[2], end["w"][2])
    assert (result.corrected, result.uncovered) == (["w"], ["w"])


def test_other_files_are_copied_and_foreign_weights_are_not(two, tmp_path):
    start, end, _, _ = two
    (end / "tokenizer.json").write_text("t")
    (end / "chat").mkdir()
    (end / "chat" / "template.jinja").write_text("c")
    (end / "global_step1").mkdir()
    (end / "global_step1" / "optimizer.pt").write_bytes(b"o")
    (end / "pytorch_model.bin").write_bytes(b"w")
    (end / "generation_config.json").symlink_to(tmp_path / "g")
    (tmp_path / "g").write_text("g")
    result = confine(start, end, bases(), tmp_path / "deep" / "out")
    out = tmp_path / "deep" / "out"
    assert [
        p.read_text() for p in (out / "tokenizer.json", out / "chat" / "template.jinja", out / "generation_config.json")
    ] == ["t", "c", "g"]
    assert not (out / "generation_config.json").is_symlink()
    assert result.left_out == ["global_step1", "pytorch_model.bin"]
    assert not (out / "pytorch_model.bin").exists()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


class Stop(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), Stop(), ValueError("bug")])
def test_interrupted_writes_leave_nothing(error, two, tmp_path, monkeypatch):
    start, end, _, _ = two

    def fail(self, name, *where):
        if name == "b.weight":
            raise error

    monkeypatch.setattr(weights.Copy, "write", fail)
    with pytest.raises(OSError if isinstance(error, OSError) else type(error), match=r"nothing was left|bug|^$"):
        confine(start, end, bases(), tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_file_that_cannot_grow_leaves_nothing(two, tmp_path):
    start, end, _, _ = two
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(OSError, match=r"could not write .*out: .*nothing was left behind; free space"):
            confine(start, end, bases(), tmp_path / "deep" / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list((tmp_path / "deep").iterdir()) == []


def test_refused_by_name(two, tmp_path):
    start, end, a, b = two
    given, out = bases(), tmp_path / "out"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()

    def refused(match, s=start, e=end, g=given, o=out, kind=ValueError, **numbers):
        with pytest.raises(kind, match=match):
            confine(s, e, g, o, **numbers)
        assert not out.exists()

    fewer = save(tmp_path / "fewer", {n: t for n, t in b.items() if n != "free.weight"})
    other = save(tmp_path / "other", {**b, "free.weight": torch.zeros(4, 5)})
    wrong = (
        save(tmp_path / "wrong", {**a, "b.weight": torch.zeros(19, 12)}),
        save(tmp_path / "wrong2", {**b, "b.weight": torch.zeros(19, 12)}),
    )
    whole = save(tmp_path / "int", {**b, "b.weight": torch.zeros(19, 13, dtype=torch.int8)})
    broken = save(tmp_path / "nan", {**b, "b.weight": b["b.weight"] / 0})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").touch()
    index = save(tmp_path / "index", b, 2)
    (index / "model-00002-of-00002.safetensors").unlink()
    damaged = save(tmp_path / "damaged", b)
    (damaged / "model.safetensors").write_bytes((end / "model.safetensors").read_bytes()[:-5])
    refused(r"found free.weight absent where that has \[4, 4\]", e=fewer)
    refused(r"found free.weight \[4, 5\] where that has \[4, 4\]", e=other)
    refused(
        r"expected b.weight \[19, 13\] as in the basis of domain 'math' \(Toy\), found \[19, 12\]",
        *wrong,
        kind=BasisError,
    )
    refused("expected b.weight in float32, bfloat16 or float16, found I8", e=whole)
    coarse = save(tmp_path / "fp8", {**a, "b.weight": a["b.weight"].to(torch.float8_e4m3fn)})
    refused("START: expected b.weight in float32, bfloat16 or float16, found torch.float8_e4m3fn", s=coarse)
    refused("END: expected finite numbers in b.weight", e=broken)
    refused("expected model.safetensors.*found pytorch_model.bin", e=tmp_path / "bin")
    refused("found no such file", e=index, kind=FileNotFoundError)
    refused("damaged or truncated", e=damaged)
    refused("expected a directory with safetensors", e=tmp_path / "nothing", kind=FileNotFoundError)
    refused("new or empty directory", o=tmp_path / "full", kind=FileExistsError)
    refused("at least one basis", g=[])
    refused("room: expected 0 < room <= 1, found 0", room=0)
    refused(
        "kind input, found block", g=[replace(given[0], info=replace(given[0].info, kind="block"))], kind=BasisError
    )
    refused("found 'math' twice", g=[given[0], given[0]], kind=BasisError)
    far = replace(given[1], info=replace(given[1].info, names=("other", *given[1].info.names[1:])))
    refused("expected the parameters of domain 'math', found another a.weight", g=[given[0], far], kind=BasisError)
    nowhere = save(tmp_path / "x", {"x": torch.zeros(3)}), save(tmp_path / "y", {"x": torch.zeros(3)})
    refused("expected embed.weight, which the basis of domain 'math'", *nowhere, kind=BasisError)
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith(".")} == set()


def test_bases_of_other_weights_are_named(two, tmp_path):
    start, end, a, _ = two
    given = bases()
    values = fingerprint.hash_parameters(a[name] for name in SHAPES)

    def of(basis, first, last):
        return replace(basis, info=replace(basis.info, start_hash=first, end_hash=last))

    chained = [of(given[0], "0", "1"), of(given[1], "1", values)]
    assert confine(start, end, chained, tmp_path / "1").warnings == []
    (warning,) = confine(start, end, [of(given[0], "0", "2"), of(given[1], values, values)], tmp_path / "2").warnings
    assert "domain 'math' was recorded on other weights (start 0, end 2)" in warning
    half = save(tmp_path / "half", {name: t.to(torch.bfloat16) for name, t in a.items()})
    upcast = fingerprint.hash_parameters(a[name].to(torch.bfloat16).float() for name in SHAPES)
    assert confine(half, end, [of(b, upcast, upcast) for b in given], tmp_path / "3").warnings == []


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_merge_sums_changes_off_the_other_domains(scale, tmp_path):
    start, _ = checkpoints()
    given = bases(domains=("math", "chat", "code"), overlap=0.5)
    ends = {name: checkpoints(seed=0)[0] for name in ("math", "chat")}
    for i, end in enumerate(ends.values()):
        for t in end.values():
            t += 0.1 * torch.randn(t.shape, generator=torch.Generator().manual_seed(7 * i))
    folders = {name: save(tmp_path / name, end, 1 + i) for i, (name, end) in enumerate(ends.items())}
    result = merge(save(tmp_path / "start", start, 2), folders, given, tmp_path / "out", scale, 1.0)
    found = load(tmp_path / "out")
    wanted = {name: t.double().numpy().copy() for name, t in start.items()}
    for domain, end in ends.items():
        others = [basis for basis in given if basis.info.domain != domain]
        for name, values in dense(start, end, others, 0.0, 1.0).items():
            wanted[name] += scale * (values - start[name].double().numpy())
    assert all(relative(found[name], wanted[name]) < 1e-6 for name in SHAPES)
    assert {n: list(e.domains) for n, e in result.experts.items()} == {
        "math": ["chat", "code"],
        "chat": ["math", "code"],
    }
    with pytest.raises(ValueError, match="expected a basis of domain 'law', found those of math, chat, code"):
        merge(tmp_path / "start", {"law": tmp_path / "math"}, given, tmp_path / "no")


def test_merge_of_one_expert_is_its_confinement(two, tmp_path):
    start, end, _, _ = two
    given = bases(domains=("math", "chat"))
    merge(start, {"math": end}, given, tmp_path / "merged")
    confine(start, end, given[1:], tmp_path / "confined", 0.0)
    one, other = load(tmp_path / "merged"), load(tmp_path / "confined")
    assert all(torch.allclose(one[name], other[name], atol=1e-6, rtol=0) for name in SHAPES)


def test_sums_of_others():
    rng = np.random.default_rng(0)
    start, ends = rng.standard_normal((5, 7)), rng.standard_normal((3, 5, 7))
    tensors = torch.from_numpy(start), [torch.from_numpy(e) for e in ends]
    wanted = start + 0.4 * (ends - start).sum(0)
    np.testing.assert_allclose(task_arithmetic(*tensors, 0.4).numpy(), wanted, atol=1e-6)
    change = ends - start
    for density in (0.2, 1.0):
        kept = np.stack(
            [np.where(np.abs(c) >= np.sort(np.abs(c).ravel())[::-1][round(density * 35) - 1], c, 0) for c in change]
        )
        sign = np.sign(kept.sum(0))
        same = (np.sign(kept) == sign) & (kept != 0)
        mean = np.where(same, kept, 0).sum(0) / np.maximum(same.sum(0), 1)
        np.testing.assert_allclose(ties(*tensors, 0.7, density).numpy(), start + 0.7 * mean, atol=1e-6)
    with pytest.raises(ValueError, match="0 < density <= 1"):
        ties(*tensors, density=0)


def test_commands(two, tmp_path):
    start, end, _, _ = two
    files = []
    for basis in bases():
        files.append(tmp_path / f"{basis.info.domain}.safetensors")
        basis.save(files[-1])

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == code, result.output
        return result

    text = run("confine", start, end, "--protect", *files, "--out", tmp_path / "out", "--bound", 0)
    assert "3 tensors corrected, 2 as they were" in text.stdout
    assert "along chat:" in text.stdout
    assert "not covered, moved freely" in text.stdout
    assert "warning: domain 'math' was recorded on other weights" in text.stderr
    told = json.loads(
        run(
            "confine",
            start,
            end,
            "--protect",
            files[0],
            "--protect",
            files[1],
            "--out",
            tmp_path / "2",
            "--json",
            "--bound",
            0,
        ).stdout
    )
    assert list(told["domains"]) == ["math", "chat"]
    assert all(torch.equal(t, load(tmp_path / "2")[n]) for n, t in load(tmp_path / "out").items())
    text = run("merge", start, f"math={end}", f"chat={end}", "--bases", *files, "--scale", 0.5, "--out", tmp_path / "3")
    assert "2 experts" in text.stdout
    failed = run("confine", start, end, "--protect", *files, "--out", tmp_path / "out", code=1)
    assert failed.stderr.startswith("carerl confine: ")
    assert "new or empty directory" in failed.stderr
    assert "expected NAME=END" in run("merge", start, end, "--bases", *files, "--out", tmp_path / "4", code=1).stderr
