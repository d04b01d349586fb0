"""causal_conv: every instruction set against torch's own convolution of each path in float64, and bits."""

import pytest
import torch

from pyspec import DraftTree
from pyspec.ops import Round, causal_conv
from tests.helpers.every_backend import KERNELS, each_backend, each_kernel
from tests.helpers.rounds import chain_round, random_tree, root_path

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SEQUENCES, NODES = 4, 20
run, kernel = each_backend(causal_conv), each_kernel(causal_conv)


def layer(channels=48, taps=4, has_bias=True):
    """weight, bias, and a window and a record that are full of NaN but for the window of sequence 2."""
    torch.manual_seed(channels + taps)
    window = torch.full((SEQUENCES, taps - 1, channels), torch.nan)
    window[2] = torch.randn(taps - 1, channels)
    record = torch.full((2, SEQUENCES, NODES, channels), torch.nan)
    return torch.randn(taps, channels), torch.randn(channels) if has_bias else None, window, record


def expected(before, inputs, weight, bias, is_linear=False):
    """[n, channels] of a text, by torch in float64; before [taps - 1, channels]."""
    text = torch.cat((before, inputs)).double().T[None]
    filters = weight.double().T[:, None]
    out = torch.nn.functional.conv1d(text, filters, None if bias is None else bias.double(), groups=len(filters))
    return (out if is_linear else torch.nn.functional.silu(out))[0].T


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("channels, taps, has_bias", [(48, 4, True), (16, 1, False), (528, 2, True), (272, 8, True)])
def test_each_path_is_a_convolution(run, channels, taps, has_bias, dtype):
    weight, bias, window, record = layer(channels, taps, has_bias)
    before, tree = window[2].clone(), random_tree(17, seed=taps)
    wide = torch.randn(17, channels + 32)
    x = wide[:, 16:-16]
    round = Round.of([tree], [2], [[]], [1])
    out = run(window, record, x, weight, bias, round, out_dtype=dtype)
    assert out.dtype == dtype and torch.equal(window[2], before)
    assert torch.equal(record[0, 2, :17], x) and record[1].isnan().all() and record[0, 2, 17:].isnan().all()
    for node in range(17):
        path = root_path(tree, node)
        close = {"atol": 8 * TOLERANCE[dtype], "rtol": 4 * TOLERANCE[dtype]}
        torch.testing.assert_close(out[node].double(), expected(before, x[path], weight, bias)[-1], **close)


def test_silu_may_be_left_out(run):
    weight, bias, window, record = layer(taps=3)
    before, inputs = window[2].clone(), torch.randn(7, 48)
    out = run(window, record, inputs, weight, bias, chain_round(7, 2), is_linear=True)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(out.double(), expected(before, inputs, weight, bias, is_linear=True), **close)


@pytest.mark.parametrize("accepted", [0, 1, 2, 3, 7])
def test_a_replay_gives_the_window_of_plain_decoding(run, accepted):
    weight, bias, window, record = layer()
    before, inputs, probe = window[2].clone(), torch.randn(7, 48), torch.randn(2, 48)
    run(window, record, inputs, weight, bias, chain_round(7, 2, half=1))
    out = run(window, record, probe, weight, bias, chain_round(2, 2, range(accepted)))
    assert torch.equal(window[2], torch.cat((before, inputs[:accepted]))[-3:])
    kept = torch.cat((inputs[:accepted], probe))
    torch.testing.assert_close(out.double(), expected(before, kept, weight, bias)[-2:], atol=1e-5, rtol=1e-5)
    for place in (window[[0, 1, 3]], record[:, [0, 1, 3]]):
        assert place.isnan().all()


def test_bits_do_not_depend_on_how_a_text_is_cut(kernel):
    """Prompts in chunks, chains replayed in part, trees and batches: each gives the bits of one node at a time."""
    weight, bias, start, record = layer(272)
    inputs = torch.randn(12, 272)

    window, plain = start.clone(), []
    for row in range(12):
        plain.append(kernel(window, record, inputs[row : row + 1], weight, bias, chain_round(1, 2, advance=True)))
    plain = torch.cat(plain)
    for cuts in ([12], [5, 7], [1, 2, 9]):
        other = start.clone()
        parts = [
            kernel(other, record, part, weight, bias, chain_round(len(part), 2, advance=True))
            for part in inputs.split(cuts)
        ]
        assert torch.equal(torch.cat(parts), plain) and torch.equal(other[2], window[2])

    # the same text as a tree in which every node has a wrong sibling, beside another sequence
    tree = DraftTree([0] * 23, [-1] + [max(0, node - 2) if node % 2 else node - 2 for node in range(1, 23)])
    path = [0, *range(2, 23, 2)]
    rows = torch.randn(5 + 23, 272)
    rows[5:][path] = inputs
    other, record = start.clone(), torch.full((2, SEQUENCES, 23, 272), torch.nan)
    other[0] = 1.0
    both = Round.of([DraftTree.chain([0] * 5), tree], [0, 2], [[], []], [0, 0])
    out = kernel(other, record, rows, weight, bias, both)
    assert torch.equal(out[5:][path], plain) and torch.equal(other[2], start[2])
    after = Round.of([DraftTree.chain([0])], [2], [path], [1])
    kernel(other, record, inputs[:1], weight, bias, after)
    assert torch.equal(other[2], window[2]) and (other[0] == 1.0).all()


