import torch

from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree
from tests.helpers.table_drafters import drafter_of

VOCAB = 30


def taught(rows):
    drafter = drafter_of("merged", VOCAB)
    for token, following in rows.items():
        logits = torch.full((1, VOCAB), -torch.inf)
        logits[0, following] = 1.0
        drafter.observe(DraftTree.chain([token]), Verified(logits), [0])
    return drafter


def test_recycling_goes_on_below_lookup_and_the_other_way_round():
    context = [1, 2, 8, 3, 4, 9, 1]
    tree = taught({2: 3}).start(context).propose(context, 16)
    edges = {
        (tree.tokens[parent].item(), token.item())
        for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True)
    }
    assert {(1, 2), (2, 8), (2, 3), (3, 4)} <= edges  # 1-2-8 and 3-4 from the context, 2-3 from the table


def test_a_token_of_both_sources_is_one_node_and_comes_first():
    context = [1, 2, 0, 1, 3, 0, 1]
    alone = taught({}).start(context).propose(context, 16)
    both = taught({1: 2}).start(context).propose(context, 16)
    assert alone.tokens[1] == 3  # the more recent of the two
    assert both.tokens[1] == 2
    assert [both.tokens[child].item() for child in both.children(0)] == [2, 3]
