import numpy as np
import pytest
import torch

from pyspec.sampling.sampler import InvalidLogits, Sampler


def reference_law(logits, temperature, top_k=0, top_p=1.0):
    """The warped law written token by token, in Python floats."""
    scores = [value / temperature for value in logits.double().tolist()]
    weights = [float(np.exp(score - max(scores))) for score in scores]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    if top_k:
        order = order[:top_k]
    total = sum(weights[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        if mass >= top_p and top_p < 1:
            break
        kept.append(token)
        mass += weights[token] / total
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(weights))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.35, 1e-6])
def test_probabilities_are_the_warped_law(temperature, top_k, top_p):
    torch.manual_seed(0)
    logits = torch.randn(60) * 2
    logits[7] = -torch.inf
    law = Sampler(temperature, top_k, top_p, seed=0).probabilities(logits)
    torch.testing.assert_close(
        law, torch.tensor(reference_law(logits, temperature, top_k, top_p), dtype=torch.float64), rtol=1e-12, atol=1e-14
    )


def test_ties_at_the_edge_keep_the_lower_tokens():
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])
    assert Sampler(1.0, top_k=2, seed=0).probabilities(logits).tolist() == [0, 0.5, 0.5, 0, 0]
    assert Sampler(1.0, top_p=0.4, seed=0).probabilities(logits).nonzero().flatten().tolist() == [1, 2]


def test_greedy_takes_the_lowest_of_equal_tokens_and_ignores_the_noise():
    logits = torch.zeros(1000)
    logits[[300, 301, 999]] = 2.0
    assert {Sampler(0.0, seed=seed).draw(logits, position) for seed in range(3) for position in range(5)} == {300}
    assert Sampler().probabilities(logits).nonzero().flatten().tolist() == [300]


@pytest.mark.parametrize(
    "settings",
    [dict(temperature=1.0), dict(temperature=0.7, top_k=6), dict(temperature=1.3, top_p=0.8)],
)
def test_draws_follow_the_law(settings):
    torch.manual_seed(1)
    logits = torch.randn(12) * 1.5
    sampler = Sampler(seed=1234, **settings)
    draws = 40_000
    counts = np.bincount([sampler.draw(logits, position) for position in range(draws)], minlength=12)
    law = sampler.probabilities(logits).numpy()
    assert not counts[law == 0].any()
    expected = draws * law[law > 0]
    assert expected.min() > 5
    statistic = ((counts[law > 0] - expected) ** 2 / expected).sum()
    # chi-square has mean df and variance 2 df; 5 standard deviations
    df = len(expected) - 1
    assert statistic < df + 5 * np.sqrt(2 * df)


def test_draws_at_neighbouring_positions_and_seeds_are_independent():
    logits = torch.zeros(2)
    draws = np.array([[Sampler(1.0, seed=seed).draw(logits, position) for position in range(64)] for seed in range(64)])
    for shifted in (np.roll(draws, 1, axis=0), np.roll(draws, 1, axis=1), draws.T):
        agree = (draws == shifted).sum()
        assert abs(agree - 2048) < 5 * np.sqrt(4096 * 0.25) + 32  # the diagonal of the transpose always agrees


def test_noise_depends_on_seed_and_position_alone():
    torch.manual_seed(2)
    rows = torch.randn(20, 500)
    forward = Sampler(1.0, seed=7)
    in_order = [forward.draw(row, position) for position, row in enumerate(rows)]
    backward = Sampler(1.0, seed=7)
    in_reverse = [backward.draw(rows[position], position) for position in reversed(range(20))]
    assert in_order == in_reverse[::-1]
    assert in_order != [Sampler(1.0, seed=8).draw(row, position) for position, row in enumerate(rows)]


def test_noise_of_a_token_does_not_depend_on_which_tokens_are_kept():
    logits = torch.linspace(0, 1, 300)
    for position in range(200):
        full = Sampler(1.0, seed=3).draw(logits, position)
        if full >= 200:  # the winner among all is the winner among any kept tokens that include it
            assert Sampler(1.0, top_k=100, seed=3).draw(logits, position) == full


def test_draws_stay_the_same_between_versions():
    # a text must come out of its seed again next year: this pins the counter layout and the warp
    logits = torch.arange(32, dtype=torch.float32) / 16
    sampler = Sampler(0.9, top_k=24, top_p=0.95, seed=2**40 + 1)
    assert [sampler.draw(logits, position) for position in range(12)] == [
        21,
        16,
        10,
        13,
        29,
        26,
        30,
        30,
        25,
        19,
        30,
        15,
    ]


def test_tiny_temperature_is_greedy_and_not_nan():
    logits = torch.tensor([1.0, 3.0, 2.9])
    for temperature in (1e-6, 1e-300):
        sampler = Sampler(temperature, seed=0)
        assert sampler.probabilities(logits).tolist() == [0, 1, 0]
        assert sampler.draw(logits, 5) == 1


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.full((4,), -torch.inf)
    logits[2] = -50.0
    assert {Sampler(5.0, seed=0).draw(logits, position) for position in range(50)} == {2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value, word", [(torch.nan, "NaN"), (torch.inf, r"\+inf")])
def test_invalid_logits(temperature, value, word):
    logits = torch.zeros(10)
    logits[4] = value
    with pytest.raises(InvalidLogits, match=word):
        Sampler(temperature, seed=0).draw(logits, 0)
    with pytest.raises(InvalidLogits, match="all -inf"):
        Sampler(temperature, seed=0).draw(torch.full((3,), -torch.inf), 0)


@pytest.mark.parametrize(
    "settings, error, name",
    [
        (dict(temperature=-0.1), ValueError, "temperature"),
        (dict(temperature=float("nan")), ValueError, "temperature"),
        (dict(temperature=float("inf")), ValueError, "temperature"),
        (dict(temperature="hot"), TypeError, "temperature"),
        (dict(top_k=-1), ValueError, "top_k"),
        (dict(top_k=1.5), TypeError, "top_k"),
        (dict(top_p=0.0), ValueError, "top_p"),
        (dict(top_p=1.01), ValueError, "top_p"),
        (dict(top_p=float("nan")), ValueError, "top_p"),
        (dict(seed=-1), ValueError, "seed"),
        (dict(seed=2**64), ValueError, "seed"),
        (dict(seed=1.0), TypeError, "seed"),
        (dict(seed=True), TypeError, "seed"),
    ],
)
def test_bad_settings_are_named(settings, error, name):
    with pytest.raises(error, match=name):
        Sampler(**settings)


def test_a_seed_of_its_own_is_reported_and_repeats():
    sampler = Sampler(1.0)
    assert Sampler(1.0).seed != sampler.seed
    logits = torch.zeros(1000)
    again = Sampler(1.0, seed=sampler.seed)
    assert [sampler.draw(logits, i) for i in range(5)] == [again.draw(logits, i) for i in range(5)]
