"""What went into weights, by other means than the package's: modules that write down their inputs, in float64."""

from __future__ import annotations

import torch
from carerl_kernels._wrapped import unwrapped
from carerl_kernels.subspace import MatrixLayout, observe
from carerl_kernels.subspace.sites import guess_sides, plain_name

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def laid_out(model, r=8):
    """Layout over the trainable parameters, as guessed, and their tensors."""
    inner = unwrapped(model)
    named = [(plain_name(name), p) for name, p in inner.named_parameters() if p.requires_grad]
    layout = MatrixLayout.of(named, "input", r, None, guess_sides(inner, named))
    return layout, [p.detach() for _, p in named]


def look(model, batches, r=8, energy=1.0, **options):
    """Moments and the basis that they make."""
    layout, parameters = laid_out(model, r)
    moments = observe(model, batches, layout, progress=False, **options)
    layout = moments.layout(layout, parameters)
    basis = moments.basis(layout, "a", energy=energy, architecture="x", parameters=parameters)
    return moments, basis, layout


class Inputs:
    """Input vectors of linear-like modules and tokens of embeddings, by parameter name, from forward hooks of its own."""

    def __init__(self, model, keep=None):
        self.rows: dict[str, list[torch.Tensor]] = {}
        self.tokens: dict[str, list[torch.Tensor]] = {}
        self.keep = keep
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Embedding):
                self.handles.append(module.register_forward_hook(self._hook(self.tokens, f"{name}.weight")))
            elif isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
                self.handles.append(module.register_forward_hook(self._hook(self.rows, f"{name}.weight")))

    def _hook(self, where, name):
        def look(module, args, output):
            x = args[0].detach()
            x = x.flatten() if where is self.tokens else x.flatten(0, -2).double()
            if self.keep is not None and x.shape[0] == self.keep.numel():
                x = x[self.keep.flatten()]
            where.setdefault(name, []).append(x)

        return look

    def second(self, name):
        X = torch.cat(self.rows[name])
        return X.mT @ X

    def close(self):
        for handle in self.handles:
            handle.remove()


def second(moments, label, side):
    """The sum of `x x^T` over the inputs of a matrix, `[n, n]` float64, where it was kept whole."""
    if (label, side) not in moments._sums:
        return moments._counts[label, side].diag()
    return moments._combined(label, side).values


def assert_leading(columns, values, second, r):
    """Columns are as good as the leading eigenvectors: what they hold, what they say they hold, and orthonormal."""
    V, second = columns.double(), second.double()
    held = torch.trace(V.mT @ second @ V)
    best = torch.linalg.eigvalsh(second).flip(0)[:r].sum()
    assert held >= (1 - 1e-5) * best
    torch.testing.assert_close(values.square().sum(), held, rtol=1e-4, atol=1e-9)
    gram = V.mT @ V
    torch.testing.assert_close(gram, torch.diag((gram.diagonal() > 0.5).double()), rtol=0, atol=1e-5)
