"""llama_layers against a Llama written in float64, and the program against its ops, bit for bit."""

import pytest
import torch

from pyspec import DraftTree
from pyspec.ops import pack_weight
from pyspec.ops.llama_layers import llama_layers, llama_layers_reference
from tests.helpers.every_backend import EACH_BACKEND, EACH_KERNEL, on_backend

LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE, SLOTS, POSITIONS = 2, 4, 2, 64, 80, 112, 90, 100
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
MATRICES = {1: (QKV, HIDDEN), 2: (HIDDEN, HEADS * HEAD_DIM), 4: (2 * INTERMEDIATE, HIDDEN), 5: (HIDDEN, INTERMEDIATE)}
TREES = [DraftTree([1] * 7, [-1, 0, 0, 1, 1, 3, 2]), DraftTree([1] * 3, [-1, 0, 0])]
LENGTHS = [70, 5]


def dense_weights(generator):
    """Per layer, in the op's order: attention_norm, qkv, output, feed_forward_norm, gate_up, down."""
    norm = lambda: 1 + 0.1 * torch.randn(HIDDEN, generator=generator)  # noqa: E731
    return [
        0.1 * torch.randn(MATRICES[place], generator=generator) if place in MATRICES else norm()
        for _ in range(LAYERS)
        for place in range(6)
    ]


def arguments(weight_dtype=torch.float32, dtype=torch.float32, *, biases=True, windows=(0, 40), seed=0):
    """The op's arguments by name, and the weights before they were packed."""
    generator = torch.Generator().manual_seed(seed)
    dense = dense_weights(generator)
    angles = torch.outer(torch.arange(POSITIONS), 100.0 ** -(torch.arange(HEAD_DIM // 2) * 2 / HEAD_DIM))
    rows = sum(map(len, TREES))
    given = {
        "hidden": torch.randn(rows, HIDDEN, generator=generator),
        "weights": [tensor if tensor.dim() == 1 else pack_weight(tensor, weight_dtype).data for tensor in dense],
        "biases": [
            torch.randn(size, generator=generator) if size else torch.empty(0)
            for _ in range(LAYERS)
            for size in ((QKV, 0) if biases else ())
        ],
        "last_norm": 1 + 0.1 * torch.randn(HIDDEN, generator=generator),
        "keys_values": torch.randn(LAYERS, 2, 2, KV_HEADS, SLOTS, HEAD_DIM, generator=generator).to(dtype),
        "cos_sin": torch.stack((angles.cos(), angles.sin()), 1).float(),
        "positions": torch.cat(
            [torch.from_numpy(tree.depths) + length for tree, length in zip(TREES, LENGTHS, strict=True)]
        ).int(),
        "ancestor_bits": [torch.from_numpy(tree.ancestor_bits) for tree in TREES],
        "sequences": [1, 0],
        "lengths": LENGTHS,
        "windows": list(windows),
        "heads": HEADS,
        "intermediate": INTERMEDIATE,
        "epsilon": 1e-5,
    }
    return given, dense


def call(given):
    """A call on copies of what it changes; the output, and the cache after it."""
    given = given | {name: given[name].clone() for name in ("hidden", "keys_values")}
    options = {name: given.pop(name) for name in ("windows", "heads", "intermediate", "epsilon")}
    return llama_layers(*given.values(), **options), given["keys_values"]


def plain_llama(given, dense, tree):
    """One tree in float64: a textbook Llama on the nodes' paths, one node after the other."""
    place, nodes = TREES.index(tree), len(tree)
    first = sum(map(len, TREES[:place]))
    cos, sin = given["cos_sin"].double()[given["positions"].long()][first : first + nodes].unbind(1)
    length, cache = LENGTHS[place], given["keys_values"].double()[:, :, given["sequences"][place]]
    parents = tree.parents.tolist()

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()

    def turn(x):
        low, high = x.chunk(2, -1)
        return torch.cat((low * cos[:, None] - high * sin[:, None], high * cos[:, None] + low * sin[:, None]), -1)

    hidden = given["hidden"].double()[first : first + nodes]
    for layer in range(LAYERS):
        attention_norm, qkv, output, feed_forward_norm, gate_up, down = (
            tensor.double() for tensor in dense[6 * layer :][:6]
        )
        projected = norm(hidden, attention_norm) @ qkv.T
        if given["biases"]:
            projected = projected + given["biases"][2 * layer].double()
        q, k, v = projected.unflatten(1, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], 1)
        q, k = turn(q), turn(k)
        mixed = []
        for node in range(nodes):
            path = [node]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            keys = torch.cat((cache[layer, 0, :, :length], k[path].transpose(0, 1)), 1)
            values = torch.cat((cache[layer, 1, :, :length], v[path].transpose(0, 1)), 1)
            window = given["windows"][layer]
            keys, values = keys[:, -window:], values[:, -window:]
            per_group = q[node].unflatten(0, (KV_HEADS, -1))
            weights = torch.softmax(per_group @ keys.mT / HEAD_DIM**0.5, -1)
            mixed.append((weights @ values).flatten())
        hidden = hidden + torch.stack(mixed) @ output.T
        gate, up = (norm(hidden, feed_forward_norm) @ gate_up.T).chunk(2, -1)
        hidden = hidden + (gate * gate.sigmoid() * up) @ down.T
    return norm(hidden, given["last_norm"])


@pytest.mark.parametrize("backend", EACH_BACKEND)
@pytest.mark.parametrize("biases", [False, True])
def test_equals_a_textbook_llama(backend, biases):
    given, dense = arguments(biases=biases)
    with on_backend(backend):
        out, _ = call(given)
    expected = torch.cat([plain_llama(given, dense, tree) for tree in TREES])
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", EACH_KERNEL)
@pytest.mark.parametrize(
    "weight_dtype, dtype",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.int8, torch.bfloat16)],
    ids=str,
)
def test_the_program_has_the_bits_of_its_ops(name, weight_dtype, dtype, monkeypatch):
    monkeypatch.setenv("PYSPEC_ISA", name)
    given, _ = arguments(weight_dtype, dtype)
    out, cache = call(given)
    by_ops = given | {name: given[name].clone() for name in ("hidden", "keys_values")}
    assert torch.equal(llama_layers_reference(*by_ops.values()), out)
    assert torch.equal(by_ops["keys_values"], cache)


