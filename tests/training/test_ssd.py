"""The matrix form of Mamba-2 for training, against its definition and transformers' layers, with gradients."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
from training.ssd import ssd, use_ssd  # noqa: E402


def by_definition(x, dt, A, B, C):
    """Token by token, in float64."""
    heads, groups = x.shape[2], B.shape[2]
    B, C = (values.repeat_interleave(heads // groups, 2) for values in (B, C))
    state, out = 0.0, []
    for t in range(x.shape[1]):
        added = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = state * (dt[:, t] * A).exp()[..., None, None] + added
        out.append((state * C[:, t, :, None]).sum(-1))
    return torch.stack(out, 1)


@pytest.mark.parametrize("length, groups", [(1, 1), (16, 1), (17, 2), (50, 4)])
def test_it_is_the_recurrence(length, groups):
    generator = torch.Generator().manual_seed(length)

    def new(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, B, C = new(2, length, 4, 8), new(2, length, groups, 6), new(2, length, groups, 6)
    dt, A = new(2, length, 4), -torch.tensor([0.1, 1.0, 10.0, 100.0], dtype=torch.float64)
    inputs = (x, torch.nn.functional.softplus(dt), A, B, C)
    expected = by_definition(*inputs)
    found = ssd(*(value.float() for value in inputs), chunk=16)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weight).sum(), (x, dt, B, C), retain_graph=True)
    gradients = torch.autograd.grad((found * weight).sum(), (x, dt, B, C))
    for ours, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-4, rtol=1e-3)


def test_a_model_computes_what_it_did():
    config = transformers.Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=16, num_heads=4, head_dim=16, n_groups=2
    )
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(config)
    tokens = torch.randint(0, 64, (2, 70))

    def run():
        model.zero_grad()
        logits = model(tokens, use_cache=False).logits
        logits.logsumexp(-1).square().mean().backward()
        return [logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    expected = run()
    names = list(model.state_dict())
    use_ssd(model)
    for ours, other in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-3)
    assert list(model.state_dict()) == names
