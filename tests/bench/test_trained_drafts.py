"""bench/trained_drafts.py compares drafts of one text, and stops where one changes it."""

from types import SimpleNamespace

import pytest
import trained_drafts

from tests.helpers.eagle3_heads import random_head, write_head
from tests.helpers.random_llama import VOCABULARY, random_llama, random_tokens


def test_drafts_take_turns(tmp_path):
    target = random_llama(windows=(None,) * 6)
    tensors = random_head(VOCABULARY, target.hidden_size, fc_norm=True)
    head = str(write_head(tmp_path / "head", tensors, VOCABULARY, taps=(2, 3, 5), fc_norm=True))
    drafts = trained_drafts.drafts_of(target, SimpleNamespace(head=[head], small=None, budget=6))
    assert list(drafts) == ["tables", "head, first", "head", "head and tables"] and drafts["head, first"][1] == 2
    found = trained_drafts.run(target, [random_tokens(9), random_tokens(20)], drafts, 12)
    figures = {name: trained_drafts.figures(stats) for name, stats in found.items()}
    assert figures["plain"]["tokens_per_round"] == 1 and figures["plain"]["draft_share"] < 0.5
    assert all(1 <= row["tokens_per_round"] <= 7 and row["tokens_per_second"] > 0 for row in figures.values())


def test_a_changed_text_is_an_error(monkeypatch):
    texts = iter([[1, 2], [1, 3]])
    monkeypatch.setattr(trained_drafts, "generate", lambda *_, **__: SimpleNamespace(tokens=next(texts), stats=None))
    with pytest.raises(RuntimeError, match="head changed the text of a prompt of 3 tokens"):
        trained_drafts.run(None, [[1, 2, 3]], {"head": (object, 2)}, 2)
