import numpy as np
import pytest
import torch

from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree
from tests.helpers.table_drafters import drafter_of

VOCAB = 30


def drafter(vocab_size=VOCAB, fingerprint="tiny"):
    return drafter_of("recycling", vocab_size, fingerprint)


def logits_for(order, vocab_size=VOCAB):
    """[1, V] logits whose best tokens are order, by falling margins."""
    logits = torch.full((1, vocab_size), -50.0)
    for rank, token in enumerate(order):
        logits[0, token] = -float(rank)
    return logits


def taught(rows, **settings):
    """A drafter that knows successors of tokens."""
    made = drafter(**settings)
    for token, order in rows.items():
        made.observe(DraftTree.chain([token]), Verified(logits_for(order, made.vocab_size)), [0])
    return made


def test_children_are_the_best_tokens_best_first():
    order = [9, 3, 11, 4, 20, 21, 22, 23]
    tree = taught({5: [*order, 24, 25]}).propose([5], 16)
    assert tree.tokens.tolist() == [5, *order]
    assert tree.parents.tolist() == [-1] + [0] * 8


def test_paths_go_on_through_known_tokens():
    tree = taught({1: [2], 2: [3], 3: [1]}).propose([1], 16)
    assert any(tree.tokens[node] == 1 for node in range(1, len(tree)) if tree.depths[node] == 3)


def test_unknown_tokens_propose_nothing():
    assert drafter().propose([0], 16).tokens.tolist() == [0]
    assert len(taught({1: [2]}).propose([3], 16)) == 1


def test_the_last_word_on_a_token_wins_also_inside_one_tree():
    made = drafter()
    made.observe(DraftTree([1, 1], [-1, 0]), Verified(torch.cat([logits_for([2]), logits_for([3])])), [0])
    assert made.propose([1], 2).tokens.tolist() == [1, 3]


def test_two_tokens_know_better_than_one():
    made = drafter()
    chain = DraftTree.chain([1, 2, 3, 2])
    made.observe(
        chain, Verified(torch.cat([logits_for([29]), logits_for([10]), logits_for([29]), logits_for([20])])), [0]
    )
    for context, token in [([1, 2], 10), ([3, 2], 20)]:
        tree = made.start(context).propose(context, 3)
        assert token in tree.tokens[1:].tolist()


def test_rejected_nodes_teach_too():
    made = drafter()
    made.observe(
        DraftTree([1, 2, 3], [-1, 0, 0]), Verified(torch.cat([logits_for([4]), logits_for([5]), logits_for([6])])), [0]
    )
    assert made.propose([3], 2).tokens.tolist() == [3, 6]


def test_what_one_request_taught_the_next_one_knows():
    made = drafter()
    made.start([1]).observe(DraftTree.chain([1]), Verified(logits_for([2])), [0])
    assert made.start([1]).propose([1], 2).tokens.tolist() == [1, 2]


def test_a_vocabulary_of_less_than_eight():
    made = taught({1: [2, 0, 1]}, vocab_size=3)
    assert made.propose([1], 4).tokens.tolist() == [1, 2, 0, 2] or made.propose([1], 4).tokens.tolist()[:2] == [1, 2]


def test_tokens_that_cannot_come_are_not_proposed():
    made = drafter()
    logits = torch.full((1, VOCAB), -torch.inf)
    logits[0, 4] = 1.0
    made.observe(DraftTree.chain([1]), Verified(logits), [0])
    assert made.propose([1], 16).tokens.tolist() == [1, 4]


def test_a_bad_token_teaches_nothing():
    made = drafter()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        made.observe(DraftTree.chain([1, VOCAB]), Verified(torch.cat([logits_for([2])] * 2)), [0])
    assert len(made.propose([1], 4)) == 1


# ---- saved tables


def test_saved_and_loaded(tmp_path):
    saved, loaded = taught({1: [2, 3], 2: [5]}), drafter()
    saved.save(tmp_path / "table")
    sequence = loaded.start([1])
    loaded.load(tmp_path / "table")
    for one in (loaded, sequence):
        assert one.propose([1], 16).tokens.tolist() == saved.propose([1], 16).tokens.tolist()
    assert [file.name for file in tmp_path.iterdir()] == ["table"]


def damaged(path, **changes):
    with np.load(path) as archive:
        fields = dict(archive) | changes
    with open(path, "wb") as file:
        np.savez(file, **{name: value for name, value in fields.items() if value is not None})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(format_version=99), "format_version 99.*needs 1"),
        (dict(fingerprint=None), "fingerprint None"),
        (dict(successors_1=None), "no successors_1"),
        (dict(successors_1=np.zeros((VOCAB, 7), np.int32)), r"no successors_1 of shape \[30, 8\]"),
        (dict(successors_1=np.full((VOCAB, 8), VOCAB, np.int32)), r"successors_1 must be in \[-1, 30\)"),
        (dict(successors_2=np.full((65536, 8), VOCAB, np.int32)), r"successors_2 must be in \[-1, 30\)"),
        (dict(levels_1=np.full((VOCAB, 8), 200, np.uint8)), r"levels_1 must be in \[0, 10\)"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(tmp_path, changes, words):
    path = tmp_path / "table"
    taught({1: [9]}).save(path)
    damaged(path, **changes)
    refuses(path, words)


def refuses(path, words, **settings):
    made = taught({1: [2]}, **settings)
    with pytest.raises(ValueError, match=words):
        made.load(path)
    assert made.propose([1], 2).tokens.tolist() == [1, 2]


def test_a_file_of_another_model_or_vocabulary(tmp_path):
    path = tmp_path / "table"
    taught({1: [9]}).save(path)
    refuses(path, "fingerprint tiny.*needs 'other'", fingerprint="other")
    refuses(path, "vocab_size 30.*needs 31", vocab_size=31)


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_file(tmp_path, kept):
    path = tmp_path / "table"
    taught({1: [9]}).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if isinstance(kept, float) else kept])
    refuses(path, "not a saved drafter, or damaged")


def test_other_files(tmp_path):
    (tmp_path / "text").write_text("hello")
    refuses(tmp_path / "text", "not a saved drafter")
    np.save(tmp_path / "array.npy", np.zeros(3))
    refuses(tmp_path / "array.npy", "not a saved drafter")
    with pytest.raises(FileNotFoundError):
        drafter().load(tmp_path / "missing")
