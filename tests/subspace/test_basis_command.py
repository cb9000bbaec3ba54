"""`carerl basis`: inspect, validate, merge, quantize, plan; and the functions behind it."""

from __future__ import annotations

import json
from typing import get_args

import numpy as np
import pytest
import torch
from carerl_kernels import BasisError, CapabilityGuard, DomainBasis, basis_command
from carerl_kernels._ops import BASIS_DTYPES
from carerl_kernels.cli import app
from carerl_kernels.guard.report import bytes_held
from carerl_kernels.guard.validate import validate
from carerl_kernels.subspace import StoredBasis
from carerl_kernels.subspace.kinds import KINDS
from carerl_kernels.subspace.layout import Kind
from carerl_kernels.subspace.merge import merge
from carerl_kernels.subspace.plan import plan
from factored_helpers import make_factored
from guard_helpers import dense, make_history, make_model
from typer.testing import CliRunner

K, R = 4, 3


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, ["basis", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


@pytest.fixture
def stages(tmp_path):
    """Two recorded stages of every kind, as files."""
    out = {}
    for kind in ("flat", "per_matrix", "block", "input"):
        model = make_model()
        guard = CapabilityGuard(model, "remove", basis=kind, **({"k": K} if "block" != kind != "input" else {"r": R}))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        guard.attach(optimizer)
        for number, name in enumerate(("math", "chat")):
            out[kind, name] = tmp_path / f"{kind}-{name}.safetensors"
            with guard.stage(name, path=out[kind, name]):
                for step in range(8):
                    loss(model, 100 * number + step).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        out[kind, "model"] = model
    return out


def loss(model, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 13, generator=generator)
    target = torch.randn(13, 3, generator=torch.Generator().manual_seed(seed // 100))
    return (model(x) - x @ target).square().mean()


@pytest.mark.parametrize("kind", ["flat", "per_matrix", "block", "input"])
def test_inspect_and_quantize(kind, stages, tmp_path):
    math, chat = stages[kind, "math"], stages[kind, "chat"]
    facts = json.loads(invoke("inspect", math, chat, "--json"))
    assert [f["domain"] for f in facts] == ["math", "chat"]
    assert facts[1]["follows"] == ["math"] and facts[0]["follows"] == []
    assert all(f["orthonormality"] < 1e-5 and f["steps"] == 8 and f["parameters"] == 262 for f in facts)
    text = invoke("inspect", math, chat)
    assert f"domain chat, {kind}, k = " in text and "follows math" in text
    small = tmp_path / "small.safetensors"
    assert "was" in invoke("quantize", math, "--out", small)
    assert json.loads(invoke("inspect", small, "--json"))[0]["dtype"] == (
        "int8" if "block" != kind != "input" else "bfloat16"
    )
    CapabilityGuard.load(small, model=stages[kind, "model"])


def test_merge_of_rows_holds_the_leading_energy_of_the_union(stages, tmp_path):
    for kind in ("flat", "per_matrix"):
        files = [stages[kind, name] for name in ("math", "chat")]
        out = tmp_path / f"{kind}.safetensors"
        assert "domain math+chat" in invoke("merge", *files, "--out", out)
        merged, parts = DomainBasis.load(out), [DomainBasis.load(f) for f in files]
        model = stages[kind, "model"]
        rows = [dense(b.directions, model, kind, K) for b in (*parts, merged)]
        for t, (a, b, c) in enumerate(zip(*rows, strict=True)):
            weighted = np.concatenate(
                [s.singular_values[t].numpy()[:, None] * u for s, u in zip(parts, (a, b), strict=True)]
            )
            best = np.linalg.svd(weighted, compute_uv=False)[:K]
            np.testing.assert_allclose(merged.singular_values[t], best, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(np.square(weighted @ c.T).sum(), np.square(best).sum(), rtol=1e-5)
            np.testing.assert_allclose(c @ c.T, np.eye(K), atol=1e-5)
            moved = sum(s.displacement[t].numpy() @ u for s, u in zip(parts, (a, b), strict=True))
            np.testing.assert_allclose(merged.displacement[t], c @ moved, atol=1e-5)  # oriented: never negative
        guard = CapabilityGuard.load(out, model=model)
        assert guard.history == ["math+chat"]


def test_merge_of_factors_holds_both_changes(stages, tmp_path):
    model = make_model()
    _, bases = make_factored(model, "block", R, 0.4)
    merged = merge(bases, "both", 2 * R)
    for name in merged.moved:
        change = sum(b.left[name].double() @ b.moved[name] @ b.right[name].double().mT for b in bases)
        U, V = merged.left[name].double(), merged.right[name].double()
        torch.testing.assert_close(U @ merged.moved[name] @ V.mT, change, atol=1e-5, rtol=1e-4)
    assert merge(bases, "both").info.k == R
    for kind in ("block", "input"):
        out = tmp_path / f"{kind}.safetensors"
        invoke("merge", stages[kind, "math"], stages[kind, "chat"], "--out", out, "--domain", "old")
        assert CapabilityGuard.load(out, model=stages[kind, "model"]).history == ["old"]


def test_merging_a_basis_with_itself_changes_nothing():
    model = make_model()
    (basis,) = make_history(model, "flat", K, 0.0, names=("math",))
    again = merge([basis, basis], "math")
    projector = basis.directions.mT @ basis.directions
    torch.testing.assert_close(again.directions.mT @ again.directions, projector, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.displacement.norm(), 2 * basis.displacement.norm(), rtol=1e-5, atol=0)


def test_merge_refuses_what_does_not_belong_together(stages):
    flat, block = StoredBasis.load(stages["flat", "math"]), StoredBasis.load(stages["block", "math"])
    with pytest.raises(BasisError, match="expected at least two bases, found 1"):
        merge([flat], "x")
    with pytest.raises(BasisError, match=r"expected a flat basis over the parameters of domain 'math', found .* block"):
        merge([flat, block], "x")
    message = invoke("merge", stages["flat", "math"], stages["block", "chat"], "--out", "x", code=1)
    assert "carerl basis merge: merge: expected a flat basis" in message
    assert "does not exist" in invoke("inspect", "absent.safetensors", code=1)


@pytest.mark.parametrize("kind", ["flat", "per_matrix", "block", "input"])
def test_validation_tells_a_basis_of_the_domain_from_random_directions(kind, stages):
    from carerl_kernels.subspace.random_basis import random_basis

    # A wide model, because in a small one random directions hold much of anything.
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(400, 60), torch.nn.Tanh(), torch.nn.Linear(60, 3))
    mixing = torch.randn(5, 400) / 5

    def domain_loss(seed):
        x = torch.randn(32, 5, generator=torch.Generator().manual_seed(seed)) @ mixing
        return (model(x) - x[:, :3]).square().mean()

    guard = CapabilityGuard(model, basis=kind, **({"k": 6} if "block" != kind != "input" else {"r": 6}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    guard.attach(optimizer)
    with guard.stage("math"):
        for step in range(12):
            optimizer.zero_grad()
            domain_loss(step).backward()
            optimizer.step()
    kept = [p.grad.clone() for p in model.parameters()]
    fresh = [lambda s=s: domain_loss(1000 + s) for s in range(8)]
    good = validate(guard.basis("math"), model, fresh)
    assert good.verdict == "functional" and good.low <= good.explained <= good.high
    assert good.explained > 5 * good.random
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), kept, strict=True))  # put back
    blind = random_basis(guard.layout, seed=7)
    assert validate(blind, model, fresh, seed=8).verdict != "functional"
    with pytest.raises(ValueError, match="at least 3 losses"):
        validate(guard.basis("math"), model, fresh[:2])
    with pytest.raises(ValueError, match="finite gradient other than zero"):
        validate(guard.basis("math"), model, [lambda: 0.0 * domain_loss(0)] * 3)


def test_validate_command_on_a_language_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<eos>", *"abcdefgh:> "])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    config = transformers.Qwen3Config(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config)
    guard = CapabilityGuard(model, basis="block", r=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard.attach(optimizer)
    with guard.stage("code", path=tmp_path / "code.safetensors"):
        ids = torch.randint(2, 10, (4, 6))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [json.dumps({"prompt": f"{a}:{b}>", "answer": b + a}) for a in "abcd" for b in "efgh"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    arguments = (tmp_path / "code.safetensors", "--model", tmp_path / "model", "--prompts", tmp_path / "prompts.jsonl")
    found = json.loads(invoke("validate", *arguments, "--batch", 4, "--json"))
    assert found["gradients"] == 4 and found["verdict"] in ("functional", "weak", "chance")
    assert 0 <= found["low"] <= found["explained"] <= found["high"] <= 1
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    assert "line 1: expected" in invoke("validate", *arguments, code=1)


CONFIGS = {  # as published with the checkpoints
    "qwen2.5-7b": {
        "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
    },
    "qwen3-4b": {
        "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": True,
    },
}  # fmt: skip


def test_every_kind_and_storage_is_known():
    assert list(get_args(Kind)) == list(KINDS)
    assert {getattr(torch, storage) for storage in get_args(basis_command.Storages)} == set(BASIS_DTYPES)


def test_plans_of_published_models(tmp_path):
    pytest.importorskip("transformers")
    for name, count in (("qwen2.5-7b", 7.616e9), ("qwen3-4b", 4.022e9)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(CONFIGS[name]))
        plans = {
            p["kind"]: p
            for p in json.loads(
                invoke("plan", path, "--domains", 3, "--rank", 8, "--k", 8, "--world-size", 8, "--json")
            )
        }
        assert plans["block"]["parameters"] == pytest.approx(count, rel=1e-3)
        flat = plans["flat"]
        assert flat["directions"] == pytest.approx(3 * 8 * count * 2 / 8, rel=1e-3)  # bf16, an eighth each
        assert plans["block"]["directions"] < 0.01 * flat["directions"]
        assert plans["block"]["covered"] > 0.999 * count
        assert plans["input"]["communicated"] < plans["block"]["communicated"] or name == "qwen2.5-7b"
    text = invoke("plan", tmp_path / "qwen2.5-7b.json", "--kind", "block", "--world-size", 8)
    assert "Qwen2ForCausalLM, 7.62e9 parameters; 3 domains on 8 GPUs" in text and "block 16" in text
    assert "nothing there" in invoke("plan", tmp_path / "absent.json", code=1)
    (tmp_path / "bad.json").write_text('{"model_type": "none of these"}')
    assert "known model_type" in invoke("plan", tmp_path / "bad.json", code=1)


@pytest.mark.parametrize("kind", ["flat", "per_matrix", "block", "input"])
def test_plan_equals_what_a_guard_really_holds(kind):
    model = make_model()
    size = K if "block" != kind != "input" else R
    guard = CapabilityGuard(model, basis=kind, **({"k": K} if size == K else {"r": R}))
    if size == K:
        for basis in make_history(model, kind, K, 0.3):
            guard.add(basis)
    else:
        for basis in make_factored(model, kind, R, 0.3)[1]:
            guard.add(basis)
    planned = plan(model, kind, size, domains=2)
    stack = guard.stack
    if size == K:
        assert planned.directions == stack.bases.nbytes
        kept = stack.bases.nbytes + stack.overlap.nbytes
    else:
        factors = sum(t.nbytes for t in (*stack.factors["left"], *stack.factors["right"]) if t is not None)
        kept = planned.directions
        assert kept == factors * (2 if kind == "input" else 1)  # and orthonormal, as they act together
    if kind == "input":
        guard.confine_()
    for own in (None, "math", "chat") if kind != "input" else ():
        stack.frame(own)
    assert planned.covered == guard.layout.covered
    # Masks, reaches and spectra count, too: in a model as small as this they are a sizeable part.
    assert bytes_held(stack) - kept <= 2 * planned.cores + planned.state
    assert bytes_held(stack) - kept >= 0.4 * planned.cores


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    pytest.importorskip("transformers")
    from carerl_kernels.tasks.characters import character_tokenizer, tiny_model

    folder = tmp_path_factory.mktemp("model")
    tokenizer = character_tokenizer()
    tiny_model(tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(5)]
    path.write_text("\ufeff" + "\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("answers", ["model", "given", "none"])
def test_record_from_a_finished_model(answers, small_model, prompts, tmp_path):
    """The file is a basis like any other: it loads into a guard of the model, which nothing has trained."""
    from transformers import AutoModelForCausalLM

    out = tmp_path / "chat.safetensors"
    options = (
        "--domain",
        "chat",
        "--out",
        out,
        "--answers",
        answers,
        "--r",
        8,
        "--batch-size",
        2,
        "--max-new-tokens",
        4,
    )
    found = json.loads(invoke("record", small_model, "--prompts", prompts, *options, "--json"))
    assert (
        found["prompts"] == 5 and found["covered"] > 0.9 and 0 < found["energy"] <= 1 and 1 <= found["mean_rank"] <= 8
    )
    tokens = {"none": 20, "given": 20 + 5 + 5}  # 4 characters a prompt; of an answer one, and the end
    assert found["tokens"] == tokens.get(answers, found["tokens"]) and found["tokens"] >= 20
    model = AutoModelForCausalLM.from_pretrained(small_model)
    guard = CapabilityGuard.load(out, model=model)
    info = StoredBasis.load(out).info
    assert guard.history == ["chat"] and info.displacement_capture is None and info.start_hash == info.end_hash
    assert guard.report()["open_windows"] == []
    assert "no stage: shown prompts" in invoke("inspect", out)
    text = invoke("record", small_model, "--prompts", prompts, *options)
    assert "directions each (at most 8) hold" in text


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ("", (), "at least one row"),
        ('{"prompt": "a"}\n{"prompt"', (), "line 2: expected a JSON object"),
        ('{"question": "a"}', (), 'line 1: expected "prompt"'),
        ('{"prompt": "1"}', ("--answers", "given"), "line 1: expected a text in 'answer'"),
        ('{"prompt": [{"role": "user", "content": "1"}]}', (), "a tokenizer with a chat template"),
        ('{"prompt": "1"}', ("--energy", "0"), "0 < energy <= 1"),
        ('{"prompt": "1"}', ("--device", "moon"), "expected a device that is there"),
        ('{"prompt": "1"}', ("--out", "nowhere/a.safetensors"), "expected a folder to write into"),
    ],
)
def test_record_refuses_in_one_sentence(rows, options, message, small_model, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(rows)
    out = ("--out", tmp_path / "a.safetensors", "--domain", "a", "--answers", "none")
    output = invoke("record", small_model, "--prompts", path, *out, *options, code=1)
    assert message in " ".join(output.split()) and "Traceback" not in output
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("kind", ["flat", "block", "input"])
@pytest.mark.parametrize("damage", ["nan", "zero", "scalar"])
def test_files_without_usable_directions_do_not_load(kind, damage, stages, tmp_path):
    """Not finite, all zero, or of no dimension: an error that names the file, where the guard would protect nothing."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(stages[kind, "math"], framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "checksum"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key in [k for k in tensors if k.startswith(("directions", "left", "right", "values"))]:
        if damage == "nan" and key.startswith(("directions", "values")):
            tensors[key].view(-1)[0] = torch.nan
        elif damage == "zero":
            tensors[key].zero_()
        elif damage == "scalar":
            tensors[key] = torch.tensor(1.0, dtype=tensors[key].dtype)
    path = tmp_path / "damaged.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(BasisError, match=r"damaged\.safetensors") as error:
        StoredBasis.load(path)
    if damage == "zero":
        assert "'math' has no directions" in str(error.value)
