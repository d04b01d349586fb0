"""A case of a parametrised test that only the whole suite runs: others of its kind are in the short one."""

import pytest


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)
