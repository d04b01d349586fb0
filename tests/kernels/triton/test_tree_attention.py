"""The Triton kernel of tree_attention: against float64 from the parents, and the row rule bit for bit."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed for this platform")

from pyspec import DraftTree  # noqa: E402
from pyspec.kernels.tree_attention import tree_attention  # noqa: E402

TOLERANCE = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def random_tree(nodes: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [-1, *(int(torch.randint(0, node, (1,), generator=generator)) for node in range(1, nodes))]


def path_to(parents: list[int], node: int) -> list[int]:
    return (path_to(parents, parents[node]) if parents[node] >= 0 else []) + [node]


class Batch:
    """Trees over prefixes, with everything the launcher takes."""

    def __init__(self, device, lens, trees, heads=4, kv_heads=2, head_dim=64, dtype=torch.float32, page=None):
        generator = torch.Generator().manual_seed(sum(lens) + heads)
        nodes, slots = max(map(len, trees)), max(n + len(t) for n, t in zip(lens, trees, strict=True))
        slots += -slots % (page or 1)
        self.lens, self.trees = lens, trees
        self.q, self.k, self.v = (
            torch.randn(len(lens), count, size, head_dim, generator=generator).to(device, dtype)
            for count, size in ((heads, nodes), (kv_heads, slots), (kv_heads, slots))
        )
        self.bits = torch.zeros(len(lens), nodes, (nodes + 31) // 32, dtype=torch.int32)
        for row, parents in zip(self.bits, trees, strict=True):
            own = DraftTree([0] * len(parents), parents).ancestor_bits
            row[: len(parents), : own.shape[1]] = own
        self.page = page
        self.device = device

    def launch(self, scale=0.125, softcap=None, window=None):
        k, v, table = self.k, self.v, None
        if self.page:
            pages = k.shape[2] // self.page
            order = torch.randperm(len(self.lens) * pages, generator=torch.Generator().manual_seed(1))
            table = order.view(len(self.lens), pages).to(self.device, torch.int32)
            k, v = (self._paged(x, order) for x in (k, v))
        lens = torch.tensor(self.lens, dtype=torch.int32, device=self.device)
        return tree_attention(self.q, k, v, self.bits.to(self.device), lens, scale, softcap, window, table)

    def _paged(self, source, order):
        batch, heads, slots, head_dim = source.shape
        pages = source.unflatten(2, (-1, self.page)).transpose(1, 2).flatten(0, 1)
        store = torch.empty_like(pages)
        store[order.to(source.device)] = pages
        return store

    def slots(self, b, node, window=None):
        slots = [*range(self.lens[b]), *(self.lens[b] + j for j in path_to(self.trees[b], node))]
        return slots if window is None else slots[-window:]

    def check(self, scale=0.125, softcap=None, window=None):
        out, lse = self.launch(scale, softcap, window)
        group = self.q.shape[1] // self.k.shape[1]
        tolerance = TOLERANCE[self.q.dtype]
        for b, parents in enumerate(self.trees):
            for node in range(self.q.shape[2]):
                if node >= len(parents):
                    assert (out[b, :, node] == 0).all() and (lse[b, :, node] == -torch.inf).all()
                    continue
                slots = self.slots(b, node, window)
                k, v = (x[b, :, slots].double().repeat_interleave(group, 0) for x in (self.k, self.v))
                scores = torch.einsum("hd,hsd->hs", self.q[b, :, node].double(), k) * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                expected = torch.einsum("hs,hsd->hd", scores.softmax(-1), v)
                torch.testing.assert_close(out[b, :, node].double(), expected, atol=tolerance, rtol=tolerance)
                torch.testing.assert_close(
                    lse[b, :, node].double(), scores.logsumexp(-1), atol=max(4e-6, tolerance), rtol=tolerance
                )

    def plain(self, b, node, **options):
        """The node's row as plain decoding computes it."""
        slots = self.slots(b, node)
        row = Batch.__new__(Batch)
        row.q, row.k, row.v = self.q[b : b + 1, :, node : node + 1], *(x[b : b + 1, :, slots] for x in (self.k, self.v))
        row.lens, row.trees, row.page, row.device = [len(slots) - 1], [[-1]], None, self.device
        row.bits = torch.ones(1, 1, 1, dtype=torch.int32)
        return row.launch(**options)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_matches_float64(kernel_device, head_dim, dtype):
    trees = [random_tree(5, 0), random_tree(9, 1), random_tree(2, 2)]
    Batch(kernel_device, [70, 0, 130], trees, head_dim=head_dim, dtype=dtype).check()


@pytest.mark.parametrize("prefix", [0, 1, 63, 64, 65, 513])
@pytest.mark.parametrize("nodes", [1, 5, 33])
def test_prefix_and_tree_sizes(kernel_device, prefix, nodes):
    Batch(kernel_device, [prefix], [random_tree(nodes, prefix)], heads=2, kv_heads=1).check()


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (3, 1), (8, 1), (18, 1), (9, 3)])
def test_groups(kernel_device, heads, kv_heads):
    Batch(kernel_device, [66], [random_tree(6, 3)], heads=heads, kv_heads=kv_heads).check()


@pytest.mark.parametrize("window", [1, 5, 64, 90])
def test_window_counts_positions(kernel_device, window):
    Batch(kernel_device, [130, 10], [random_tree(9, 4), random_tree(4, 5)]).check(window=window)


def test_softcap(kernel_device):
    Batch(kernel_device, [70], [random_tree(5, 6)]).check(softcap=3.0, scale=0.5)


@pytest.mark.parametrize("page", [1, 16, 48])
def test_pages(kernel_device, page):
    trees = [random_tree(9, 7), random_tree(3, 8)]
    paged = Batch(kernel_device, [100, 20], trees, page=page)
    paged.check()
    found = paged.launch()
    paged.page = None
    assert all(torch.equal(a, b) for a, b in zip(found, paged.launch(), strict=True))


@pytest.mark.parametrize("options", [{}, {"window": 70}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("prefix", [61, 508])
def test_row_rule(kernel_device, prefix, dtype, options):
    chain = list(range(-1, 8))
    batch = Batch(kernel_device, [prefix, 30], [random_tree(18, 9), chain], heads=3, kv_heads=1, dtype=dtype)
    out, lse = batch.launch(**options)
    for b, nodes in ((0, (0, 1, 9, 17)), (1, (0, 8))):
        for node in nodes:
            row, row_lse = batch.plain(b, node, **options)
            assert torch.equal(out[b, :, node], row[0, :, 0]), (b, node)
            assert torch.equal(lse[b, :, node], row_lse[0, :, 0]), (b, node)


@pytest.mark.parametrize("window", [None, 20])
def test_unseen_slots_change_no_bit(kernel_device, window):
    batch = Batch(kernel_device, [70], [[-1, 0, 0, 2, 1]])
    expected, _ = batch.launch(window=window)
    seen = set(batch.slots(0, 3, window))
    others = [slot for slot in range(batch.k.shape[2]) if slot not in seen]
    batch.k[:, :, others[-2:]] = torch.nan  # the siblings' slots, and what is behind the tree
    batch.v[:, :, others[-2:]] = torch.nan
    found, _ = batch.launch(window=window)
    assert torch.equal(found[:, :, 3], expected[:, :, 3]) and expected[:, :, 3].isfinite().all()


def test_nan_is_not_hidden(kernel_device):
    batch = Batch(kernel_device, [70], [[-1, 0]])
    batch.q[0, 1, 1] = torch.nan
    out, _ = batch.launch()
    assert out[0, 1, 1].isnan().all() and out[0, 0].isfinite().all()
