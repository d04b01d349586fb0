"""take_columns: bits as they are, on every backend."""

import pytest
import torch

from pyspec.ops.take_columns import take_columns
from tests.helpers.every_backend import each_backend, same_bits

run = each_backend(take_columns)


def order_of(columns: int) -> torch.Tensor:
    return torch.randperm(columns, generator=torch.Generator().manual_seed(columns)).int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 17), (2, 1024), (5, 2500)])
def test_each_column_is_where_the_order_says(run, rows, columns, dtype):
    bits = torch.randint(-(2**15), 2**15, (rows, columns), generator=torch.Generator().manual_seed(0))  # NaN too
    x = bits.int().mul(65537).view(dtype) if dtype == torch.float32 else bits.short().view(dtype)
    order = order_of(columns)
    out = run(x, order)
    assert out.is_contiguous()
    for place in range(0, columns, max(1, columns // 30)):
        assert same_bits(out[:, place].contiguous(), x[:, order[place]].contiguous())
    assert same_bits(run(out, order.argsort().int()), x)


def test_no_rows(run):
    assert run(torch.empty(0, 8), order_of(8)).shape == (0, 8)


def test_rows_may_lie_apart_and_columns_come_twice(run):
    x, order = torch.randn(7, 40)[::2, 3:23], torch.zeros(20, dtype=torch.int32)
    assert torch.equal(run(x, order), x[:, :1].expand(-1, 20))


def test_what_is_wrong_is_named(run):
    x, order = torch.randn(3, 4), torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    with pytest.raises(TypeError, match="order must be int32, got torch.int64"):
        run(x, order.long())
    with pytest.raises(ValueError, match=r"order must .*4"):
        run(x, order[:3])
    with pytest.raises(ValueError, match="x must be .rows, columns. with contiguous rows"):
        run(x.T, order[:3])
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16"):
        run(x.int(), order)
    for bad in (4, -1):
        with pytest.raises(RuntimeError, match=rf"order.3. is {bad}, x has 4 columns"):
            run(x, torch.tensor([0, 1, 2, bad], dtype=torch.int32))
