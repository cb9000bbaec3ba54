"""Confined checkpoints of transformers models and PEFT adapters, loaded and run again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from carerl_kernels import BasisError
from carerl_kernels.cli import app
from carerl_kernels.guard.checkpoints import confine
from carerl_kernels.subspace import FactoredBasis
from checkpoint_helpers import load, observed
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}


def qwen(tied: bool = True, **more):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**SMALL, tie_word_embeddings=tied, **more)
    return transformers.Qwen3ForCausalLM(config).eval()


def moe():
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SMALL, **sizes)).eval()


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=32, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


PROMPTS = torch.tensor([[3, 1, 4, 1, 5, 9]])  # six vectors a layer: fewer than any layer has inputs


def train(model, frozen=(), steps: int = 5, lr: float = 3e-3) -> None:
    """Plainly, on other tokens."""
    for name, p in model.named_parameters():
        if any(part in name for part in frozen):
            p.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(10, 40, (4, 12), generator=draw)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def run(*arguments, code=0):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


@torch.no_grad()
def logits(model, ids=PROMPTS):
    return model(input_ids=ids).logits


def inputs_of(model, ids) -> dict[str, torch.Tensor]:
    """What every linear layer is fed, by the name of its weight."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
            handles.append(
                module.register_forward_hook(lambda m, a, o, n=name: seen.update({f"{n}.weight": a[0].flatten(0, -2)}))
            )
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return seen


def test_end_to_end_through_the_commands(tmp_path):
    """A tied model, saved, trained plainly, confined by the command, loaded: on protected prompts it is what it was."""
    model = qwen()
    model.save_pretrained(tmp_path / "start")
    basis = observed(model, [{"input_ids": PROMPTS}], "old", r=12)
    basis.save(tmp_path / "old.safetensors")
    before, other = logits(model), torch.arange(10, 40).view(3, 10)
    train(model, frozen=("embed", "norm"))
    trained, elsewhere = logits(model), logits(model, other)
    model.save_pretrained(tmp_path / "end", max_shard_size="20KB")
    run(
        "confine",
        tmp_path / "start",
        tmp_path / "end",
        "--protect",
        tmp_path / "old.safetensors",
        "--out",
        tmp_path / "out",
        "--room",
        1,
    )
    confined = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert confined.lm_head.weight is confined.model.embed_tokens.weight
    assert (trained - before).norm() > 0.05 * before.norm()
    assert (logits(confined) - before).norm() < 1e-5 * before.norm()
    assert (logits(confined, other) - elsewhere).norm() < 0.9 * (elsewhere - logits(qwen(), other)).norm()


@pytest.mark.parametrize("make", [qwen, gpt2])
def test_every_layer_maps_protected_inputs_as_it_did(make, tmp_path):
    """All parameters trained, embeddings and norms too; Conv1D and, untied, embeddings have their directions on the left."""
    model = make()
    model.save_pretrained(tmp_path / "start")
    basis, seen = observed(model, [{"input_ids": PROMPTS}], "old", r=12), inputs_of(model, PROMPTS)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    model.save_pretrained(tmp_path / "end")
    result = confine(tmp_path / "start", tmp_path / "end", [basis], tmp_path / "out", room=1.0)
    assert result.warnings == result.uncovered == []
    out = type(model).from_pretrained(tmp_path / "out")
    named = dict(out.named_parameters())
    for name, x in seen.items():
        name = name if name in named else next(n for n in named if "embed" in n or "wte" in n)  # lm_head, tied
        end, new, old = (w[name] for w in (dict(model.named_parameters()), named, first))
        turned = make is gpt2 and not name.endswith("wte.weight")
        wanted, found, moved = ((x @ w if turned else x @ w.mT) for w in (old, new, end))
        assert (found - wanted).norm() < 1e-5 * wanted.norm(), name
        assert (moved - wanted).norm() > 1e-3 * wanted.norm(), name
        assert not torch.equal(new, old)


def test_untied_embeddings_keep_the_rows_of_protected_tokens(tmp_path):
    model = qwen(tied=False)
    model.save_pretrained(tmp_path / "start")
    basis = observed(model, [{"input_ids": PROMPTS}], "old", r=12)
    rows = model.model.embed_tokens.weight.detach().clone()
    train(model)
    model.save_pretrained(tmp_path / "end")
    confine(tmp_path / "start", tmp_path / "end", [basis], tmp_path / "out", room=1.0)
    found = load(tmp_path / "out")["model.embed_tokens.weight"]
    assert torch.allclose(found[PROMPTS[0]], rows[PROMPTS[0]], atol=1e-7)
    untouched = [t for t in range(40) if t not in PROMPTS[0]]
    assert torch.allclose(found[untouched], load(tmp_path / "end")["model.embed_tokens.weight"][untouched], atol=1e-7)


