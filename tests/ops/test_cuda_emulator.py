"""The CUDA kernels under sanitisers and shuffled schedules, and whether the emulator would notice if they were wrong.

The conformance suite (test_ops_*.py, backend cuda-emulated) says that results are right; here is what it cannot see.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import subprocess
from pathlib import Path

import emulated
import pytest
from carerl_kernels import _files

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing())),
]
OPS = ("project", "gram", "edit", "rotate", "edit_rotate", "dacsp", "quantize_bases", "token_logprobs", "input")
SOURCES = emulated.ROOT / "csrc/kernels/cuda"
DRIVER = emulated.EMULATOR / "driver.cpp"


def driver(name: str, flags: list[str], kernels: list[Path] = emulated.KERNELS) -> Path:
    everything = [*emulated.FLAGS, "-DCARERL_FEW_REGISTERS", "-g1", *flags]  # as on sm_120; the op tests run the others
    objects = [(source, everything) for source in [*kernels, DRIVER]]
    objects += [(emulated.EMULATOR / "emulator.cpp", [*everything, "-O2"])]  # small, and where most of the time goes
    return emulated.build(name, objects, [*flags, "-pthread"])


def run(path: Path, *ops: str, **environment: str) -> subprocess.CompletedProcess:
    options = (
        "detect_leaks=0:detect_stack_use_after_return=0:use_sigaltstack=0"  # the last: else every jump clears a stack
    )
    environment = {**os.environ, "ASAN_OPTIONS": options, **environment}
    return subprocess.run([str(path), *ops], env=environment, capture_output=True, text=True, timeout=300)


def passed(child: subprocess.CompletedProcess) -> bool:
    return child.returncode == 0 and "all exact" in child.stdout


@pytest.fixture(scope="module")
def plain() -> Path:
    """The kernels of the op tests, compiled for those."""
    return emulated.build("driver", [*emulated.OBJECTS, (DRIVER, [*emulated.FLAGS, "-O0"])], ["-pthread"])


@pytest.mark.parametrize("seed", ["1", "2"])
def test_results_do_not_depend_on_the_schedule(plain, seed):
    for child in (
        run(plain, *OPS, CARERL_EMULATOR_SEED=seed),
        run(plain, "gram", CARERL_EMULATOR_SEED=seed, **SLOW_DOUBLES),
    ):
        assert passed(child), child.stderr


def test_launches_that_a_gpu_refuses_say_why(plain):
    """No kernel for its architecture, PTX that the driver cannot compile, a driver that is too old."""
    child = run(plain, "errors")
    assert passed(child), child.stderr


@functools.cache
def with_real_threads() -> Path:
    """Every CUDA thread a thread of the system, under ThreadSanitizer."""
    return driver("driver_tsan", ["-O0", "-fsanitize=thread", "-DEMULATOR_THREADS"])


@pytest.mark.behind(made=with_real_threads)
def test_threads_that_share_memory_meet_at_a_barrier():
    child = run(with_real_threads(), "project", "rotate", DRIVER_SMALL="1")
    assert passed(child), child.stderr[-3000:]


# ---------------------------------------------------------------------------------------------------------- mutations

MISTAKES = {  # in a file: what goes wrong, the text there, and the text that does it when MUTANT is true
    "project.cuh": [
        ("misaligned load", "begin + c * kChunk + lane * E::kWidth);\n", "begin + c * kChunk + lane * E::kWidth + MUTANT);\n"),
        ("read behind the rows", "rows[r] + x, n - x, aligned)", "rows[r] + x, MUTANT ? E::kWidth : n - x, aligned)"),
        ("write behind the tile", "kSmallestTile * kSmallestTile,\n", "kSmallestTile * kSmallestTile + MUTANT * 2048,\n"),
    ],
    "project_mma.cuh": [
        ("misaligned load", "(rows[r] + own + c * kChunk);", "(rows[r] + own + c * kChunk + MUTANT);"),
        ("read behind the rows", "rows[r] + x, n - x, aligned)", "rows[r] + x, MUTANT ? W : n - x, aligned)"),
        ("sums of another row", "row % 16 / 8 * 2 + b % 2;", "row % 16 / 8 * 2 + (b + MUTANT) % 2;"),
    ],
    "gram_float.cuh": [("a row of another scale", "power_of_two(254 - now)", "power_of_two(254 - now + MUTANT)")],
    "gram.cuh": [("rows run into each other", "pitch = tile + 4;", "pitch = tile + 4 - 8 * MUTANT;")],
    "edit.cuh": [
        ("read behind the rows", "plan.rows[r] * basis.stride, n, aligned)",
         "plan.rows[r] * basis.stride, MUTANT ? W : n, aligned)"),
        ("misaligned load", "plan.rows[r + i] * basis.stride);\n        } else",
         "plan.rows[r + i] * basis.stride + MUTANT);\n        } else"),
        ("write behind the gradient", "first + c, at), n, dense,\n", "first + c, at), MUTANT ? W : n, dense,\n"),
        ("votes of absent lanes", "__ballot_sync(kAllLanes, used)",
         "__ballot_sync(MUTANT ? kAllLanes >> lane : kAllLanes, used)"),
    ],
    "rotate.cuh": [
        ("misaligned load of the tile", "(stack + m * tile + x / 2);", "(stack + m * tile + x / 2 + MUTANT);"),
        ("write behind the rows", "column + x, n - x, sums[r], seed)", "column + x, MUTANT ? 8 : n - x, sums[r], seed)"),
    ],
    "reduce.cuh": [
        ("one slot too many", "slot < last; slot", "slot < last + MUTANT; slot"),
        ("lanes keep the wrong half", "upper ? values[i + kHalf] :", "upper != MUTANT ? values[i + kHalf] :"),
    ],
    "dacsp.cuh": [("few lanes sum", "for (int offset = 16;", "for (int offset = MUTANT ? 2 : 16;")],
    "strip.cuh": [
        ("read behind the matrix", "load<E>(p + down * stride, columns - x, aligned)",
         "load<E>(p + down * stride, MUTANT ? E::kWidth : columns - x, aligned)"),
        ("write beyond the outputs", "if (row >= rows || x >= columns) continue;",
         "if (row >= rows + MUTANT || x >= columns) continue;"),
        ("outputs that stay are written", "if (!moved[x + e]) continue;", "if (!moved[x + e] && !MUTANT) continue;"),
    ],
    "input.cuh": [
        ("x of another block of directions", "= kept[(block * kSums", "= kept[((MUTANT ? 0 : block) * kSums"),
        ("one number of a matrix is enough", "__ballot_sync(kAllLanes, broken[half]) & row",
         "__ballot_sync(kAllLanes, broken[half]) & row & (MUTANT ? 0x11111111u : ~0u)"),
    ],
    "quantize_bases.cuh": [("read behind the rows", "min64(begin + block, basis.stride)",
         "min64(begin + block, basis.stride + 16 * MUTANT)")],
    "token_logprobs.cuh": [("half a warp sums", "for (int offset = 16;", "for (int offset = MUTANT ? 8 : 16;")],
    "storage.cuh": [("alignment forgotten", "if (aligned && n >= E::kWidth)", "if ((aligned || MUTANT) && n >= E::kWidth)")],
}  # fmt: skip
NOTICED_BY = {"reduce.cuh": ("project",), "storage.cuh": ("project",), "rotate.cuh": ("rotate", "edit_rotate"),
              "strip.cuh": ("input",), "project_mma.cuh": ("project",), "gram_float.cuh": ("gram",)}  # fmt: skip
SLOW_DOUBLES = {"CARERL_EMULATED_FP64": "64"}  # of fp32's rate a 64th: `gram` then runs in pairs of fp32
BARRIER = "__syncthreads();"


def mutations() -> list[tuple[str, str]]:
    """(file, name): the mistakes above, and every barrier of every kernel left out."""
    found = [(file, name) for file, mistakes in MISTAKES.items() for name, _, _ in mistakes]
    for path in sorted(SOURCES.glob("*.cuh")):
        found += [(path.name, f"no barrier {i}") for i in range(path.read_text().count(BARRIER))]
    return found


MUTATIONS = mutations()


def mutable_copy() -> Path:
    """The kernels with all mutations in them, each behind a switch."""
    texts = {path.name: path.read_text() for path in SOURCES.iterdir()}
    for index, (file, name) in enumerate(MUTATIONS):
        switch = f"MUTANT({index})"
        if name.startswith("no barrier"):
            texts[file] = texts[file].replace(BARRIER, f"if (!{switch}) __syncthreads() ;", 1)
            continue
        right, wrong = next(m[1:] for m in MISTAKES[file] if m[0] == name)
        assert texts[file].count(right) == 1, f"{file}: {right!r} is there {texts[file].count(right)} times"
        texts[file] = texts[file].replace(right, wrong.replace("MUTANT", switch))
    texts |= {f"../{path.name}": path.read_text() for path in SOURCES.parent.glob("*.h")}  # shared with the CPU's
    key = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()[:16]
    copy = emulated.ROOT / "build/emulator" / f"mutable-{key}" / SOURCES.name
    copy.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if not (copy / name).exists():  # several test processes may be at it
            _files.write_atomically(copy / name, lambda path, text=text: Path(path).write_text(text))
    return copy


@functools.cache
def mutable() -> Path:
    """The kernels with all mutations, under AddressSanitizer and UBSan."""
    flags = [
        "-O0",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        f"-include{emulated.EMULATOR / 'mutant.h'}",
    ]
    return driver("driver_asan", flags, sorted(mutable_copy().glob("*.cu")))


@pytest.mark.behind(made=mutable)
@pytest.mark.parametrize(("op", "environment"), [*((op, {}) for op in OPS), ("gram", SLOW_DOUBLES)])
def test_no_undefined_behaviour(op, environment):
    """Every op, with aligned and unaligned inputs and tails; no mutation chosen."""
    child = run(mutable(), op, **environment)
    assert passed(child), child.stderr[-3000:]


@pytest.mark.behind(made=mutable)
@pytest.mark.parametrize(("file", "name"), MUTATIONS, ids=[f"{f}: {n}" for f, n in MUTATIONS])
def test_mistakes_are_noticed(file, name):
    """By one of the ops that run this file, on one of a few schedules."""
    chosen = {"CARERL_MUTANT": str(MUTATIONS.index((file, name)))} | (SLOW_DOUBLES if file == "gram_float.cuh" else {})
    ops = NOTICED_BY.get(file, (Path(file).stem,))
    schedules: list[dict[str, str]] = [{}, *({"CARERL_EMULATOR_SEED": seed} for seed in "123")]
    for op, schedule in itertools.product(ops, schedules):
        child = run(mutable(), op, **chosen, **schedule)
        if not passed(child):
            assert re.search("wrong result|emulator: |ERROR: AddressSanitizer|runtime error", child.stderr), (
                child.stderr
            )
            return
    pytest.fail("the emulator saw nothing wrong")
