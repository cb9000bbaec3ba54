"""A look at a model sees the inputs of every covered weight, however the weight is used."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from carerl_kernels.subspace.moments import EXACT, Accumulator
from observe_helpers import SIZES, Inputs, assert_leading, laid_out, look, second
from torch import nn
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")


def ids(batch=3, length=9, vocabulary=60, seed=0):
    return torch.randint(1, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def qwen3(tied):
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=tied))


def gpt2():
    size = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))


def moe(experts="eager"):
    more = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES, **more))
    model.set_experts_implementation(experts)
    return model


def adapters(model, **more):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **more))
    for name, p in model.named_parameters():  # B is zero in the beginning
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


def check(model, batches, call, covered=0.9):
    """Every matrix has the directions of all that its module was given."""
    model.eval()
    inputs = Inputs(model)
    with torch.no_grad():
        for batch in batches:
            call(model, batch)
    inputs.close()
    moments, basis, layout = look(model, batches)
    assert layout.covered / layout.parameters >= covered
    for name, values in basis.values.items():
        assert values[0] > 0, name
    for name in inputs.rows:
        if name in basis.values:
            side = "left" if name in basis.left else "right"
            columns = getattr(basis, side)[name]
            assert_leading(columns, basis.values[name], inputs.second(name), layout.k)
    for name, tokens in inputs.tokens.items():
        if name in basis.left:
            counts = torch.bincount(torch.cat(tokens), minlength=basis.left[name].shape[0])
            most = counts.sort(descending=True)[0][: layout.k].double()
            torch.testing.assert_close(basis.values[name].square(), most)
    return moments, basis, layout


def by_name(model, batch):
    return model(**batch)


@pytest.mark.parametrize("make", [lambda: qwen3(False), lambda: qwen3(True), gpt2, moe, lambda: adapters(qwen3(False))])
def test_language_models(make):
    torch.manual_seed(0)
    check(make(), [{"input_ids": ids(seed=s)} for s in range(3)], by_name)


class ByHand(nn.Module):
    """Experts as Qwen3-MoE has them, written down with what goes into each."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts
        self.seen: dict[str, dict[int, list]] = {"gate_up_proj": {}, "down_proj": {}}

    def forward(self, hidden, index, weights):
        out = torch.zeros_like(hidden)
        gate_up, down = self.experts.gate_up_proj, self.experts.down_proj
        for e in index.unique().tolist():
            token, place = torch.where(index == e)
            x = hidden[token]
            gate, up = (x @ gate_up[e].mT).chunk(2, dim=-1)
            y = F.silu(gate) * up
            self.seen["gate_up_proj"].setdefault(e, []).append(x.double())
            self.seen["down_proj"].setdefault(e, []).append(y.double())
            out.index_add_(0, token, (y @ down[e].mT) * weights[token, place, None])
        return out


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("padded", [False, True])
def test_fused_experts_slice_by_slice(experts, padded):
    """Each expert has the inputs that the router sent it; padding is sent, too, and does not count."""
    torch.manual_seed(0)
    model = moe(experts).eval()
    batch = {"input_ids": ids(4, 7), "attention_mask": torch.ones(4, 7, dtype=torch.long)}
    if padded:
        batch["attention_mask"][:2, 4:] = 0
        batch["input_ids"][:2, 4:] = 0
    twin = copy.deepcopy(model)
    layers = [ByHand(layer.mlp.experts) for layer in twin.model.layers]
    for layer, by_hand in zip(twin.model.layers, layers, strict=True):
        layer.mlp.experts = by_hand
    keep = batch["attention_mask"].bool()
    with torch.no_grad():  # without padding, sequence by sequence
        for row, mask in zip(batch["input_ids"], keep, strict=True):
            twin(input_ids=row[mask].unsqueeze(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moments, basis, layout = look(model, [batch])
    seen = 0
    for number, by_hand in enumerate(layers):
        for what, experts_ in by_hand.seen.items():
            for e, rows in experts_.items():
                name = f"model.layers.{number}.mlp.experts.{what}[{e}]"
                X = torch.cat(rows)
                seen += 1
                want = X.mT @ X
                atol = 1e-5 * float(want.abs().max())
                torch.testing.assert_close(second(moments, name, "right"), want, rtol=1e-4, atol=atol)
                assert_leading(basis.right[name], basis.values[name], want, layout.k)
    assert seen + len(without_directions(basis)) == 2 * 2 * 4


def test_experts_without_tokens_are_counted_and_no_error():
    torch.manual_seed(0)
    model = moe("grouped_mm")
    _, basis, _ = look(model, [{"input_ids": ids(1, 1)}])
    assert len(without_directions(basis)) == 2 * 2 * 2  # two of four experts in two layers, two weights each


def without_directions(basis):
    return [name for name, values in basis.values.items() if not values.any()]


@pytest.mark.parametrize("kind", ["grouped_mm", "eager"])
def test_adapters_on_experts_that_are_added_to_the_weight_before_use(kind):
    """A gets what goes into its expert, B what A makes of it, in the columns of that expert."""
    torch.manual_seed(0)
    more = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    model = adapters(moe(kind), **more).eval()
    batch = {"input_ids": ids(4, 7)}
    moments, basis, layout = look(model, [batch])
    assert layout.covered == layout.parameters and not without_directions(basis)
    merged = copy.deepcopy(model).merge_and_unload()  # the same weights in place: what goes into them is the same
    for p in merged.parameters():
        p.requires_grad_(True)
    found, _, _ = look(merged, [batch])
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        pieces = {
            what: [second(found, f"{path}.{what}[{e}]", "right") for e in range(4) if found.saw(f"{path}.{what}[{e}]")]
            for what in ("gate_up_proj", "down_proj")
        }
        wrapped = {
            name: p for name, p in model.named_parameters() if f"layers.{layer}.mlp.experts" in name and p.requires_grad
        }
        for what, inner in (("gate_up_proj", 32), ("down_proj", 16)):
            (a,) = [n for n, p in wrapped.items() if "lora_A" in n and p.shape[1] == inner]
            (b,) = [n for n, p in wrapped.items() if n == a.replace("lora_A", "lora_B")]
            torch.testing.assert_close(
                second(moments, a, "right"), torch.stack(pieces[what]).sum(0), rtol=1e-3, atol=1e-4
            )
            A = wrapped[a].detach().double()
            expected = torch.zeros(16, 16, dtype=torch.float64)
            for e in range(4):
                name = f"{path}.{what}[{e}]"
                if found.saw(name):
                    part = A[e * 4 : (e + 1) * 4]
                    expected[e::4, e::4] += part @ second(found, name, "right") @ part.mT
            torch.testing.assert_close(second(moments, b, "right"), expected, rtol=1e-3, atol=1e-4)


def test_attention_with_its_fast_path():
    """Inputs of the packed projection and of the output projection, whose module is never called."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.5)
    x = torch.randn(2, 9, 32)
    moments, basis, layout = look(layer, [(x,)])
    assert layout.covered / layout.parameters > 0.9 and layer.training and torch.backends.mha.get_fastpath_enabled()
    X = x.flatten(0, 1).double()
    torch.testing.assert_close(second(moments, "self_attn.in_proj_weight", "right"), X.mT @ X, rtol=1e-5, atol=1e-6)
    weight, bias = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
    q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1).flatten(1).detach()
    assert_leading(
        basis.right["self_attn.out_proj.weight"],
        basis.values["self_attn.out_proj.weight"],
        attended.double().mT @ attended.double(),
        layout.k,
    )


class Uses(nn.Module):
    """Weights used in ways that no module's forward shows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(29, 12)
        self.mid = nn.Linear(12, 12)
        self.shared = nn.Linear(12, 12, bias=False)
        self.shared.weight = self.mid.weight
        self.head = nn.Linear(12, 29, bias=False)
        self.left = nn.Parameter(torch.randn(12, 7))
        self.turned = nn.Parameter(torch.randn(7, 12))
        self.rows = nn.Parameter(torch.randn(12, 5))
        self.added = nn.Parameter(torch.randn(9, 5))
        self.seen: dict[str, list] = {}

    def note(self, name, x):
        self.seen.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]).double())
        return x

    def forward(self, tokens):
        x = self.note("mid.weight", F.embedding(tokens, self.embed.weight))
        y = self.note("mid.weight", torch.tanh(self.mid(input=x)))
        z = self.shared(y).relu_()
        F.linear(self.note("head.weight", z), self.head.weight)  # as fused losses do
        a = self.note("left", z) @ self.left
        b = F.linear(self.note("turned", a), self.turned.T)
        c = torch.einsum("bti,ij->btj", self.note("rows", b), self.rows)
        return c + self.added