@pytest.mark.parametrize("where", ["start", "end", "both"])
def test_a_tied_output_layer_that_files_name_too(where, tmp_path):
    model = qwen()
    model.save_pretrained(tmp_path / "start")
    basis = observed(model, [{"input_ids": PROMPTS}], "old", r=12)
    train(model)
    model.save_pretrained(tmp_path / "end")
    confine(tmp_path / "start", tmp_path / "end", [basis], tmp_path / "plain")
    for name in ("start", "end") if where == "both" else (where,):
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    result = confine(tmp_path / "start", tmp_path / "end", [basis], tmp_path / "out")
    plain, out = load(tmp_path / "plain"), load(tmp_path / "out")
    assert all(torch.equal(out[name], t) for name, t in plain.items())
    assert torch.equal(
        out.get("lm_head.weight", plain["model.embed_tokens.weight"]), plain["model.embed_tokens.weight"]
    )
    assert "lm_head.weight" not in result.uncovered
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_files_of_the_model_without_its_head(tmp_path):
    model = qwen()
    basis = observed(model, [{"input_ids": PROMPTS}], "old", r=12)
    model.model.save_pretrained(tmp_path / "start")
    train(model)
    model.model.save_pretrained(tmp_path / "end")
    model.save_pretrained(tmp_path / "whole")
    assert "layers.0.mlp.up_proj.weight" in load(tmp_path / "start")
    result = confine(tmp_path / "start", tmp_path / "end", [basis], tmp_path / "out")
    assert result.warnings == []
    qwen().save_pretrained(tmp_path / "first")
    confine(tmp_path / "first", tmp_path / "whole", [basis], tmp_path / "wanted")
    assert all(torch.equal(load(tmp_path / "wanted")[f"model.{name}"], t) for name, t in load(tmp_path / "out").items())


def expert_basis(model) -> FactoredBasis:
    """Directions of every expert but the last one, as if a stage had moved along them."""
    basis = observed(model, [{"input_ids": PROMPTS}], "old", r=12)
    draw = torch.Generator().manual_seed(0)
    for name in [name for name in basis.right if name.endswith("]")]:
        if name.endswith("[3]"):
            for by_name in (basis.right, basis.values, basis.moved):
                by_name.pop(name)
        else:
            basis.moved[name] = 0.01 * torch.randn(basis.moved[name].shape, generator=draw).double()
    return basis


def test_a_mixture_is_what_it_was_on_protected_prompts(tmp_path):
    model = moe()
    model.save_pretrained(tmp_path / "start")
    basis, before = observed(model, [{"input_ids": PROMPTS}], "old", r=12), logits(model)
    train(model, frozen=("embed", "norm", "lm_head"))
    model.save_pretrained(tmp_path / "end")
    confine(tmp_path / "start", tmp_path / "end", [basis], tmp_path / "out", room=1.0)
    out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (logits(model) - before).norm() > 0.05 * before.norm()
    assert (logits(out) - before).norm() < 1e-5 * before.norm()


@pytest.mark.parametrize("bound", [0.0, 0.5])
def test_experts_in_files_one_by_one_and_fused(bound, tmp_path, monkeypatch):
    """Files have gate_proj and up_proj of every expert; the model, and so the basis, has them all in one tensor."""
    model = moe()
    model.save_pretrained(tmp_path / "start")
    basis, first = expert_basis(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model)
    model.save_pretrained(tmp_path / "end")
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in load(tmp_path / "end")
    for folder, tensors in (("start", first), ("end", model.state_dict())):
        (tmp_path / f"fused-{folder}").mkdir()
        (tmp_path / f"fused-{folder}" / "config.json").write_text((tmp_path / folder / "config.json").read_text())
        save_file(
            {n: t.clone() for n, t in tensors.items()},
            tmp_path / f"fused-{folder}" / "model.safetensors",
            {"format": "pt"},
        )
    apart = confine(tmp_path / "start", tmp_path / "end", [basis], tmp_path / "out", bound, 1.0)
    fused = confine(tmp_path / "fused-start", tmp_path / "fused-end", [basis], tmp_path / "fused", bound, 1.0)
    one = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    other = load(tmp_path / "fused")
    assert all(torch.allclose(one[name], t, atol=1e-6, rtol=0) for name, t in other.items())
    assert apart.remained == pytest.approx(fused.remained, rel=1e-5)
    assert apart.domains["old"].before == pytest.approx(fused.domains["old"].before, rel=1e-5)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for e in range(4):
        moved = (model.state_dict()[name][e] - one[name][e]).norm()
        assert (moved > 0) == (e < 3)
        if e < 3 and not bound:
            assert ((one[name][e] - first[name][e]) @ basis.right[f"{name}[{e}]"]).abs().max() < 1e-6
    assert any("experts.3." in n for n in apart.uncovered)
    monkeypatch.setattr("carerl_kernels.subspace.correspond.model_of", lambda weights: None)
    with pytest.raises(BasisError, match=r"expected model.layers.0.mlp.experts.gate_up_proj\[0\], which the basis"):
        confine(tmp_path / "start", tmp_path / "end", [basis], tmp_path / "no")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_load_again(dtype, tmp_path):
    model = qwen().to(dtype)
    model.save_pretrained(tmp_path / "start")
    basis = observed(qwen(), [{"input_ids": PROMPTS}], "old", r=12)
    model.float()
    train(model, frozen=("embed", "norm"))
    model.to(dtype).save_pretrained(tmp_path / "end")
    result = confine(tmp_path / "start", tmp_path / "end", [basis], tmp_path / "out", room=1.0)
    out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert out.dtype == dtype
    assert result.domains["old"].after < 0.02 * result.domains["old"].before


