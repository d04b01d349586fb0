"""bench/head_levels.py times trees of one level more each, behind the same text."""

import head_levels

from pyspec.drafters.eagle3 import Eagle3
from tests.helpers.eagle3_heads import random_head, write_head
from tests.helpers.random_llama import VOCABULARY, random_llama, random_tokens


def test_levels_take_turns(tmp_path, monkeypatch):
    target, grown = random_llama(windows=(None,) * 6), {}
    tensors = random_head(VOCABULARY, target.hidden_size, fc_norm=True)
    head = Eagle3(write_head(tmp_path, tensors, VOCABULARY, taps=(2, 3, 5), fc_norm=True), target).head
    propose = Eagle3.propose

    def counted(self, context, budget):
        tree = propose(self, context, budget)
        grown.setdefault(self.growth.depth, []).append((len(context), int(max(tree.depths))))
        return tree

    monkeypatch.setattr(Eagle3, "propose", counted)
    plain, drafting = head_levels.run(target, head, random_tokens(9), 2, 4)
    assert len(plain) == 4 * head_levels.MOST_LEVELS and all(seconds > 0 for seconds in plain)
    assert {levels: len(seconds) for levels, seconds in drafting.items()} == dict.fromkeys(drafting, 4)
    for levels, seen in grown.items():
        assert seen == [(length, levels) for length in range(10, 14)]
    assert head_levels.matrix_bytes(head) > 0
