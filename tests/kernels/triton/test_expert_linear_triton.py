"""The Triton kernels of experts: each row has the products of its own expert, and the row rule bit for bit."""

import pytest
import torch

from tests.helpers.on_gpu import to_device

pytest.importorskip("triton", reason="Triton is not installed for this platform")
from pyspec.kernels.expert_linear import expert_linear  # noqa: E402
from pyspec.kernels.expert_rows import sort_rows  # noqa: E402
from pyspec.kernels.linear import linear  # noqa: E402
from pyspec.kernels.linear_codes import linear_codes  # noqa: E402
from pyspec.ops.linear import _lay_out_int8  # noqa: E402
from pyspec.ops.linear_codes_tiles import lay_out_tiles  # noqa: E402
from pyspec.ops.weight_formats import FORMATS, quantise  # noqa: E402
from tests.helpers.weight_formats import random_codes  # noqa: E402

pytestmark = pytest.mark.usefixtures("kernel_device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS, INPUTS = 5, 256
KINDS = [torch.float32, torch.bfloat16, torch.int8, "q4_0", "q4_k", "q6_k", "int4_32"]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights_of(kind, outputs=70):
    """The data of each expert's weight, as a GPU has it."""
    weights = [numbers(outputs, INPUTS, seed=expert) for expert in range(EXPERTS)]
    if kind == torch.int8:
        return [_lay_out_int8(weight, in_panels=False) for weight in weights]
    if kind == "int4_32":
        return [lay_out_tiles(quantise(weight, FORMATS[kind])) for weight in weights]
    if kind in FORMATS:
        return [lay_out_tiles(random_codes(kind, outputs, INPUTS, expert)) for expert in range(EXPERTS)]
    return [weight.to(kind) for weight in weights]


def run(x, ids, weights, kind, bias=None, outputs=70):
    format = FORMATS.get(kind) if isinstance(kind, str) else None
    x, ids, data = (to_device(part, DEVICE) for part in (x, ids, torch.cat(weights)))
    bias = None if bias is None else to_device(bias, DEVICE)
    return expert_linear(x, ids, data, bias, outputs, EXPERTS, format, torch.float32).cpu()


def case(kind, rows, choices):
    x = numbers(rows, INPUTS, seed=9).to(kind if kind in (torch.float32, torch.float16) else torch.bfloat16)
    generator = torch.Generator().manual_seed(rows)
    ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:choices] for _ in range(rows)]).int()
    return x, ids


@each_kind
def test_is_linear_with_the_weight_of_each_row(kind):
    weights, bias = weights_of(kind), numbers(EXPERTS, 70, seed=3)
    for rows, choices in ((1, 2), (40, 2)):
        x, ids = case(kind, rows, choices)
        found = run(x, ids, weights, kind, bias)
        assert found.shape == (rows * choices, 70)
        for expert in range(EXPERTS):
            own = (ids.flatten() == expert).nonzero().flatten()
            if not len(own):
                continue
            rows_of_x = to_device(x[own // choices].contiguous(), DEVICE)
            given = rows_of_x, weights[expert].to(DEVICE), bias[expert].to(DEVICE), 70
            if isinstance(kind, str):
                expected = linear_codes(*given, FORMATS[kind], torch.float32)
            else:
                expected = linear(*given, torch.float32)
            torch.testing.assert_close(found[own], expected.cpu(), rtol=1e-4, atol=1e-3)


@each_kind
def test_a_row_has_the_bits_it_has_alone(kind):
    weights = weights_of(kind)
    x, ids = case(kind, 21, 2)
    found = run(x, ids, weights, kind)
    for row in (0, 7, 20):
        assert torch.equal(run(x[row : row + 1], ids[row : row + 1], weights, kind), found[2 * row : 2 * row + 2])
    ids[:, 0] = 3
    ids[7] = case(kind, 21, 2)[1][7]
    assert torch.equal(run(x, ids, weights, kind)[14:16], found[14:16])


@pytest.mark.parametrize("rows, choices, experts", [(1, 1, 1), (3, 2, 4), (50, 4, 7), (700, 2, 3)])
def test_rows_are_sorted_into_blocks_of_one_expert(rows, choices, experts):
    ids = torch.randint(-1, experts + 1, (rows, choices), generator=torch.Generator().manual_seed(0)).int()
    order, owners = (part.cpu() for part in sort_rows(ids.to(DEVICE), experts, 16))
    found = []
    for block, owner in zip(order.view(-1, 16), owners.tolist(), strict=True):
        if owner >= 0:
            own = block[block < ids.numel()]
            assert len(own) and (ids.flatten()[own.long()] == owner).all() and (block[len(own) :] == ids.numel()).all()
            found += own.tolist()
    is_expert = (ids.flatten() >= 0) & (ids.flatten() < experts)
    assert sorted(found) == is_expert.nonzero().flatten().tolist()
