"""gear_attention: its ops as torch sees them. What it computes is in test_quantised_attention.py."""

import pytest
import torch

from pyspec.ops import GearFormat, gear_attention, gear_encode
from tests.helpers.gear_formats import FORMATS, keys_values
from tests.helpers.quantisers import QUANTISERS


@pytest.mark.parametrize("name", ["kivi", "gear-3bit"])
def test_opcheck(name):
    f = FORMATS[name]
    k, v = keys_values()
    none = k.new_empty((1, 2, 2, 0), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.pyspec.gear_encode.default, (k, v, none, *f.layout, f.fitted))
    q, seen = torch.randn(1, 4, 3, 64), torch.tensor([[1, 2, 0]], dtype=torch.int32)
    quantised = gear_encode(k, v, f)
    torch.library.opcheck(torch.ops.pyspec.gear.default, (q, quantised, seen, *f.layout, 0.125))


def test_compiles_as_one_graph():
    format = FORMATS["gear"]
    k, v = keys_values()
    q, seen = torch.randn(1, 4, 3, 64), torch.tensor([[1, 2, 0]], dtype=torch.int32)
    none = k.new_empty((1, 2, 2, 0), dtype=torch.uint8)

    def step(q, k, v, seen):
        quantised = torch.ops.pyspec.gear_encode(k * 1, v, none, *format.layout, False)
        return torch.ops.pyspec.gear(q * 2, quantised, seen, *format.layout, 0.125)[0].sum(-1)

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(q, k, v, seen), step(q, k, v, seen))


def test_records_of_another_format_are_refused():
    case, quantised, k, v = QUANTISERS["kivi"].case([300], [4])
    with pytest.raises(ValueError, match="quantised must be .* GearFormat"):
        gear_attention(case.q, quantised, k, v, case.bits, case.lens, GearFormat(4, 64))
