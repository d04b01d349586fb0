import torch

from pyspec.machine.huge_pages import HugePages


def test_moved_tensors_are_equal_aligned_and_apart():
    tensors = [torch.randn(3, 5), torch.randint(0, 255, (4097,), dtype=torch.uint8), torch.randn(2, 2048).bfloat16()]
    buffer = HugePages([tensor.nbytes for tensor in tensors])
    moved = [buffer.move(tensor) for tensor in tensors]
    for tensor, copy in zip(tensors, moved, strict=True):
        assert copy.dtype == tensor.dtype and torch.equal(copy, tensor) and copy.is_contiguous()
        assert copy.data_ptr() % 4096 == 0
    for copy in moved:  # writing to one changes no other
        copy.zero_()
        assert all(torch.equal(a, b) for a, b in zip(tensors, moved, strict=True) if b is not copy and b.any())
    del buffer
    assert not moved[0].any()


def test_what_is_taken_is_zeros_and_apart():
    buffer = HugePages([5, 4096, 1])
    parts = [buffer.take(size) for size in (5, 4096, 1)]
    for value, part in enumerate(parts, 1):
        assert not part.any()
        part.fill_(value)
    assert [(len(part), part.unique().tolist()) for part in parts] == [(5, [1]), (4096, [2]), (1, [3])]
