"""A plugin of pytest for kernels that an emulator runs, a hundred times slower: a few cases of every test.

Those that have a backend of their own must not be the reference's, which runs on this machine. Of the others the first
and the last are taken, and one that a hash of their names picks: the same in every run. Hypothesis draws less too.
"""

import zlib
from collections import defaultdict

from hypothesis import is_hypothesis_test, settings

MOST = 3  # of each test function
EXAMPLES = 6


def pytest_collection_modifyitems(config, items):
    cases = defaultdict(list)
    for item in items:
        if "reference" not in item.name:
            cases[item.path, item.originalname].append(item)
    chosen = set()
    for found in cases.values():
        inner = sorted(found[1:-1], key=lambda item: zlib.crc32(item.name.encode()))
        chosen |= {*found[:1], *found[-1:], *inner[: MOST - 2]}
    for item in chosen:
        if is_hypothesis_test(item.obj):
            own = item.obj._hypothesis_internal_use_settings
            item.obj._hypothesis_internal_use_settings = settings(own, max_examples=min(own.max_examples, EXAMPLES))
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]