# ------------------------------------------------------------------------------------------------------------------ adapters


def adapter(model, steps: int = 5, **settings):
    peft = pytest.importorskip("peft")
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{**defaults, **settings}))
    train(wrapped, steps=steps, lr=1e-2)
    return wrapped.eval()


def load_adapter(folder, make=qwen):
    from peft import PeftModel

    return PeftModel.from_pretrained(make(), folder).eval()


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (qwen, {}),
        (qwen, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
        (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
        (qwen, {"target_modules": ["q_proj", "lm_head"]}),
        (lambda: qwen(tied=False), {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    ],
)
def test_an_adapter_adds_nothing_on_protected_prompts(make, settings, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "start")
    basis = observed(model, [{"input_ids": PROMPTS}], "old", r=12)
    before = logits(model)
    trained = adapter(model, **settings)
    moved, other = (logits(trained) - before).norm() / before.norm(), torch.arange(10, 40).view(3, 10)
    trained.save_pretrained(tmp_path / "end")
    result = confine(tmp_path / "start", tmp_path / "end", [basis], tmp_path / "out", room=1.0)
    assert result.uncovered == []
    out = load_adapter(tmp_path / "out", make)
    assert moved > 0.02
    assert (logits(out) - before).norm() < 1e-5 * before.norm()
    assert (logits(out, other) - logits(make(), other)).norm() > 0.1 * (
        logits(trained, other) - logits(make(), other)
    ).norm()
    energy = dict.fromkeys(("end", "out"), 0.0)
    for name in energy:  # B A of every layer, from PEFT's own sums
        merged, base = load_adapter(tmp_path / name, make).merge_and_unload(), dict(make().named_parameters())
        energy[name] = sum(float((p - base[n]).detach().double().square().sum()) for n, p in merged.named_parameters())
    assert result.norm == pytest.approx(energy["end"] ** 0.5, rel=1e-4)
    assert result.remained == pytest.approx(energy["out"] / energy["end"], rel=1e-4)
    assert all(torch.equal(t, load(tmp_path / "end")[n]) for n, t in load(tmp_path / "out").items() if "lora_B" in n)
    again = confine(tmp_path / "start", tmp_path / "out", [basis], tmp_path / "again", room=1.0)
    assert again.corrected == []


def test_whole_modules_beside_an_adapter_are_confined(tmp_path):
    model = qwen(tied=False)
    model.save_pretrained(tmp_path / "start")
    basis, head = observed(model, [{"input_ids": PROMPTS}], "old", r=12), model.lm_head.weight.detach().clone()
    x = inputs_of(model, PROMPTS)["lm_head.weight"]
    adapter(model, modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path / "end")
    result = confine(tmp_path / "start", tmp_path / "end", [basis], tmp_path / "out", room=1.0)
    key = "base_model.model.lm_head.weight"
    assert key in result.corrected
    assert torch.allclose(x @ load(tmp_path / "out")[key].mT, x @ head.mT, atol=1e-5)
    assert not torch.allclose(x @ load(tmp_path / "end")[key].mT, x @ head.mT, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_adapters_of_another_form_are_refused(settings, message, tmp_path):
    model = qwen()
    model.save_pretrained(tmp_path / "start")
    basis = observed(model, [{"input_ids": PROMPTS}], "old", r=12)
    adapter(model, steps=1, **settings).save_pretrained(tmp_path / "end")
    with pytest.raises(
        ValueError, match=f"adds B A to the weights of its model, found one with .*{message}.*merge_and_unload"
    ):
        confine(tmp_path / "start", tmp_path / "end", [basis], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_another_model_are_refused(tmp_path):
    model = qwen()
    basis = observed(model, [{"input_ids": PROMPTS}], "old", r=12)
    model.save_pretrained(tmp_path / "start")
    adapter(gpt2(), target_modules=["c_attn"], fan_in_fan_out=True).save_pretrained(tmp_path / "end")
    with pytest.raises(ValueError, match=r"expected adapters of layers in .*start, found base_model"):
        confine(tmp_path / "start", tmp_path / "end", [basis], tmp_path / "out")
    with pytest.raises(ValueError, match="expected the model that the adapter was trained on as start"):
        confine(tmp_path / "end", tmp_path / "end", [replace(basis)], tmp_path / "out")
