"""BlockMask against dense masks written out pair by pair."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyspec import BlockMask, DraftTree
from pyspec.host import compiled
from pyspec.masks import block_mask, tiles

SIZES = st.sampled_from([1, 2, 63, 64, 65, 127, 128, 129, 200])
QUICK = settings(
    max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.fixture(params=[1, 2], ids=["blocks of 64", "blocks of 128"], autouse=True)
def words_per_block(request, monkeypatch):
    """Blocks of 128 rows are what a GPU gets."""
    monkeypatch.setattr(tiles, "words_per_block", lambda rows, device: request.param if rows > 64 else 1)


@pytest.fixture(params=["compiled", "python"])
def builder(request, monkeypatch):
    if request.param == "python":
        for module in (block_mask, tiles):
            monkeypatch.setattr(module, "compiled", lambda: None)
    elif compiled() is None:
        pytest.skip("no compiled module")


def dense_of(sees, rows, keys):
    return torch.tensor([[sees(i, j) for j in range(keys)] for i in range(rows)], dtype=torch.bool).view(rows, keys)


def check(mask: BlockMask, expected: torch.Tensor) -> None:
    """The mask says what the dense one does, every tile is of the right kind, and tiles are listed in order."""
    dense = mask.to_dense()
    assert torch.equal(dense.expand(*dense.shape[:2], *expected.shape[-2:]), expected.expand(dense.shape))
    height = 64 * mask.bits.shape[1]
    kinds = {}
    for kind, ranges, named in (
        ("full", mask.full_ranges, mask.full_tiles),
        ("partial", mask.partial_ranges, mask.partial_tiles[:, 0]),
    ):
        assert ranges.dtype == named.dtype == torch.int32 and ranges.is_contiguous()
        for place in np.ndindex(*ranges.shape[:3]):
            begin, end = ranges[place].tolist()
            listed = named[begin:end].tolist()
            assert listed == sorted(set(listed))
            kinds |= {(*place, tile): kind for tile in listed}
    expected = expected.expand(dense.shape)
    for b, h, block in np.ndindex(*mask.full_ranges.shape[:3]):
        for tile in range(-(-mask.keys // 64)):
            part = expected[b, h, block * height : (block + 1) * height, tile * 64 : tile * 64 + 64]
            is_full = part.all() and part.shape[-1] == 64
            kind = "full" if is_full else "partial" if part.any() else None
            assert kinds.get((b, h, block, tile)) == kind, (block, tile)


def random_dense(rows, keys, seed):
    """Empty, full and partial tiles at random, aligned with nothing."""
    random = np.random.default_rng(seed)
    coarse = random.choice([0.0, 0.0, 1.0, 1.0, 0.3], size=(-(-rows // 64) + 2, -(-keys // 64) + 2))
    fine = np.kron(coarse, np.ones((64, 64)))
    row, key = random.integers(0, 64, 2) * random.integers(0, 2)
    return torch.from_numpy(random.random((rows, keys)) < fine[row : row + rows, key : key + keys])


@pytest.mark.usefixtures("builder")
@QUICK
@given(SIZES, SIZES, st.integers(0, 999))
def test_dense(rows, keys, seed):
    dense = random_dense(rows, keys, seed)
    check(BlockMask.from_dense(dense), dense)


@pytest.mark.usefixtures("builder")
@pytest.mark.parametrize("shape", [(0, 70), (70, 0), (1, 1), (3, 70, 130), (2, 3, 130, 70), (1, 4, 64, 64)])
def test_dense_shapes(shape):
    dense = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
    mask = BlockMask.from_dense(dense)
    assert mask.full_ranges.shape[:2] == (*shape[:-2], *((1, 1)[len(shape) - 2 :]))[:2]
    check(mask, dense[:, None] if dense.dim() == 3 else dense)


@pytest.mark.usefixtures("builder")
def test_dense_that_is_not_contiguous():
    dense = random_dense(200, 130, 0)
    check(BlockMask.from_dense(dense.mT), dense.mT)
    check(BlockMask.from_dense(dense[5:100:3, 1:]), dense[5:100:3, 1:])
    check(BlockMask.from_dense(dense[:1].expand(130, -1)), dense[:1].expand(130, -1))


@pytest.mark.usefixtures("builder")
@pytest.mark.parametrize("value", [False, True])
def test_all_or_nothing(value):
    dense = torch.full((128, 192), value)
    mask = BlockMask.from_dense(dense)
    check(mask, dense)
    assert mask.density == value and len(mask.partial_tiles) == len(mask.bits) == 0
    assert mask.bits.view(torch.int32).shape == (0, mask.bits.shape[1], 128)  # as the Triton kernel reads them


def test_two_runs_of_full_tiles_in_a_row():
    dense = torch.ones(64, 6 * 64, dtype=torch.bool)
    dense[:, 128:192] = False
    dense[::2, 256:320] = False
    mask = BlockMask.from_dense(dense)
    check(mask, dense)
    assert mask.full_tiles.tolist() == [0, 1, 3, 5] and mask.partial_tiles[:, 0].tolist() == [4]


@QUICK
@given(SIZES, SIZES, st.integers(0, 999))
def test_predicate(rows, keys, seed):
    dense = torch.stack([random_dense(rows, keys, seed + i) for i in range(6)]).view(2, 3, rows, keys)
    check(BlockMask.from_predicate(lambda b, h, i, j: dense[b, h, i, j], rows, keys, batch=2, heads=3), dense)
    square = dense_of(lambda i, j: i >= j, rows, keys)
    check(BlockMask.from_predicate(lambda b, h, i, j: i >= j, rows, keys), square)


def test_predicate_of_fewer_dimensions():
    even_key = dense_of(lambda i, j: j % 2 == 0, 70, 130)
    check(BlockMask.from_predicate(lambda b, h, i, j: j % 2 == 0, 70, 130), even_key)
    check(BlockMask.from_predicate(lambda b, h, i, j: torch.tensor(True), 70, 130), torch.ones_like(even_key))
    for rows, keys in ((0, 70), (70, 0)):
        check(BlockMask.from_predicate(lambda b, h, i, j: i >= j, rows, keys), torch.ones(rows, keys) > 0)


def test_predicate_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(tiles, "PREDICATE_PAIRS", 1)
    dense = random_dense(300, 130, 1)
    check(BlockMask.from_predicate(lambda b, h, i, j: dense[i, j], 300, 130), dense)


@pytest.mark.usefixtures("builder")
@QUICK
@given(
    st.lists(st.sampled_from([0, 1, 5, 63, 64, 65, 130]), min_size=1, max_size=5),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 1, 64, 100]),
    st.integers(0, 99),
)
def test_documents(lengths, causal, has_inputs, prefix, seed):
    random = np.random.default_rng(seed)
    inputs = [int(random.integers(0, length + 1)) for length in lengths] if has_inputs else None
    document = [d for d, length in enumerate(lengths) for _ in range(length)]
    first = [sum(lengths[:d]) for d in range(len(lengths))]

    def sees(i, j):
        j -= prefix
        if j < 0:
            return True
        is_input = has_inputs and j < first[document[i]] + inputs[document[i]]
        return document[i] == document[j] and (not causal or j <= i or is_input)

    rows = sum(lengths)
    mask = BlockMask.from_documents(lengths, causal=causal, inputs=inputs, prefix=prefix)
    check(mask, dense_of(sees, rows, rows + prefix))


@pytest.mark.usefixtures("builder")
@QUICK
@given(
    SIZES,
    st.sampled_from([0, 1, 64, 100]),
    st.sampled_from([None, 1, 2, 40, 64, 100, 999]),
    st.sampled_from([1, 2, 3, 64]),
    st.sampled_from([0, 1, 64, 70, 999]),
    st.booleans(),
)
def test_window(rows, more, window, dilation, global_tokens, causal):
    def sees(i, j):
        back = i + more - j
        reach = rows + more if window is None else (window - 1) * dilation
        near = abs(back) <= reach and back % dilation == 0
        return (near or j < global_tokens or i + more < global_tokens) and (not causal or back >= 0)

    mask = BlockMask.from_window(
        rows, rows + more, window=window, dilation=dilation, global_tokens=global_tokens, causal=causal
    )
    check(mask, dense_of(sees, rows, rows + more))


def test_tiles_of_a_window_share_their_bits():
    assert len(BlockMask.from_window(4096, window=256).bits) <= 4
    assert len(BlockMask.from_window(4096).bits) <= 2


@st.composite
def tree_parents(draw):
    nodes = draw(st.sampled_from([1, 2, 40, 64, 65, 130]))
    reach = draw(st.sampled_from([1, 3, 1000]))  # 1 is a chain
    return [-1] + [draw(st.integers(max(0, node - reach), node - 1)) for node in range(1, nodes)]


def dense_tree(parents, prefix, rows=None, keys=None):
    dense = torch.zeros(rows or len(parents), keys or prefix + len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        dense[node, :prefix] = True
        if parent >= 0:
            dense[node] |= dense[parent]
        dense[node, prefix + node] = True
    return dense


@pytest.mark.usefixtures("builder")
@settings(QUICK, max_examples=25)
@given(tree_parents(), st.sampled_from([0, 1, 63, 64, 100, 128]))
def test_tree(parents, prefix):
    check(BlockMask.from_tree(DraftTree([0] * len(parents), parents), prefix), dense_tree(parents, prefix))
    mask = BlockMask.from_tree(parents, prefix).permuted()
    assert torch.equal(mask.to_dense()[0, 0], dense_tree(parents, prefix))


@pytest.mark.usefixtures("builder")
@settings(QUICK, max_examples=15)
@given(st.lists(st.tuples(tree_parents(), st.sampled_from([0, 64, 70])), min_size=1, max_size=3))
def test_trees_of_a_batch(trees):
    rows = max(len(parents) for parents, _ in trees)
    keys = max(len(parents) + n for parents, n in trees)
    expected = torch.stack([dense_tree(parents, n, rows, keys) for parents, n in trees])[:, None]
    mask = BlockMask.from_tree([parents for parents, _ in trees], [n for _, n in trees])
    check(mask, expected)
    assert torch.equal(mask.permuted().to_dense(), expected)


def test_depth_first_order_has_fewer_tiles():
    generator = torch.Generator().manual_seed(0)
    parents = [-1] + [int(torch.randint(max(0, n - 200), n, (1,), generator=generator)) for n in range(1, 1000)]
    mask = BlockMask.from_tree(parents)
    assert mask.permuted().density < mask.density / 1.5


@QUICK
@given(SIZES, SIZES, st.integers(0, 99))
def test_and_or(rows, keys, seed):
    one, two = random_dense(rows, keys, seed), random_dense(rows, keys, seed + 1000)
    check(BlockMask.from_dense(one) & BlockMask.from_dense(two), one & two)
    check(BlockMask.from_dense(one) | BlockMask.from_dense(two), one | two)


def test_and_or_of_a_batch_and_heads():
    a = torch.stack([random_dense(130, 100, seed) for seed in range(2)])[:, None]
    b = torch.stack([random_dense(130, 100, seed) for seed in range(5, 8)])[None]
    check(BlockMask.from_dense(a) & BlockMask.from_dense(b), a & b)
    check(BlockMask.from_dense(b) | BlockMask.from_dense(a[:1]), a[:1] | b)


def test_stack():
    dense = [random_dense(130, 100, seed) for seed in range(3)]
    check(BlockMask.stack([BlockMask.from_dense(d) for d in dense]), torch.stack(dense)[:, None])
    check(BlockMask.stack([BlockMask.from_dense(d) for d in dense], heads=True), torch.stack(dense)[None])


@QUICK
@given(st.data())
def test_slice_rows(data):
    rows, keys = data.draw(SIZES), data.draw(SIZES)
    start = data.draw(st.integers(0, rows))
    stop, some = data.draw(st.integers(start, rows)), data.draw(st.integers(0, keys))
    dense = random_dense(rows, keys, data.draw(st.integers(0, 99)))
    check(BlockMask.from_dense(dense).slice_rows(start, stop), dense[start:stop])
    check(BlockMask.from_dense(dense).slice_rows(start, stop, some), dense[start:stop, :some])


@pytest.mark.parametrize("rows", [1, 100, 300])
def test_reverse_cuthill_mckee(rows):
    pytest.importorskip("scipy", reason="permuted('rcm') is scipy's")
    generator = torch.Generator().manual_seed(rows)
    back = torch.arange(rows)[:, None] - torch.arange(rows)
    shuffle = torch.randperm(rows, generator=generator)
    dense = (back.abs() <= 3)[shuffle][:, shuffle]
    mask = BlockMask.from_dense(dense)
    permuted = mask.permuted()
    assert torch.equal(permuted.to_dense()[0, 0], dense)
    if rows == 300:
        assert permuted.density < 0.7 * mask.density
    batch = torch.stack([dense, back == 0])[:, None]
    assert torch.equal(BlockMask.from_dense(batch).permuted("rcm").to_dense(), batch)


def test_an_edited_dense_mask_is_never_stale():
    dense = torch.ones(70, 70, dtype=torch.bool)
    mask = BlockMask.from_dense(dense)
    mask.check_current()
    derived = [mask.to("cpu"), mask & mask, mask.slice_rows(1, 2), BlockMask.stack([mask, mask])]
    dense[3] = False
    for use in (mask.check_current, lambda: mask & mask, *(other.check_current for other in derived)):
        with pytest.raises(ValueError, match="built again: the dense tensor"):
            use()
    del dense
    mask.check_current()
    with torch.inference_mode():
        BlockMask.from_dense(torch.ones(3, 3, dtype=torch.bool)).check_current()


def test_plot():
    pytest.importorskip("matplotlib").use("Agg")
    axis = BlockMask.from_window(200, window=30).plot()
    assert axis.get_ylim() == (200, 0) and "visited" in axis.get_title()


def test_repr():
    assert "rows=200, keys=200, batch=1, heads=1" in repr(BlockMask.from_window(200))
