"""tree_attention: every backend and instruction set against a float64 oracle, and the row rule bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyspec
from pyspec.ops import tree_attention
from pyspec.ops.tree_attention import TREE_HEAD_DIMS, tree_attention_reference
from tests.helpers.every_backend import KERNELS, assert_same, each_backend, each_kernel, on_backend
from tests.helpers.tree_cases import Case, make_case, path_to

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
run, kernel = each_backend(tree_attention), each_kernel(tree_attention)


def oracle(case: Case, scale=None, softcap=None, window=None, sinks=None, chunked=False):
    """Row by row in float64, straight from the parents."""
    batch, heads, nodes, head_dim = case.q.shape
    group = heads // case.k.shape[1]
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    lse = torch.full(case.q.shape[:3], -torch.inf, dtype=torch.float64)
    scale = head_dim**-0.5 if scale is None else scale
    for b in range(batch):
        n = int(case.lens[b])
        for node in range(len(case.parents[b])):
            path = path_to(case.parents[b], node)
            slots = list(range(n)) + [n + j for j in path]
            if window is not None:
                slots = slots[(len(slots) - 1) // window * window :] if chunked else slots[-window:]
            for head in range(heads):
                k = case.k[b, head // group, slots].double()
                scores = k @ case.q[b, head, node].double() * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                values = case.v[b, head // group, slots].double()
                if sinks is not None:
                    scores = torch.cat((scores, sinks[head, None].double()))
                    values = torch.cat((values, torch.zeros(1, head_dim).double()))
                lse[b, head, node] = scores.logsumexp(0)
                out[b, head, node] = scores.softmax(0) @ values
    return out, lse


def check(run, case: Case, tolerance: float | None = None, **options):
    out, lse = run(case.q, case.k, case.v, case.bits, case.lens, return_lse=True, **options)
    expected, expected_lse = oracle(case, **options)
    tolerance = tolerance or TOLERANCE[case.q.dtype]
    assert out.dtype == case.q.dtype and out.shape == case.q.shape
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=max(tolerance, 4e-6), rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", TREE_HEAD_DIMS)
def test_matches_float64(run, dtype, head_dim):
    case = make_case([70, 0, 135], [5, 9, 3], head_dim=head_dim, dtype=dtype)
    check(run, case, TOLERANCE[dtype] * max(1, head_dim // 256))  # scores are sums over the head


@pytest.mark.parametrize("prefix", [0, 1, 63, 64, 65, 1023, 1024, 1025, 2100])
@pytest.mark.parametrize("nodes", [1, 2, 33])
def test_prefix_and_tree_sizes(run, prefix, nodes):
    check(run, make_case([prefix], [nodes], heads=3, kv_heads=1, seed=prefix + nodes))


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (5, 1), (9, 3), (8, 8), (16, 1), (34, 2), (40, 1)])
def test_groups(run, heads, kv_heads):
    check(run, make_case([100, 30], [7, 6], heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [1, 3, 40, 64, 100, 10_000])
def test_window_counts_positions(run, window, dtype):
    check(run, make_case([150, 60], [20, 9], dtype=dtype), window=window)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [1, 3, 40, 64, 100, 128, 10_000])
def test_chunks_begin_at_their_multiples(run, window, dtype):
    check(run, make_case([150, 60, 126], [20, 9, 12], dtype=dtype), window=window, chunked=True)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(run, softcap):
    # a score's error is that of tanh times the cap
    check(run, make_case([90], [6]), tolerance=1e-5, softcap=softcap, scale=0.7)


@pytest.mark.parametrize(
    "options", [{}, {"window": 3}, {"window": 70, "chunked": True}, {"softcap": 2.0, "scale": 0.7}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sink_takes_a_share_of_the_weights(run, dtype, options):
    case, sinks = make_case([150, 3], [20, 9], dtype=dtype), torch.tensor([-60.0, -1.0, 4.0, 60.0])
    check(run, case, tolerance=max(1e-5, TOLERANCE[dtype]), sinks=sinks, **options)


def test_a_sink_far_above_all_scores_leaves_nothing(run):
    case = make_case([5], [3])
    out, lse = run(case.q, case.k, case.v, case.bits, case.lens, return_lse=True, sinks=torch.full((4,), 1e4))
    assert (out == 0).all() and (lse == 1e4).all()


def test_deep_chain_crosses_tiles_and_chunks(run):
    case = make_case([1000], [150], heads=2, kv_heads=1)
    case.parents = [list(range(-1, 149))]
    case.bits = torch.from_numpy(pyspec.DraftTree([0] * 150, case.parents[0]).ancestor_bits)[None]
    check(run, case)


def paged(case: Case, page: int, seed=0):
    """The case's keys and values scattered over shuffled pages."""
    generator = torch.Generator().manual_seed(seed)
    batch, kv_heads, slots, head_dim = case.k.shape
    pages = -(-slots // page)
    order = torch.randperm(batch * pages + 3, generator=generator)[: batch * pages].view(batch, pages)
    stores = []
    for source in (case.k, case.v):
        store = torch.full((batch * pages + 3, kv_heads, page, head_dim), torch.nan, dtype=case.k.dtype)
        for b in range(batch):
            for slot in range(slots):
                store[order[b, slot // page], :, slot % page] = source[b, :, slot]
        stores.append(store)
    return *stores, order.to(torch.int32)


@pytest.mark.parametrize("page", [1, 16, 48, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_equal_contiguous(run, page, dtype):
    case = make_case([130, 20], [9, 12], dtype=dtype)
    k, v, table = paged(case, page)
    expected = run(case.q, case.k, case.v, case.bits, case.lens, return_lse=True)
    found = run(case.q, k, v, case.bits, case.lens, block_table=table, return_lse=True)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_strides(run, dtype):
    case = make_case([75], [6], dtype=dtype)
    expected = run(case.q, case.k, case.v, case.bits, case.lens)
    q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    cache = torch.randn(2, 90, 2, 3, 64).to(dtype)
    k, v = (cache[i, : case.k.shape[2], :, 1].transpose(0, 1)[None] for i in range(2))
    k.copy_(case.k)
    v.copy_(case.v)
    assert_same(run(q, k, v, case.bits, case.lens), expected)


def test_padding_rows_give_zero(run):
    case = make_case([70, 70], [2, 6])
    for sinks in (None, torch.ones(4)):
        out, lse = run(case.q, case.k, case.v, case.bits, case.lens, return_lse=True, sinks=sinks)
        assert (out[0, :, 2:] == 0).all() and (lse[0, :, 2:] == -torch.inf).all()
        assert (out[0, :, :2] != 0).any()


# ==== the row rule ====


def plain_decode(run, case: Case, b: int, node: int, **options):
    """The node's row as plain decoding computes it: its path committed, one row."""
    n, path = int(case.lens[b]), path_to(case.parents[b], node)
    slots = list(range(n)) + [n + j for j in path]
    return run(
        case.q[b : b + 1, :, node : node + 1],
        case.k[b : b + 1, :, slots],
        case.v[b : b + 1, :, slots],
        torch.ones(1, 1, 1, dtype=torch.int32),
        torch.tensor([len(slots) - 1], dtype=torch.int32),
        return_lse=True,
        **options,
    )


def assert_row_rule(run, case: Case, **options):
    out, lse = run(case.q, case.k, case.v, case.bits, case.lens, return_lse=True, **options)
    for b, parents in enumerate(case.parents):
        for node in range(len(parents)):
            row, row_lse = plain_decode(run, case, b, node, **options)
            assert torch.equal(out[b, :, node], row[0, :, 0]), (b, node)
            assert torch.equal(lse[b, :, node], row_lse[0, :, 0]), (b, node)


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_row_rule(data):
    if not KERNELS:
        pytest.skip("no compiled kernel to test")
    heads, kv_heads = data.draw(st.sampled_from([(3, 1), (4, 2), (8, 1), (17, 1)]))
    batch = data.draw(st.integers(1, 3))
    lens = data.draw(
        st.lists(st.sampled_from([0, 1, 62, 63, 64, 130, 600, 1020, 1023, 1024, 1100]), min_size=batch, max_size=batch)
    )
    nodes = data.draw(st.lists(st.integers(1, 40), min_size=batch, max_size=batch))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    head_dim = data.draw(st.sampled_from([64, 80, 128]))
    options = data.draw(
        st.sampled_from([{}, {"window": 5}, {"window": 100}, {"window": 50, "chunked": True}, {"softcap": 20.0}])
    )
    options |= data.draw(st.sampled_from([{}, {"sinks": torch.linspace(-4, 4, heads)}]))
    case = make_case(lens, nodes, heads, kv_heads, head_dim, dtype, seed=data.draw(st.integers(0, 99)))
    with on_backend(data.draw(st.sampled_from(KERNELS))):
        assert_row_rule(tree_attention, case, **options)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_row_rule_on_a_deep_chain(kernel, dtype):
    case = make_case([1015], [90], heads=2, kv_heads=1, dtype=dtype)
    case.parents = [list(range(-1, 89))]
    case.bits = torch.from_numpy(pyspec.DraftTree([0] * 90, case.parents[0]).ancestor_bits)[None]
    assert_row_rule(kernel, case)


def test_thread_count_changes_no_bit(kernel):
    case = make_case([1300, 40], [30, 7], dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(kernel(case.q, case.k, case.v, case.bits, case.lens))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unseen_slots_change_no_bit(run, dtype, window):
    case = make_case([100], [12], dtype=dtype)
    node = 11
    seen = list(range(100)) + [100 + j for j in path_to(case.parents[0], node)]
    if window is not None:
        seen = seen[-window:]
    expected = plain = run(case.q, case.k, case.v, case.bits, case.lens, window=window)[:, :, node]
    hidden = torch.ones(case.k.shape[2], dtype=torch.bool)
    hidden[seen] = False
    # Slots inside another row's view are real keys; only garbage that nobody sees may be NaN for all.
    nobody = torch.ones_like(hidden)
    for other in range(12):
        view = list(range(100)) + [100 + j for j in path_to(case.parents[0], other)]
        nobody[view[-window:] if window is not None else view] = False
    for tensor in (case.k, case.v):
        tensor[:, :, nobody] = torch.nan
        tensor[:, :, hidden & ~nobody] = 37.0
    assert_same(run(case.q, case.k, case.v, case.bits, case.lens, window=window)[:, :, node], expected)
    assert plain.isfinite().all()


def test_other_branches_may_be_nan(run):
    """A NaN in one branch must not reach its siblings, in whatever block of rows they are worked on."""
    case = make_case([70], [4], heads=2, kv_heads=1)
    case.parents = [[-1, 0, 0, 2]]
    case.bits = torch.from_numpy(pyspec.DraftTree([0] * 4, case.parents[0]).ancestor_bits)[None]
    case.k[:, :, 71], case.v[:, :, 71] = torch.nan, torch.nan
    out = run(case.q, case.k, case.v, case.bits, case.lens)
    assert out[:, :, 1].isnan().all()
    if run is tree_attention:  # the reference multiplies by 0, and says so
        assert out[:, :, [0, 2, 3]].isfinite().all()


def test_nan_is_not_hidden(run):
    case = make_case([70], [2])
    case.q[0, 1, 1] = torch.nan
    out, lse = run(case.q, case.k, case.v, case.bits, case.lens, return_lse=True)
    assert out[0, 1, 1].isnan().all() and lse[0, 1, 1].isnan()
    assert out[0, 0].isfinite().all() and out[0, 1, 0].isfinite().all()


def test_large_scores_do_not_overflow(run):
    case = make_case([200], [3])
    case.q *= 300
    found = run(case.q, case.k, case.v, case.bits, case.lens)
    torch.testing.assert_close(found.double(), oracle(case)[0], atol=1e-3, rtol=1e-3)


# ==== the op as torch sees it ====


def arguments(case: Case, **options):
    options = {"scale": 0.125, "softcap": None, "window": None, "block_table": None, **options}
    return (case.q, case.k, case.v, case.bits, case.lens, *options.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    case = make_case([70, 12], [5, 3], dtype=dtype)
    k, v, table = paged(case, 16)
    for args in (
        arguments(case),
        arguments(case, window=9, softcap=3.0),
        (case.q, k, v, *arguments(case, block_table=table)[3:]),
    ):
        torch.library.opcheck(torch.ops.pyspec.tree_attention.default, args)


def test_compiles_as_one_graph():
    case = make_case([70], [5])

    def step(q, k, v, bits, lens):
        return tree_attention(q * 2, k, v, bits, lens, window=20).sum(-1)

    args = (case.q, case.k, case.v, case.bits, case.lens)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*args), step(*args))


def test_empty_batch(run):
    case = make_case([5], [2])
    out = run(case.q[:0], case.k[:0], case.v[:0], case.bits[:0], case.lens[:0])
    assert out.shape == (0, 4, 2, 64)


# ==== bad input ====


def bad(case: Case, **changes):
    args = {"q": case.q, "k": case.k, "v": case.v, "ancestor_bits": case.bits, "prefix_lens": case.lens, **changes}
    return tree_attention(**args)


@pytest.mark.parametrize(
    "error, name, change",
    [
        (TypeError, "q", lambda c: {"q": c.q.double()}),
        (TypeError, "k", lambda c: {"k": c.k.half()}),
        (TypeError, "ancestor_bits", lambda c: {"ancestor_bits": c.bits.long()}),
        (TypeError, "prefix_lens", lambda c: {"prefix_lens": c.lens.long()}),
        (TypeError, "block_table", lambda c: {"block_table": torch.zeros(1, 1)}),
        (ValueError, "q", lambda c: {"q": c.q[0]}),
        (ValueError, "q", lambda c: {"q": c.q[..., :48]}),
        (ValueError, "q", lambda c: {"q": c.q[:, :, :0]}),
        (ValueError, "q", lambda c: {"q": c.q.transpose(2, 3).contiguous().transpose(2, 3)}),
        (ValueError, "k", lambda c: {"k": c.k[:, :0], "v": c.v[:, :0]}),
        (ValueError, "k", lambda c: {"k": c.k.repeat(1, 2, 1, 1)[:, :3], "v": c.v.repeat(1, 2, 1, 1)[:, :3]}),
        (ValueError, "k", lambda c: {"k": c.k.repeat(2, 1, 1, 1), "v": c.v.repeat(2, 1, 1, 1)}),
        (ValueError, "v", lambda c: {"v": c.v[:, :, 1:]}),
        (ValueError, "ancestor_bits", lambda c: {"ancestor_bits": c.bits[:, 1:]}),
        (ValueError, "prefix_lens", lambda c: {"prefix_lens": c.lens.repeat(2)}),
        (ValueError, "scale", lambda c: {"scale": -1.0}),
        (ValueError, "sinks", lambda c: {"sinks": torch.zeros(3)}),
        (ValueError, "sinks", lambda c: {"sinks": torch.zeros(8)[::2]}),
        (TypeError, "sinks", lambda c: {"sinks": torch.zeros(4, dtype=torch.float16)}),
        (ValueError, "softcap", lambda c: {"softcap": 0.0}),
        (ValueError, "window", lambda c: {"window": 0}),
        (ValueError, "window", lambda c: {"chunked": True}),
        (ValueError, "k", lambda c: {"k": c.k.to("meta"), "v": c.v.to("meta")}),
    ],
)
def test_bad_input_names_the_argument(error, name, change):
    case = make_case([20], [4])
    with pytest.raises(error, match=f"^{name} must"):
        bad(case, **change(case))


@pytest.mark.skipif(not KERNELS, reason="the compiled kernel does these checks")
@pytest.mark.parametrize(
    "name, change",
    [
        ("prefix_lens", lambda c: {"prefix_lens": c.lens + 1}),
        ("prefix_lens", lambda c: {"prefix_lens": c.lens - 100}),
        ("ancestor_bits", lambda c: {"ancestor_bits": c.bits | 64}),
        ("block_table", lambda c: {"block_table": torch.tensor([[7]], dtype=torch.int32)}),
        ("block_table", lambda c: {"block_table": torch.tensor([[-1]], dtype=torch.int32)}),
    ],
)
def test_data_that_points_outside_is_refused(name, change):
    case = make_case([20], [4])
    with pytest.raises(RuntimeError, match=name):
        bad(case, **change(case))


def test_unknown_instruction_set_is_an_error(monkeypatch):
    if not KERNELS:
        pytest.skip("no compiled kernel")
    monkeypatch.setenv("PYSPEC_ISA", "z80")
    with pytest.raises(RuntimeError, match="PYSPEC_ISA must be one of"):
        bad(make_case([20], [4]))


def test_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="backend must be one of"), pyspec.backend("fast"):
        pass


def test_backend_that_is_not_there_raises():
    case = make_case([20], [4])
    with pyspec.backend("triton"), pytest.raises(RuntimeError, match="'triton' was asked for"):
        bad(case)


def test_reference_is_the_specification():
    """The public function and the reference agree on a padded, paged, windowed batch."""
    case = make_case([40, 3], [8, 5])
    k, v, table = paged(case, 16)
    expected, _ = tree_attention_reference(case.q, k, v, case.bits, case.lens, 0.125, 9.0, 12, table)
    found = tree_attention(case.q, k, v, case.bits, case.lens, scale=0.125, softcap=9.0, window=12, block_table=table)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-6)
