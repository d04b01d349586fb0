"""The noise of rules and drafts: uniform, independent, and the same between versions."""

import numpy as np
from scipy import stats

from pyspec.sampling.noise import Noise


def test_noise_follows_the_law():
    law = np.array([0.0, 0.5, 1.0, 0.0, 0.02, 0.3, 0.0])
    noise, draws = Noise(5, 17, Noise.ACCEPTANCE), 200_000
    counts = np.bincount([noise.draw(law) for _ in range(draws)], minlength=7)
    assert not counts[law == 0].any()
    assert stats.chisquare(counts[law > 0], draws * law[law > 0] / law.sum()).pvalue > 1e-4


def test_neighbouring_rounds_seeds_and_purposes_are_independent():
    grid = [
        [[Noise(seed, position, purpose).uniform() for purpose in (1, 2)] for position in range(60)]
        for seed in range(60)
    ]
    values = np.array(grid)
    assert stats.kstest(values.ravel(), "uniform").pvalue > 1e-4
    for other in (np.roll(values, 1, 0), np.roll(values, 1, 1), np.roll(values, 1, 2)):
        assert abs(np.corrcoef(values.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(values.size)


def test_noise_stays_the_same_between_versions():
    noise = Noise(2**40 + 1, 12, Noise.ACCEPTANCE)
    assert [noise.draw(np.arange(32.0)) for _ in range(8)] == [19, 31, 20, 12, 25, 9, 28, 14]
    assert 0 < noise.exponential() < 60