@pytest.mark.parametrize("name", EACH_KERNEL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_of_prompts_have_the_bits_of_trees(name, dtype, monkeypatch):
    """The ops send all through tree_attention; the program sends a long chain through block_masked_attention."""
    monkeypatch.setenv("PYSPEC_ISA", name)
    almost_a_chain = [-1, *range(65), 3, 4]
    for parents in ([-1, *range(74)], almost_a_chain):
        monkeypatch.setitem(globals(), "TREES", [DraftTree([1] * len(parents), parents), TREES[-1]])
        monkeypatch.setitem(globals(), "LENGTHS", [10, 5])
        given, _ = arguments(dtype, dtype)
        out, cache = call(given)
        by_ops = given | {name: given[name].clone() for name in ("hidden", "keys_values")}
        assert torch.equal(llama_layers_reference(*by_ops.values()), out)
        assert torch.equal(by_ops["keys_values"], cache)


def test_only_the_nodes_slots_are_written():
    given, _ = arguments()
    _, cache = call(given)
    for sequence, length, tree in zip(given["sequences"], LENGTHS, TREES, strict=True):
        place = (slice(None), slice(None), sequence, slice(None), slice(length, length + len(tree)))
        assert not torch.equal(cache[place], given["keys_values"][place])
        cache[place] = given["keys_values"][place]
    assert torch.equal(cache, given["keys_values"])


def test_opcheck():
    given, _ = arguments()
    torch.library.opcheck(torch.ops.pyspec.llama_layers.default, tuple(given.values()))


def changed(**changes):
    return lambda given: given | {name: change(given[name]) for name, change in changes.items()}


@pytest.mark.parametrize(
    "change, message",
    [
        (changed(hidden=lambda x: x.double()), "hidden must be float32"),
        (changed(hidden=lambda x: x[1:], positions=lambda x: x[1:]), "hidden must have a row for each node"),
        (changed(weights=lambda x: x[1:]), "weights, biases and windows"),
        (changed(windows=lambda x: x[1:]), "weights, biases and windows"),
        (changed(last_norm=lambda x: x[1:]), "a norm's weight must be float32"),
        (changed(keys_values=lambda x: x[0]), "keys_values must be"),
        (changed(cos_sin=lambda x: x[..., 1:]), "cos_sin must be"),
        (changed(positions=lambda x: x + POSITIONS), r"positions\[0\] is"),
        (changed(ancestor_bits=lambda x: [bits.long() for bits in x]), "ancestor_bits must be int32"),
        (changed(ancestor_bits=lambda x: [x[0] | 1 << 20, x[1]]), "name a node past the last"),
        (changed(lengths=lambda x: [SLOTS - 1, 5]), "does not fit sequence 1 at length 89"),
        (changed(sequences=lambda x: [2, 0]), "does not fit sequence 2"),
        (changed(sequences=lambda x: x[1:]), "sequences and lengths must be one a tree"),
        (changed(heads=lambda x: 3), "heads must be a multiple"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    given, _ = arguments()
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        call(change(given))
