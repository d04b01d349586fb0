"""The Triton kernels of tree_attention: a float64 oracle written from the parents, and the row rule bit for bit."""

from dataclasses import dataclass

import pytest
import torch

from tests.helpers.on_gpu import assert_close, to_device
from tests.helpers.slow import slow

pytest.importorskip("triton", reason="Triton is not installed for this platform")
from pyspec.kernels.tree_attention import tree_attention  # noqa: E402

pytestmark = pytest.mark.usefixtures("kernel_device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SINKS = torch.tensor([-1.0, 0.5, 4.0])
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    parents: list[list[int]]
    lens: list[int]

    @property
    def bits(self) -> torch.Tensor:
        nodes = self.q.shape[2]
        words = (nodes + 31) // 32
        rows = torch.zeros(len(self.parents), nodes, words, dtype=torch.int64)
        for b, parents in enumerate(self.parents):
            for node in range(len(parents)):
                for ancestor in path_to(parents, node):
                    rows[b, node, ancestor // 32] |= 1 << (ancestor % 32)
        return torch.where(rows >= 2**31, rows - 2**32, rows).to(torch.int32)


def path_to(parents: list[int], node: int) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


def make_case(lens, nodes, heads=2, kv_heads=1, head_dim=64, dtype=torch.float32, seed=0) -> Case:
    """Random trees of the given sizes, padded to the largest, over prefixes of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    parents = [[-1, *(int(torch.randint(0, n, (1,), generator=generator)) for n in range(1, t))] for t in nodes]
    slots = max(n + t for n, t in zip(lens, nodes, strict=True))
    shapes = [(len(lens), heads, max(nodes), head_dim), *[(len(lens), kv_heads, slots, head_dim)] * 2]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    for b, (n, t) in enumerate(zip(lens, nodes, strict=True)):  # nobody's slots
        k[b, :, n + t :], v[b, :, n + t :] = torch.nan, torch.nan
    return Case(q, k, v, parents, lens)


def chain(prefix: int, nodes: int, **options) -> Case:
    case = make_case([prefix], [nodes], **options)
    case.parents = [list(range(-1, nodes - 1))]
    return case


def run(case: Case, scale=None, softcap=None, window=None, block_table=None, k=None, v=None, sinks=None, chunked=False):
    lens = torch.tensor(case.lens, dtype=torch.int32)
    tensors = (case.q, case.k if k is None else k, case.v if v is None else v, case.bits, lens)
    table = None if block_table is None else block_table.to(DEVICE)
    scale = case.q.shape[3] ** -0.5 if scale is None else scale
    sinks = None if sinks is None else sinks.to(DEVICE)
    tensors = [to_device(tensor, DEVICE) for tensor in tensors]
    out, lse = tree_attention(*tensors, scale, softcap, window, table, sinks, chunked)
    return out.cpu(), lse.cpu()


def visible_slots(case: Case, b: int, node: int, window=None, chunked=False) -> list[int]:
    """The slots that a node sees, in order of position."""
    slots = [*range(case.lens[b]), *(case.lens[b] + j for j in path_to(case.parents[b], node))]
    if chunked:
        return slots[(len(slots) - 1) // window * window :]
    return slots if window is None else slots[-window:]


def check(case: Case, scale=None, softcap=None, window=None, sinks=None, chunked=False, **options):
    out, lse = run(case, scale, softcap, window, sinks=sinks, chunked=chunked, **options)
    group, tolerance = case.q.shape[1] // case.k.shape[1], TOLERANCE[case.q.dtype]
    expected = torch.zeros(case.q.shape, dtype=torch.float64)
    expected_lse = torch.full(case.q.shape[:3], -torch.inf, dtype=torch.float64)
    for b, parents in enumerate(case.parents):
        for node in range(len(parents)):
            slots = visible_slots(case, b, node, window, chunked)
            k, v = (cache[b, :, slots].double().repeat_interleave(group, 0) for cache in (case.k, case.v))
            scores = torch.einsum("hd,hsd->hs", case.q[b, :, node].double(), k)
            scores = scores * (case.q.shape[3] ** -0.5 if scale is None else scale)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks[:, None].double()), 1)
                v = torch.cat((v, torch.zeros_like(v[:, :1])), 1)
            expected[b, :, node] = torch.einsum("hs,hsd->hd", scores.softmax(-1), v)
            expected_lse[b, :, node] = scores.logsumexp(-1)
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("head_dim", [64, slow(80), slow(128)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matches_float64(dtype, head_dim):
    check(make_case([70, 3], [4, 2], head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("head_dim", [96, slow(256)])
def test_other_head_dims(head_dim):
    check(make_case([66], [2], head_dim=head_dim))


@pytest.mark.parametrize("prefix", [0, 63, 64, 65, 513])
@pytest.mark.parametrize("nodes", [1, 5, slow(33)])
def test_prefix_and_tree_sizes(prefix, nodes):
    check(make_case([prefix], [nodes], heads=1, seed=prefix + nodes))


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (3, 1), slow(4, 1), slow(16, 2), slow(17, 1)])
def test_groups(heads, kv_heads):
    check(make_case([100], [3], heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("window", [slow(1), 3, 64, slow(100), slow(10_000)])
def test_window_counts_positions(window):
    check(make_case([150], [9], heads=1), window=window)


@pytest.mark.parametrize("window", [3, slow(64), 100])
def test_chunks_begin_at_their_multiples(window):
    check(make_case([150], [9], heads=1), window=window, chunked=True)


def test_window_skips_chunks():
    case = make_case([1100], [4], heads=1)
    case.k[:, :, :1000], case.v[:, :, :1000] = torch.nan, torch.nan
    check(case, window=70)
    check(case, window=2)  # nothing but the own tile


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap_and_scale(softcap):
    check(make_case([90], [3]), softcap=softcap, scale=0.7)


@pytest.mark.parametrize("window", [None, slow(66)])
def test_a_sink_takes_a_share_of_the_weights(window):
    check(make_case([130, 3], [4, 2], heads=3), window=window, sinks=torch.tensor([-60.0, 0.5, 60.0]))


def test_large_scores_do_not_overflow():
    case = make_case([130], [3])
    case.q *= 100
    check(case, softcap=20.0)
    out, _ = run(case)
    assert out.isfinite().all()


@pytest.mark.parametrize("prefix", [253, slow(509)])
def test_chain_crosses_a_chunk(prefix):
    check(chain(prefix, 8, heads=1))


def test_tree_crosses_a_chunk():
    check(make_case([253], [9], heads=1))


@pytest.mark.parametrize("window", [None, slow(300)])
def test_long_chunks(window):
    check(make_case([4400], [3], heads=1, dtype=torch.float16), window=window)


def test_wide_tree_has_many_words():
    case = make_case([1], [70], heads=1)
    case.parents = [[-1, *[0] * 66, 33, 67, 68]]
    check(case)


def pages_of(case: Case, page: int):
    """The case's keys and values on shuffled pages, among pages of NaN."""
    batch, kv_heads, slots, head_dim = case.k.shape
    width = -(-slots // page)
    order = torch.randperm(batch * width + 2, generator=torch.Generator().manual_seed(0))[: batch * width]
    table = order.view(batch, width).to(torch.int32)
    stores = []
    for cache in (case.k, case.v):
        store = torch.full((batch * width + 2, kv_heads, page, head_dim), torch.nan, dtype=cache.dtype)
        for b in range(batch):
            for slot in range(slots):
                store[table[b, slot // page], :, slot % page] = cache[b, :, slot]
        stores.append(store)
    return *stores, table


@pytest.mark.parametrize(
    "page, dtype", [slow(1, torch.float32), (16, torch.bfloat16), slow(48, torch.float16)], ids=str
)
def test_pages_equal_contiguous(page, dtype):
    case = make_case([130, 20], [4, 2], kv_heads=2, dtype=dtype)
    k, v, table = pages_of(case, page)
    for found, expected in zip(run(case, k=k, v=v, block_table=table), run(case), strict=True):
        assert torch.equal(found, expected)


def test_strides():
    case = make_case([75], [4], kv_heads=2)
    expected, _ = run(case)
    case.q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    cache = torch.stack([case.k, case.v], 3).transpose(1, 2).contiguous()  # [B, S, Hkv, 2, D]
    found, _ = run(case, k=cache[:, :, :, 0].transpose(1, 2), v=cache[:, :, :, 1].transpose(1, 2))
    assert found.stride() == case.q.stride()
    assert torch.equal(found, expected)


def test_padding_rows_give_zero():
    case = make_case([70, 70], [1, 3])
    out, lse = run(case, sinks=torch.ones(2))
    assert (out[0, :, 1:] == 0).all() and (lse[0, :, 1:] == -torch.inf).all()
    assert (out[0, :, :1] != 0).any() and (out[1] != 0).any()


def test_empty_batch():
    case = make_case([5], [2])
    case.q, case.k, case.v, case.parents, case.lens = case.q[:0], case.k[:0], case.v[:0], [], []
    assert run(case)[0].shape == (0, 2, 2, 64)


# ==== the row rule ====


def assert_row_rule(case: Case, nodes=None, **options):
    """A node has the bits of plain decoding: its path committed, one row."""
    out, lse = run(case, **options)
    for b, parents in enumerate(case.parents):
        for node in range(len(parents)) if nodes is None else [n for n in nodes if n < len(parents)]:
            slots = visible_slots(case, b, node)
            q = case.q[b : b + 1, :, node : node + 1]
            k, v = (cache[b : b + 1, :, slots] for cache in (case.k, case.v))
            row, row_lse = run(Case(q, k, v, [[-1]], [len(slots) - 1]), **options)
            assert torch.equal(out[b, :, node], row[0, :, 0]), (b, node)
            assert torch.equal(lse[b, :, node], row_lse[0, :, 0]), (b, node)


@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.float16, torch.bfloat16], ids=str)
def test_row_rule_at_a_tile_boundary(dtype):
    assert_row_rule(make_case([62, 5], [7, 4], heads=3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float16), slow(torch.bfloat16)], ids=str)
def test_row_rule_at_a_chunk_boundary(dtype):
    assert_row_rule(make_case([510], [6], heads=4, dtype=dtype, seed=3))


@pytest.mark.parametrize("options", [slow({"window": 3}), {"window": 66, "sinks": SINKS}, {"softcap": 8.0}], ids=str)
def test_row_rule_with_options(options):
    assert_row_rule(make_case([130], [6], heads=3, head_dim=80), **options)


def test_row_rule_on_a_wide_group():
    assert_row_rule(make_case([64], [3], heads=17))


def test_row_rule_where_chunks_become_long():
    assert_row_rule(make_case([4094], [4], heads=1, dtype=torch.float16), nodes=[0, 3])


@pytest.mark.parametrize("options", [{}, slow({"window": 70})], ids=str)
def test_row_rule_on_chains(options):
    """Whose blocks are folded as one: two of them here, one across tiles, and one that ends in padding."""
    case = make_case([61, 250], [20, 9], heads=4, dtype=torch.float16)
    case.parents = [list(range(-1, len(parents) - 1)) for parents in case.parents]
    assert_row_rule(case, nodes=[0, 2, 3, 5, 6, 8, 15, 16, 19], **options)


@pytest.mark.parametrize("prefix", [0, 250])
def test_chains_in_blocks_equal_chains_gathered(prefix):
    """A sibling of the root's child keeps a block of 16 nodes from being a chain: each is then gathered alone."""
    case = chain(prefix, 16, heads=4, dtype=torch.float16)
    out, lse = run(case)
    case.parents[0][15] = 0
    gathered, gathered_lse = run(case)
    assert torch.equal(out[:, :, :15], gathered[:, :, :15]) and torch.equal(lse[:, :, :15], gathered_lse[:, :, :15])
    assert not torch.equal(out[:, :, 15], gathered[:, :, 15])


@pytest.mark.slow
def test_row_rule_on_a_deep_chain():
    assert_row_rule(chain(505, 75, heads=1), nodes=[0, 6, 7, 8, 70, 71, 74])


@pytest.mark.slow
def test_row_rule_on_a_prompt():
    assert_row_rule(chain(70, 200, heads=1, dtype=torch.float16), nodes=[0, 57, 58, 199])


@pytest.mark.slow
def test_row_rule_on_a_large_tree():
    assert_row_rule(make_case([240], [64], heads=4, dtype=torch.bfloat16), nodes=[0, 1, 15, 16, 40, 63])


# ==== slots that a row may not see ====


@pytest.mark.parametrize("window", [None, 3])
def test_rows_may_be_the_later_nodes_of_a_tree(window):
    case = make_case([62], [40], heads=3)
    whole = run(case, window=window)
    for first, end in ((1, 2), (30, 33), (36, 40)):
        rows = (case.q[:, :, first:end], case.k, case.v, case.bits[:, first:end], torch.tensor([62], dtype=torch.int32))
        later = tree_attention(*(to_device(each, DEVICE) for each in rows), 0.125, None, window, None)
        for found, expected in zip(later, whole, strict=True):
            assert torch.equal(found.cpu(), expected[:, :, first:end])


def test_other_branches_may_be_nan():
    case = make_case([70], [4])
    case.parents = [[-1, 0, 0, 2]]
    expected, _ = run(case)
    case.k[:, :, 71], case.v[:, :, 71] = torch.nan, torch.nan
    out, _ = run(case)
    assert out[:, :, 1].isnan().all()
    assert torch.equal(out[:, :, [0, 2, 3]], expected[:, :, [0, 2, 3]])


def test_keys_outside_the_window_change_no_bit():
    case = make_case([200], [5])
    expected, _ = run(case, window=90)
    assert expected.isfinite().all()
    case.k[:, :, :111], case.v[:, :, :111] = torch.nan, torch.nan  # the root sees 111 and later
    assert torch.equal(run(case, window=90)[0], expected)


@pytest.mark.filterwarnings("ignore:All-NaN")
def test_nan_is_not_hidden():
    case = make_case([70], [2])
    case.q[0, 1, 1] = torch.nan
    out, lse = run(case)
    assert out[0, 1, 1].isnan().all() and lse[0, 1, 1].isnan()
    assert out[0, 0].isfinite().all() and out[0, 1, 0].isfinite().all()
