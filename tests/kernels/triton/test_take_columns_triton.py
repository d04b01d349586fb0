"""The Triton kernel of take_columns: each column is where the order says, with its bits."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed for this platform")
from pyspec.kernels.take_columns import take_columns  # noqa: E402

pytestmark = pytest.mark.usefixtures("kernel_device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 17), (2, 2500), (0, 8)])
def test_each_column_is_where_the_order_says(rows, columns, dtype):
    wide = torch.randn(2 * rows, columns + 5, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    x, order = wide[::2, 2 : columns + 2], torch.randperm(columns, generator=torch.Generator().manual_seed(1)).int()
    out = take_columns(x, order.to(DEVICE))
    assert out.is_contiguous() and torch.equal(out.cpu(), x.cpu()[:, order.long()])