def test_weights_used_otherwise_than_by_their_module():
    """Functional calls, a layer called twice, two modules with one weight, left-sided products, changes in place after use."""
    model = Uses().eval()
    batches = [ids(2, 9, 29, s) for s in range(2)]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    seen = {name: torch.cat(rows) for name, rows in model.seen.items()}
    with pytest.warns(UserWarning, match=r"not coverable.*added \(add\)"):
        moments, basis, layout = look(model, batches)
    assert moments.sides["left"] == "left" and "added" not in moments.sides
    assert list(moments.uncoverable) == ["added"]
    for name, side in (
        ("mid.weight", "right"),
        ("head.weight", "right"),
        ("left", "left"),
        ("turned", "left"),
        ("rows", "left"),
    ):
        X = seen[name]
        torch.testing.assert_close(second(moments, name, side), X.mT @ X, rtol=1e-5, atol=1e-6)
        assert_leading(getattr(basis, side)[name], basis.values[name], X.mT @ X, layout.k)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.used(x)


def test_a_weight_of_which_nothing_was_seen_is_refused_by_name():
    with pytest.raises(ValueError, match=r"found none of spare\.weight.*unseen='free'"):
        look(Branches(), [torch.randn(5, 6)])
    with pytest.warns(UserWarning, match=r"nothing was seen of spare\.weight"):
        _, basis, _ = look(Branches(), [torch.randn(5, 6)], unseen="free")
    assert without_directions(basis) == ["spare.weight"]
    with pytest.raises(ValueError, match="at least one batch"):
        look(Branches(), [])


