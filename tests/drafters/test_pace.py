"""Levels of a tree are guessed where they pay."""

import numpy as np
import pytest

from pyspec.drafters.pace import RIGHT, Pace
from pyspec.drafters.shapes import Sapling, grow_together
from pyspec.drafters.shapes.reranked import TopPaths
from pyspec.sampling.noise import Noise


class Halves:
    """One token of two is always as likely as the other."""

    vocab_size = 2

    def laws(self, tokens, parents, nodes):
        return np.full((len(nodes), 2), 0.5)


def test_a_level_pays_where_it_saves_more_than_it_takes():
    pace = Pace()
    assert pace.least == 0
    pace.took_level(3.0)
    assert pace.least == 0  # what a token takes is not known
    pace.took_token(10.0)
    assert pace.least == pytest.approx(0.3 / RIGHT)
    pace.took_level(1.0)
    assert pace.least == pytest.approx(0.1 / RIGHT)
    pace.took_level(50.0)  # a busy moment
    assert 0.1 / RIGHT < pace.least < 0.11 / RIGHT
    pace.took_token(20.0)
    assert pace.least < 0.1 / RIGHT


def test_levels_below_unlikely_nodes_are_left_out():
    """Of the likeliest node alone, the chance is halved from level to level."""
    noise = Noise(0, 0, Noise.DRAFTS)
    for least, levels in ((0.0, 6), (0.5, 2), (0.24, 3), (1.1, 1)):
        asked = []
        sapling = Sapling(Halves(), 0, 40, least)
        tree = grow_together(TopPaths(1, 6), {3: sapling}, {3: noise}, asked.append)[3]
        assert len(asked) == levels == len(tree) - 1
