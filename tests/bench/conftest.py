import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))  # the benchmarks are scripts, not a package


@pytest.fixture(autouse=True)
def own_results(tmp_path, monkeypatch):
    """No test writes over what was measured."""
    import measure

    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
