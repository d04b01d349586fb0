import pytest


@pytest.fixture(autouse=True)
def own_results(tmp_path, monkeypatch):
    """No test writes over what was measured."""
    import measure

    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
