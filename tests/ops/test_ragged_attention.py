"""ragged_attention against tree_attention of each tree, bit for bit, and against attention written in float64."""

import itertools

import pytest
import torch

from pyspec import DraftTree
from pyspec.ops import backend, ragged_attention, tree_attention
from tests.helpers.every_backend import each_backend, each_kernel
from tests.helpers.rounds import random_tree

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SINKS = torch.tensor([0.5, -1.0, 3.0, 90.0])
op = each_backend(ragged_attention, "tree_attention")
kernel = each_kernel(ragged_attention, "tree_attention")


def case(sizes, dtype=torch.float32, heads=4, kv_heads=2, head_dim=64, slots=400, chains=(), seed=0):
    """Trees of these sizes, those in chains being chains, each behind a prefix of its own."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    trees = [
        None if not size else DraftTree.chain([0] * size) if index in chains else random_tree(size, index)
        for index, size in enumerate(sizes)
    ]
    rows = sum(sizes)
    starts = [0, *itertools.accumulate(sizes)]
    bits = torch.zeros(rows, (rows + 31) // 32, dtype=torch.int32)
    for first, tree in zip(starts, trees, strict=False):
        if tree is not None:
            words = torch.as_tensor(tree.ancestor_bits)
            bits[first : first + len(tree), : words.shape[1]] = words
    lens = [(97 * (index + 1)) % (slots - size) for index, size in enumerate(sizes)]
    return {
        "q": normal(rows, heads, head_dim),
        "k": normal(len(sizes), kv_heads, slots, head_dim),
        "v": normal(len(sizes), kv_heads, slots, head_dim),
        "ancestor_bits": bits,
        "starts": torch.tensor(starts, dtype=torch.int32),
        "prefix_lens": torch.tensor(lens, dtype=torch.int32),
    }


def by_tree(given, **settings):
    """Each tree by tree_attention."""
    out, starts = torch.empty_like(given["q"]), given["starts"].tolist()
    for index, (first, end) in enumerate(itertools.pairwise(starts)):
        if first < end:
            bits = given["ancestor_bits"][None, first:end, : (end - first + 31) // 32].contiguous()
            keys_values, lens = (given["k"][index, None], given["v"][index, None]), given["prefix_lens"][index, None]
            q = given["q"][first:end].transpose(0, 1)[None]
            out[first:end] = tree_attention(q, *keys_values, bits, lens, **settings)[0].transpose(0, 1)
    return out


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window": 50, "sinks": SINKS},
        {"window": 50, "chunked": True},
        {"window": 128, "chunked": True},
        {"scale": 0.3, "softcap": 5.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(1,), (40,), (3, 0, 33, 1), (130, 7), (0, 65, 129)], ids=str)
def test_each_tree_has_the_bits_that_it_has_alone(kernel, sizes, dtype, settings):
    """Chains of more than 64 nodes go another way; their neighbours are trees, and some sequences sit out."""
    given = case(sizes, dtype, chains=(0, 2))
    assert torch.equal(kernel(**given, **settings), by_tree(given, **settings))


def test_rows_are_those_of_float64(op):
    given = case((5, 0, 70), chains=(2,))
    found = op(**given, window=60, sinks=SINKS)
    q, k, v = (given[key].double() for key in "qkv")
    starts, lens = given["starts"].tolist(), given["prefix_lens"].tolist()
    for index, (first, end) in enumerate(itertools.pairwise(starts)):
        for row in range(first, end):
            bits = given["ancestor_bits"][row].tolist()
            nodes = [node for node in range(end - first) if bits[node // 32] >> node % 32 & 1]
            slots = [*range(lens[index]), *(lens[index] + node for node in nodes)][-60:]
            for head in range(4):
                scores = k[index, head // 2, slots] @ q[row, head] / 8
                weights = torch.cat((scores, SINKS[head, None].double())).softmax(0)[:-1]
                expected = weights @ v[index, head // 2, slots]
                torch.testing.assert_close(found[row, head].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"window": 70, "chunked": True}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_be_the_later_nodes_of_a_tree(op, dtype, options):
    """The keys of those before them are there: each row has the bits that it has among all of its tree."""
    sizes, firsts, ends = (9, 80, 6), (4, 33, 0), (9, 70, 0)
    given = case(sizes, dtype)
    trees = itertools.pairwise(given["starts"].tolist())
    rows = [range(first + a, first + b) for (first, _), a, b in zip(trees, firsts, ends, strict=True)]
    kept = list(itertools.chain(*rows))
    starts = torch.tensor([0, *itertools.accumulate(map(len, rows))], dtype=torch.int32)
    later = given | {"starts": starts} | {name: given[name][kept].contiguous() for name in ("q", "ancestor_bits")}
    whole, found = op(**given, **options)[kept], op(**later, **options)
    if op is ragged_attention:
        assert torch.equal(found, whole)
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 1e-2)


def test_what_does_not_fit():
    given = case((3, 2))
    for name, value, message in (
        ("starts", [0, 4, 3], "starts"),
        ("starts", [1, 3, 5], "starts must"),
        ("prefix_lens", [0, 399], r"prefix_lens\[1\] is 399 and ancestor_bits name node 1, but k has only 400 slots"),
        ("prefix_lens", [-1, 0], r"prefix_lens\[0\] is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            ragged_attention(**given | {name: torch.tensor(value, dtype=torch.int32)})
    bits = given["ancestor_bits"].clone()
    bits[0, 0] |= 1 << 30
    with pytest.raises(ValueError, match=r"prefix_lens\[0\] is 390 and ancestor_bits name node 30, but k has only 400"):
        ragged_attention(**given | {"ancestor_bits": bits, "prefix_lens": torch.tensor([390, 0], dtype=torch.int32)})
    with pytest.raises(ValueError, match="q must be .rows, heads, head_dim. and contiguous"):
        ragged_attention(**given | {"q": given["q"].transpose(0, 1)})
    with pytest.raises(ValueError, match="k must have shape"):
        ragged_attention(**given | {"k": given["k"][:, :, :, :32]})
    with pytest.raises(TypeError, match="starts must be int32"):
        ragged_attention(**given | {"starts": given["starts"].long()})
    with pytest.raises(ValueError, match=r"sinks must have shape \(4,\), got \(2,\)"):
        ragged_attention(**given, sinks=torch.zeros(2))


def test_opcheck():
    given = case((3, 0, 2))
    torch.library.opcheck(torch.ops.pyspec.ragged_attention.default, (*given.values(), 0.125, None, None))


def test_the_reference_refuses_rows_that_are_nobodys():
    given = case((3, 2))
    with backend("reference"), pytest.raises(ValueError, match="starts must ascend from 0 to 5"):
        ragged_attention(**given | {"starts": torch.tensor([0, 4, 3], dtype=torch.int32)})
