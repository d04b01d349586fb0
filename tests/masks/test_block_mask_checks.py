"""BlockMask: what it refuses, and its copies."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch

from pyspec import BlockMask

TREE = BlockMask.from_tree([-1, 0, 0])


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "visible must be bool", lambda: BlockMask.from_dense(torch.ones(3, 3))),
        (ValueError, "visible must be", lambda: BlockMask.from_dense(torch.ones(3, dtype=torch.bool))),
        (ValueError, "rows must not", lambda: BlockMask.from_predicate(lambda b, h, i, j: i > j, -1, 3)),
        (TypeError, "predicate must", lambda: BlockMask.from_predicate(lambda b, h, i, j: i - j, 3, 3)),
        (ValueError, "lengths must", lambda: BlockMask.from_documents([3, -1])),
        (ValueError, "lengths must", lambda: BlockMask.from_documents([[3, 1]])),
        (ValueError, "inputs must", lambda: BlockMask.from_documents([3, 1], inputs=[4, 0])),
        (ValueError, "inputs must", lambda: BlockMask.from_documents([3, 1], inputs=[1])),
        (ValueError, "prefix must", lambda: BlockMask.from_documents([3], prefix=-1)),
        (ValueError, "keys must", lambda: BlockMask.from_window(5, 4)),
        (ValueError, "window must", lambda: BlockMask.from_window(5, window=0)),
        (ValueError, "dilation must", lambda: BlockMask.from_window(5, window=2, dilation=0)),
        (ValueError, "global_tokens must", lambda: BlockMask.from_window(5, global_tokens=-1)),
        (ValueError, r"parents\[1\] must", lambda: BlockMask.from_tree([-1, 1, 0])),
        (ValueError, r"parents\[0\] must", lambda: BlockMask.from_tree([0, 0])),
        (ValueError, "parents must", lambda: BlockMask.from_tree(torch.zeros(2, 2))),
        (ValueError, "prefix must", lambda: BlockMask.from_tree([-1, 0], -1)),
        (ValueError, "prefix must", lambda: BlockMask.from_tree([[-1, 0]], [1, 2])),
        (ValueError, "other must", lambda: TREE & BlockMask.from_tree([-1, 0])),
        (ValueError, "mask must be permuted last", lambda: TREE & TREE.permuted()),
        (ValueError, "mask must be permuted last", lambda: TREE.permuted().slice_rows(0, 1)),
        (ValueError, "order must", lambda: TREE.permuted("bfs")),
        (ValueError, 'order must be "rcm"', lambda: BlockMask.from_window(5).permuted("dfs")),
        (ValueError, 'order "rcm" must', lambda: BlockMask.from_window(5, 6).permuted("rcm")),
        (ValueError, "start and stop must", lambda: TREE.slice_rows(2, 4)),
        (ValueError, "keys must", lambda: TREE.slice_rows(0, 2, 4)),
        (ValueError, "masks must", lambda: BlockMask.stack([])),
        (ValueError, "masks must", lambda: BlockMask.stack([TREE, BlockMask.from_window(5)])),
    ],
)
def test_bad_input_names_the_argument(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_masks_of_a_batch_do_not_stack():
    with pytest.raises(ValueError, match="masks must each be"):
        BlockMask.stack([BlockMask.stack([TREE, TREE])])


# ==== copies ====


def _reopened(mask):
    stream = io.BytesIO()
    torch.save(mask, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("copied", [lambda mask: pickle.loads(pickle.dumps(mask)), copy.deepcopy, copy.copy, _reopened])
@pytest.mark.parametrize(
    "mask",
    [
        lambda: BlockMask.from_dense(torch.rand(70, 130) > 0.5),
        lambda: BlockMask.from_window(100, window=7),
        lambda: BlockMask.from_tree([[-1, 0, 0, 2], [-1]], [100, 3]).permuted(),
    ],
)
def test_copies_are_the_same_mask(mask, copied):
    mask = mask()
    found = copied(mask)
    assert torch.equal(found.to_dense(), mask.to_dense()) and repr(found) == repr(mask)
    found.check_current()


def test_a_mask_of_edited_bools_is_not_copied():
    visible = torch.ones(3, 3, dtype=torch.bool)
    mask = BlockMask.from_dense(visible)
    kept = pickle.dumps(mask)
    visible[0] = False
    with pytest.raises(ValueError, match="mask must be built again"):
        pickle.dumps(mask)
    assert pickle.loads(kept).to_dense().all()


# ==== numbers ====


def test_numbers_of_numpy_and_torch_are_sizes_and_trees():
    expected = BlockMask.from_tree([-1, 0, 0], 5).to_dense()
    for parents in (np.array([-1, 0, 0]), torch.tensor([-1, 0, 0]), list(np.array([-1, 0, 0]))):
        assert torch.equal(BlockMask.from_tree(parents, np.int64(5)).to_dense(), expected)
    assert BlockMask.from_window(np.int64(9), window=torch.tensor(2)).rows == 9


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: BlockMask.from_dense([[True]]), TypeError, r"visible must be bool, got \[\[True\]\]"),
        (lambda: BlockMask.from_window(2.5), TypeError, "rows must be an integer, got 2.5"),
        (lambda: BlockMask.from_window(4, window=1.5), TypeError, "window must be an integer, got 1.5"),
        (lambda: BlockMask.from_documents([1.5]), ValueError, r"lengths must be a list of integers .*got \[1.5\]"),
        (lambda: BlockMask.from_tree([-1.0]), TypeError, "parents must be a list, an array or a tensor of integers"),
        (lambda: BlockMask.from_tree([-1, 2**32]), ValueError, "parents must be nodes or -1"),
        (lambda: BlockMask.from_tree([-1], 1.5), TypeError, "prefix must be an integer, got 1.5"),
    ],
)
def test_other_numbers_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
