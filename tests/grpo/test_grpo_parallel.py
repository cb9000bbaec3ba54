"""Two processes with FSDP2 train what one trains; killed, they go on as if nothing had been; pieces of it by themselves."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from carerl_kernels.grpo import GRPOConfig
from carerl_kernels.grpo.parallel import Ranks, layers
from carerl_kernels.grpo.sampling import Rollout, choose
from carerl_kernels.grpo.update import micro_batches
from processes import start, wait
from safetensors.torch import load_file

pytest.importorskip("transformers")
from trainer_worker import KILLED_AT, STAGES, mixed, redrawn, trainer, uneven

WORLD = 2
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")


def launch(scenarios: list[str], folder: Path) -> list[int | None]:
    """Exit codes of the processes that ran these scenarios."""
    return wait(
        [
            start("trainer_worker.main", scenarios, rank, WORLD, folder, log=folder / f"log-{scenarios[0]}-{rank}")
            for rank in range(WORLD)
        ]
    )


def log(folder: Path, scenarios: list[str]) -> str:
    return "\n".join((folder / f"log-{scenarios[0]}-{rank}").read_text()[-3000:] for rank in range(WORLD))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An uninterrupted run of two processes, one that is killed, and its copy before it goes on."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("parallel")
    first = ["whole", "bf16", "uneven", "redrawn", "mixed", "killed"]
    assert -signal.SIGKILL in launch(first, path), log(path, first)
    shutil.copytree(path / "killed", path / "elsewhere")
    codes = launch(["resumed"], path)
    assert codes == [0] * WORLD, log(path, ["resumed"])
    return path


def metrics(path: Path) -> list[dict]:
    lines = [json.loads(text) for text in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def final(path: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((path / "checkpoints").iterdir())[-1] / "model.safetensors")


def assert_close(a, b, where=""):
    """Numbers to 1e-5, everything else exactly."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_close(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5), where
    else:
        assert a == b, where


def assert_same_run(path: Path, other: Path) -> None:
    for mine, theirs in zip(metrics(path), metrics(other), strict=True):
        assert_close(mine, theirs)
    ours, others = final(path), final(other)
    assert max(float((ours[n] - others[n]).abs().max()) for n in others) < 1e-5


def test_two_processes_equal_one(folder, tmp_path):
    """Rewards, lengths, losses, weights, what the guard recorded; a guarded stage, a KL term, uneven shares of prompts."""
    run = trainer(tmp_path / "single", 1)
    run.run(STAGES)
    assert_same_run(folder / "whole", tmp_path / "single")
    reports = [
        json.loads((p / "bases" / "code.report.json").read_text()) for p in (folder / "whole", tmp_path / "single")
    ]
    assert_close(*[report["domains"] for report in reports])
    reloaded = load_file(folder / "whole" / "model" / "model.safetensors")
    assert all(torch.equal(final(folder / "whole")[n], reloaded[n]) for n in reloaded)
    settings = json.loads((folder / "whole" / "model" / "config.json").read_text())
    assert settings["architectures"] == ["Qwen3ForCausalLM"]


def test_uneven_shares_and_edited_gradients_equal_one_process(folder, tmp_path):
    """PCGrad's inner products are of the whole gradients; minibatches and evaluations leave a process without rows."""
    uneven(tmp_path / "single", 1)
    assert_same_run(folder / "uneven", tmp_path / "single")


def test_prompts_drawn_anew_are_those_of_one_process(folder, tmp_path):
    """Prompts keep their processes, and those that agree are found from all rewards."""
    redrawn(tmp_path / "single", 1)
    assert_same_run(folder / "redrawn", tmp_path / "single")


def test_a_guarded_mixed_stage_equals_one_process(folder, tmp_path):
    """Two processes pass domain by domain over their shards, one looks at every row of a single pass."""
    mixed(tmp_path / "single", 1)
    assert_same_run(folder / "mixed", tmp_path / "single")
    for name in ("code", "chat", "math"):
        a, b = (
            load_file(run / "bases" / "chat+code+math" / f"{name}.safetensors")
            for run in (folder / "mixed", tmp_path / "single")
        )
        assert a.keys() == b.keys()


def test_killed_processes_go_on_bit_by_bit(folder):
    assert metrics(folder / "killed") == metrics(folder / "whole")
    ours, theirs = final(folder / "killed"), final(folder / "whole")
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    for name in ("code", "chat+code"):
        a, b = (load_file(folder / run / "bases" / f"{name}.safetensors") for run in ("killed", "whole"))
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_run_goes_on_with_another_number_of_processes(folder):
    """Checkpoints hold whole tensors: what two processes saved in the middle of a recorded stage, one continues."""
    assert metrics(folder / "elsewhere")[-1]["step"] == KILLED_AT
    trainer(folder / "elsewhere", 1).run(STAGES, resume=True)
    assert_same_run(folder / "elsewhere", folder / "whole")


