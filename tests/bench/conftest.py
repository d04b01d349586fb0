import pytest

from pyspec.measure import results


@pytest.fixture(autouse=True)
def own_results(tmp_path, monkeypatch):
    """No test writes over what was measured."""
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