def test_inputs_that_are_not_finite_are_refused_by_name():
    x = torch.randn(5, 6)
    x[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"finite inputs.*used\.weight"):
        look(Branches(), [x], unseen="free")


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("regional", [False, True])
def test_compiled_models_that_ran_before(backend, regional):
    if backend == "inductor" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("inductor writes code for vectors that a torch held to no instruction set does not compile")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), nn.Linear(16, 8)
    )
    batches = [torch.randn(8, 16) for _ in range(2)]
    expected, _, _ = look(model, batches)
    if regional:
        model[1].compile(backend=backend)
        compiled = model
    else:
        compiled = torch.compile(model, backend=backend)
    compiled(batches[0]).sum().backward()
    found, _, layout = look(compiled, batches)
    for group in layout.groups:
        for name in layout.labels(group):
            torch.testing.assert_close(second(found, name, "right"), second(expected, name, "right"))
    compiled(batches[0])  # and goes on as it was


def test_the_pass_leaves_nothing_behind():
    """Random numbers, training mode of every module, gradients, autocast and fast path are as they were, also on an error."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 4))
    model[3].eval()
    state, modes, drawn = (
        copy.deepcopy(model.state_dict()),
        [m.training for m in model.modules()],
        torch.get_rng_state(),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments, _, _ = look(model, [torch.randn(5, 6, generator=torch.Generator().manual_seed(1))])
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(second(moments, "0.weight", "right"), x.mT @ x, rtol=1e-6, atol=1e-7)  # not in bfloat16
    with pytest.raises(RuntimeError):
        look(model, [torch.zeros(5, 7)])
    assert modes == [m.training for m in model.modules()] and torch.equal(drawn, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert all(p.grad is None for p in model.parameters()) and torch.backends.mha.get_fastpath_enabled()


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.ModuleDict({"embed": nn.Embedding(12, 8), "up": nn.Linear(8, 8)})
        self.head = nn.Linear(8, 12)

    def forward(self, tokens, attention_mask=None):
        return self.head(torch.tanh(self.backbone["up"](self.backbone["embed"](tokens))))


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Masked()

    def forward(self, batch):
        return self.model(batch["ids"], attention_mask=batch["mask"])


class SequenceFirst(Masked):
    def forward(self, tokens, padding_mask=None):
        x = self.backbone["embed"](tokens).transpose(0, 1)
        return self.head(torch.tanh(self.backbone["up"](x))).transpose(0, 1)


class Apart(Masked):
    """Backbone and head are called by hand, from a mask of another name."""

    def forward(self, tokens, text):
        return super().forward(tokens)


def padded_batch():
    tokens = ids(4, 10, 12)
    mask = torch.ones(4, 10, dtype=torch.long)
    for row, length in enumerate((10, 7, 5, 4)):
        tokens[row, length:], mask[row, length:] = 0, 0
    return tokens, mask


@pytest.mark.parametrize(
    ("make", "form", "options"),
    [
        (Masked, lambda t, m: {"tokens": t, "attention_mask": m}, {}),
        (Masked, lambda t, m: (t, m), {}),
        (Wrapper, lambda t, m: ({"ids": t, "mask": m},), {}),
        (SequenceFirst, lambda t, m: (t, m == 0), {}),
        (Apart, lambda t, m: (t, m.float()), {"positions": lambda batch: batch[1] > 0}),
        (Masked, lambda t, m: {"t": t, "m": m}, {"run": None}),
    ],
)
def test_padding_does_not_count_however_the_mask_comes(make, form, options):
    """By name, by place, in a wrapper, said the other way round, or told by the caller."""
    model = make()
    if "run" in options:  # backbone and head apart
        options = {
            "run": lambda batch: model.head(torch.tanh(model.backbone["up"](model.backbone["embed"](batch["t"]))))
        }
        options["positions"] = lambda batch: batch["m"].bool()
    tokens, mask = padded_batch()
    moments, basis, _ = look(model, [form(tokens, mask)], **options)
    (counted,) = basis.left
    inner = getattr(model, "model", model)
    X = inner.backbone["embed"](tokens[mask.bool()]).detach().double()
    up = counted.replace("embed", "up")
    torch.testing.assert_close(second(moments, up, "right"), X.mT @ X, rtol=1e-5, atol=1e-6)
    assert float(moments.energy(counted, "left")) == float(mask.sum())


def test_padding_that_cannot_be_told_apart_is_named():
    class Some(Masked):
        def forward(self, tokens, attention_mask=None):
            return self.head(self.backbone["up"](self.backbone["embed"](tokens))[:, -3:])

    tokens, mask = padded_batch()
    with pytest.warns(UserWarning, match=r"padding was not told apart.*head\.weight"):
        look(Some(), [{"tokens": tokens, "attention_mask": mask}])


class Characters:
    pad_token_id = 0

    def __call__(self, text):
        return {"input_ids": [ord(c) - 96 for c in text]}


def test_texts_and_rows_of_token_ids_are_put_together():
    class Model(Masked):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids)

    texts = ["abc", "abcdefghij", "b", "cab"]
    tokenizer = Characters()
    found = [
        look(Model(), texts, tokenizer=tokenizer)[0],
        look(Model(), [texts], tokenizer=tokenizer)[0],
        look(Model(), [tokenizer(text) for text in texts])[0],
    ]
    counts = torch.bincount(torch.tensor([i for text in texts for i in tokenizer(text)["input_ids"]]), minlength=12)
    for moments in found:
        torch.testing.assert_close(second(moments, "backbone.embed.weight", "left").diagonal(), counts.double())
        torch.testing.assert_close(
            second(moments, "backbone.up.weight", "right"), second(found[0], "backbone.up.weight", "right")
        )
    with pytest.raises(ValueError, match="expected a tokenizer with batches that are texts"):
        look(Model(), texts)


def test_sketches_hold_what_the_leading_directions_hold():
    """Of wide inputs a linear sketch: slowly decaying spectra, and low ranks exactly; in any order of batches."""
    n, r = EXACT + 77, 8
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    for spectrum, share in ((1 / torch.arange(1, n + 1), 0.98), ((torch.arange(n) < 5) * 1.0, 1 - 1e-5)):
        X = (torch.randn(600, n, generator=generator).double() * spectrum @ basis.mT).float()
        sums = []
        for order in (range(6), reversed(range(6))):
            accumulator = Accumulator(2 * r + 16)
            for part in order:
                accumulator.see(("w", "right"), X[part * 100 : (part + 1) * 100], None, n, None)
            accumulator.settle()
            (sum_,) = accumulator.sums.values()
            sums.append(sum_)
        torch.testing.assert_close(sums[0].values, sums[1].values, rtol=1e-12, atol=1e-12)
        vectors, values = sums[0].leading(r)
        exact = torch.linalg.svdvals(X.double()).square()
        held = (X.double() @ vectors).square().sum()
        assert held >= share * exact[:r].sum()
        assert values.sum() <= exact[:r].sum() * (1 + 1e-6)
        torch.testing.assert_close(sums[0].trace, exact.sum(), rtol=1e-6, atol=0)


def test_weights_that_are_fed_the_same_share_one_sum():
    """Queries, keys and values; gates: the work grows with what is different, not with the number of weights."""
    model = qwen3(False)
    layout, _ = laid_out(model)
    from carerl_kernels.subspace.observe import observe

    moments = observe(model, [{"input_ids": ids()}], layout, progress=False)
    sums = {id(s) for parts in moments._sums.values() for s, _ in parts}
    assert len(sums) == 2 * 4 + 1  # four different inputs a layer, and the head's


def test_files_of_shown_prompts_hold_no_displacement(tmp_path):
    """No stage moved anything: a file of zeros would be larger than the directions."""
    from carerl_kernels import CapabilityGuard
    from carerl_kernels.subspace import StoredBasis
    from safetensors import safe_open

    model = qwen3(False)
    guard = CapabilityGuard(model)
    shown = guard.protect("text", [{"input_ids": ids()}], tmp_path / "text.safetensors", progress=False)
    with safe_open(tmp_path / "text.safetensors", "pt") as file:
        assert {key.partition(".")[0] for key in file.keys()} == {"left", "right", "values"}  # noqa: SIM118
    read = StoredBasis.load(tmp_path / "text.safetensors", guard.layout)
    assert read.moved.keys() == shown.moved.keys()
    for name, moved in read.moved.items():
        assert moved.shape == shown.moved[name].shape and not moved.any()