def arguments():
    weight, bias, window, record = layer()
    return {
        "window": window,
        "record": record,
        "x": torch.randn(3, 48),
        "weight": weight,
        "bias": bias,
        "round": chain_round(3, 2),
    }


def test_opcheck():
    given = arguments()
    round = given.pop("round")
    args = (*(torch.nan_to_num(tensor) for tensor in given.values()), *round.tensors(), torch.bfloat16)
    torch.library.opcheck(torch.ops.pyspec.causal_conv.default, args)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"x": torch.zeros(3, 32)}, ValueError, r"x must have shape \(3, 48\), got \(3, 32\)"),
        ({"x": torch.zeros(48, 3).T}, ValueError, "x must have a contiguous last"),
        ({"x": torch.zeros(3, 48).half()}, TypeError, "x must be float32"),
        ({"weight": torch.zeros(9, 48)}, ValueError, "weight must be .* got"),
        ({"weight": torch.zeros(4, 40)}, ValueError, "a multiple of 16 channels"),
        ({"window": torch.zeros(4, 2, 48)}, ValueError, r"window must have shape \(4, 3, 48\)"),
        ({"record": torch.zeros(2, 3, 20, 48)}, ValueError, r"record must have shape \(2, 4, 20, 48\)"),
        ({"bias": torch.zeros(47)}, ValueError, "bias must have shape"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    with pytest.raises(error, match=message):
        causal_conv(**arguments() | changed)


@pytest.mark.skipif(not KERNELS, reason="the reference leaves places to torch's own indexing")
@pytest.mark.parametrize(
    "trees, sequences, paths, halves, message",
    [
        ([3], [4], [[]], [0], r"sequences\[0\] is 4, must be in \[0, 4\)"),
        ([1, 2], [1, 1], [[], []], [0, 0], r"sequences\[1\] is 1, must be .* there once"),
        ([3], [-1], [[]], [0], r"sequences\[0\] is -1"),
        ([3], [0], [[0, 20]], [0], r"paths\[0\]\[1\] is 20, must be a recorded node, of 20"),
        ([3], [0], [[0, -2]], [0], r"paths\[0\]\[1\] is -2"),
        ([3], [0], [[-1, 0]], [0], r"paths\[0\]\[1\] is 0"),
        ([3], [0], [[]], [2], r"halves\[0\] must be 0 or 1, got 2"),
        ([2], [0], [[]], [0], "parents must have one entry for each of the 3 rows, got 2"),
    ],
)
def test_places_outside_are_refused_before_anything_is_written(trees, sequences, paths, halves, message):
    given = arguments() | {"window": torch.ones(SEQUENCES, 3, 48), "record": torch.ones(2, SEQUENCES, NODES, 48)}
    given["round"] = Round.of([DraftTree.chain([0] * size) for size in trees], sequences, paths, halves)
    with pytest.raises(RuntimeError, match=message):
        causal_conv(**given)
    assert (given["window"] == 1).all() and (given["record"] == 1).all()


@pytest.mark.skipif(not KERNELS, reason="the reference leaves places to torch's own indexing")
def test_rounds_that_do_not_fit_are_refused():
    given = arguments()
    wide = given | {"x": torch.zeros(21, 48), "round": chain_round(21, 2)}
    with pytest.raises(RuntimeError, match="tree 0 has 21 nodes, the record has room for 20"):
        causal_conv(**wide)
    causal_conv(**wide | {"round": chain_round(21, 2, advance=True)})
    with pytest.raises(RuntimeError, match=r"advances\[0\] must be 0 or 1, got 2"):
        causal_conv(**given | {"round": Round.of([DraftTree.chain([0] * 3)], [2], [[]], [0], advances=[2])})
    star = Round.of([DraftTree([0] * 3, [-1, 0, 0])], [2], [[]], [0], advances=True)
    with pytest.raises(RuntimeError, match="node 2 has parent 0, a chain that is accepted must have the node before"):
        causal_conv(**given | {"round": star})
