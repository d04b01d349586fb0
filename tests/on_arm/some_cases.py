"""A plugin of pytest for kernels that an emulator runs, a hundred times slower: two cases of every test.

Those that have a backend of their own must not be the reference's, which runs on this machine. Of the others the first
and the last are taken, which differ in all that a test is given. Hypothesis draws less too, and where a test chooses
among instruction sets, it has the one in test.
"""

import os
from collections import defaultdict

from hypothesis import is_hypothesis_test, settings

from tests.helpers import every_backend

EXAMPLES = 4

# Before the tests are imported.
every_backend.KERNELS[:] = [os.environ["PYSPEC_ISA"]]
every_backend.BACKENDS[:] = ["reference", *every_backend.KERNELS]


def pytest_collection_modifyitems(config, items):
    cases = defaultdict(list)
    for item in items:
        if "reference" not in item.name:
            cases[item.path, item.originalname].append(item)
    chosen = {item for found in cases.values() for item in (found[0], found[-1])}
    for item in chosen:
        if is_hypothesis_test(item.obj):
            own = item.obj._hypothesis_internal_use_settings
            item.obj._hypothesis_internal_use_settings = settings(own, max_examples=min(own.max_examples, EXAMPLES))
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]
