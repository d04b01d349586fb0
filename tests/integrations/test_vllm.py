"""vLLM's own calls of a proposer, made by hand: its wheel is large, and needs a GPU to run."""

from types import SimpleNamespace

import numpy as np
import pytest

from pyspec.integrations import vllm as integration

VOCABULARY, LENGTH, DRAFTS = 50, 64, 4


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setattr(integration, "require", lambda *versions: None)
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            num_speculative_tokens=DRAFTS, model="pyspec.integrations.vllm.LookupProposer"
        ),
        model_config=SimpleNamespace(max_model_len=LENGTH, get_vocab_size=lambda: VOCABULARY),
    )


def call(proposer, rows, new=None):
    """One call for rows of tokens, the last of which are new."""
    tokens = np.zeros((8, LENGTH), np.int32)
    for row, text in enumerate(rows):
        tokens[row, : len(text)] = text
    counts = np.array([len(text) for text in rows] + [0] * (8 - len(rows)), np.int32)
    return proposer.propose([text[-1:] for text in rows] if new is None else new, counts, tokens, slot_mappings=None)


REPEATING = [7, 8, 9, 10, 11, 7, 8, 9, 10, 11, 7, 8]


def test_what_repeats_is_drafted_within_the_limits(config):
    proposer = integration.LookupProposer(config)
    assert call(proposer, [REPEATING, [1, 2, 3]])[0] == [9, 10, 11, 7][:DRAFTS]
    long = (REPEATING[:5] * 13)[: LENGTH - 1]
    (drafts,) = call(integration.LookupProposer(config), [long])
    assert drafts == [(REPEATING[:5] * 14)[LENGTH - 1]], "the model's length leaves room for one"
    assert call(proposer, [(REPEATING[:5] * 13)[:LENGTH]]) == [[]]


def test_a_row_without_new_tokens_sits_out_and_goes_on(config):
    proposer = integration.LookupProposer(config)
    call(proposer, [REPEATING])
    drafter = proposer._rows[0][1]
    assert call(proposer, [REPEATING], new=[[]]) == [[]]
    call(proposer, [[*REPEATING, 9]])
    assert proposer._rows[0][1] is drafter


def test_requests_that_change_rows_keep_their_drafters(config):
    proposer = integration.LookupProposer(config)
    first, second = REPEATING, [1, 2, 3, 1, 2]
    call(proposer, [first, second])
    drafters = [proposer._rows[row][1] for row in (0, 1)]
    drafts = call(proposer, [[*second, 3], [*first, 9, 10]])
    assert [proposer._rows[row][1] for row in (0, 1)] == drafters[::-1]
    fresh = [call(integration.LookupProposer(config), [text])[0] for text in ([*second, 3], [*first, 9, 10])]
    assert drafts == fresh
    call(proposer, [[4, 5, 6]])
    assert proposer._rows[0][1] not in drafters and len(proposer._rows) == 1, "requests that ended are forgotten"


def test_suffix_lookup_knows_earlier_requests(config):
    proposer = integration.SuffixProposer(config)
    call(proposer, [[20, 21, 22, 23, 24, 25]])
    assert call(proposer, [[5, 6, 20, 21, 22]])[0][:2] == [23, 24]


def test_the_plugin_is_found_and_may_be_called_again():
    from importlib.metadata import entry_points

    found = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "pyspec"]
    assert found, "pip install pyspec again: the entry point is new"
    for _ in range(2):
        found[0].load()()


def test_other_versions_are_refused():
    with pytest.raises(ImportError, match="vllm"):
        integration.LookupProposer(None) if not _is_supported() else integration.require("vllm", "90", "91")


def _is_supported():
    try:
        integration.require("vllm", "0.33", "0.34")
    except ImportError:
        return False
    return True


def test_the_installed_release_makes_and_calls_it(config, monkeypatch):
    """An optional job: pip install vllm, which needs no GPU for this."""
    pytest.importorskip("vllm")
    monkeypatch.undo()
    from vllm.v1.spec_decode.custom_class_proposer import create_custom_proposer

    proposer = create_custom_proposer(config)
    assert call(proposer, [REPEATING])[0] == [9, 10, 11, 7]
