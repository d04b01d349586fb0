"""The Triton kernels of experts compiled ahead of time, as a GPU would ask for them."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed for this platform")
from machine_code import functions  # noqa: E402
from without_gpu import launches  # noqa: E402

from pyspec.kernels.expert_linear import expert_linear  # noqa: E402
from pyspec.kernels.route_experts import mix_experts, route_experts  # noqa: E402
from pyspec.ops.linear_codes_tiles import tile_bytes, tile_inputs  # noqa: E402
from pyspec.ops.weight_formats import FORMATS  # noqa: E402
from tests.helpers.slow import slow  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
EXPERTS, CHOICES, OUTPUTS, INPUTS = 128, 8, 1536, 2048
each_architecture = pytest.mark.parametrize("architecture", [slow(80), 90, slow(100)])


def weight_of(kind) -> torch.Tensor:
    if kind == torch.int8:
        return torch.empty(EXPERTS * OUTPUTS // 64, INPUTS // 128, tile_bytes(FORMATS["q8_0"]), dtype=torch.uint8)
    if kind in FORMATS:
        format = FORMATS[kind]
        shape = EXPERTS * OUTPUTS // 128, INPUTS // tile_inputs(format), tile_bytes(format)
        return torch.empty(shape, dtype=torch.uint8)
    return torch.empty(EXPERTS * OUTPUTS, INPUTS, dtype=kind)


@each_architecture
@pytest.mark.parametrize(
    "kind", [torch.bfloat16, torch.int8, "q4_0", slow("q4_k"), slow("q6_k"), slow(torch.float32)], ids=str
)
def test_products_of_experts_fit_and_have_one_kernel_for_all_rows(kind, architecture):
    format, found = FORMATS.get(kind) if isinstance(kind, str) else None, {}
    with launches(architecture) as made:
        for rows in (1, 3, 500):
            x = torch.empty(rows, INPUTS, dtype=torch.float32 if kind == torch.float32 else torch.bfloat16)
            ids = torch.empty(rows, CHOICES, dtype=torch.int32)
            bias = torch.empty(EXPERTS, OUTPUTS)
            out = expert_linear(x, ids, weight_of(kind), bias, OUTPUTS, EXPERTS, format, torch.float32)
            assert out.shape == (rows * CHOICES, OUTPUTS)
    for launch in made:
        found.setdefault(launch.name, []).append(launch)
    product = next(name for name in found if name in ("float_kernel", "int8_kernel", "codes_kernel"))
    assert len({launch.cubin for launch in found[product]}) == 1
    code = functions(found[product][0].cubin)[product]
    assert code.stack <= 150
    grids = [launch.grid for launch in found[product]]
    assert grids[0][0] < grids[2][0] <= 500 * CHOICES // 16 + EXPERTS + 1


@each_architecture
def test_routes_and_mixes_compile(architecture):
    with launches(architecture) as made:
        gates, ids = route_experts(torch.empty(3, EXPERTS), torch.empty(EXPERTS), CHOICES, True, True, 1.0)
        assert ids.dtype == torch.int32
        mix_experts(torch.empty(3 * CHOICES, INPUTS), gates, torch.empty(3, INPUTS), torch.empty(3, 1))
    assert [launch.name for launch in made] == ["route_kernel", "mix_kernel"]
    for launch in made:
        assert functions(launch.cubin)[launch.name].stack == 0