def test_bf16_trains_float32_weights(folder):
    lines = metrics(folder / "bf16")
    assert [line["step"] for line in lines] == list(range(5))
    assert all(line["sampler_gap"] < 0.1 for line in lines[1:])
    assert all(t.dtype == torch.float32 for t in final(folder / "bf16").values())


def test_a_prompt_for_every_process(monkeypatch):
    from carerl_kernels.grpo import learner

    monkeypatch.setattr(learner.Ranks, "of", lambda model: Stand(2))
    with pytest.raises(ValueError, match="one prompt per process and step, found prompts_per_step=1 for 2 processes"):
        trainer(None, 1, guarded=False, prompts_per_step=1)


def test_processes_that_each_have_the_whole_model_are_refused(monkeypatch):
    """As torchrun starts them, and in a process group."""
    expected = "spread over the 2 processes, found all of it in this one"
    with monkeypatch.context() as launched:
        launched.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match=expected):
            trainer(None, 1, guarded=False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *group: 2)
    with pytest.raises(ValueError, match=expected):
        trainer(None, 1, guarded=False)


def test_a_mesh_of_two_dimensions_is_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = fully_shard(torch.nn.Linear(3, 2), mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b")))
        with pytest.raises(ValueError, match=r"a mesh of one dimension .* found one of \(1, 1\) processes"):
            Ranks.of(model)
    finally:
        torch.distributed.destroy_process_group()


class Stand(Ranks):
    def __init__(self, size: int, rank: int = 0):
        self.size, self.rank, self.group = size, rank, None


def test_shares_cover_everything_once():
    for size, n in ((1, 4), (2, 5), (3, 3), (4, 9)):
        shares = [Stand(size, rank).share(n) for rank in range(size)]
        assert sorted(i for share in shares for i in share) == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def rollout(prompts: list[int], completions: list[int]) -> Rollout:
    def mask(lengths: list[int], left: bool) -> torch.Tensor:
        width = max(lengths)
        rows = [[0] * (width - n) + [1] * n if left else [1] * n + [0] * (width - n) for n in lengths]
        return torch.tensor(rows)

    p, c = mask(prompts, True), mask(completions, False)
    return Rollout(p, p, c, c, c.float(), c.float())


@pytest.mark.parametrize("budget", [1, 7, 12, 30, 1000])
@pytest.mark.parametrize("size", [0, 2])
def test_micro_batches_keep_the_token_budget(budget, size):
    generator = torch.Generator().manual_seed(budget)
    lengths = torch.randint(1, 6, (2, 17), generator=generator).tolist()
    batch = rollout(*lengths)
    rows = torch.arange(17)[torch.randperm(17, generator=generator)][:13]
    settings = GRPOConfig(micro_batch_tokens=budget, micro_batch_size=size)
    pieces = micro_batches(batch, rows, settings)
    assert sorted(i for piece in pieces for i in piece.tolist()) == sorted(rows.tolist())
    for piece in pieces:
        part = batch.select(piece)
        assert len(piece) == 1 or part.input_ids.numel() <= budget
        assert not size or len(piece) <= size
    if budget == 1000:
        assert len(pieces) == (7 if size else 1)
    assert micro_batches(batch, rows[:0], settings) == []


def test_inverse_cumulated_probability():
    logp = torch.tensor([[0.0, 0.2, 0.5, 0.3, 0.0]]).log().expand(6, 5)
    uniform = torch.tensor([0.0, 0.199, 0.2001, 0.699, 0.701, 1 - 2**-53], dtype=torch.float64)
    assert choose(logp, uniform).tolist() == [1, 1, 2, 2, 3, 3]  # never one of probability 0
    assert choose(logp - 3.0, uniform).tolist() == [1, 1, 2, 2, 3, 3]  # not normalised: after top-p


def test_layers_are_found_by_name_or_by_length():
    run = trainer(None, 1, guarded=False)
    assert [type(b).__name__ for b in layers(run.model)] == ["Qwen3DecoderLayer"] * 2
    listed = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    assert layers(torch.nn.Sequential(listed, torch.nn.Linear(2, 2))) == list(listed)
    assert layers(torch.nn.Linear(2, 2)) == []
