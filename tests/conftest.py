import pytest
from hypothesis import settings

from pyspec.machine.costs import measure_costs
from tests.helpers.fake_runner import FakeRunner

pytest_plugins = ["tests.helpers.on_gpu"]

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory):
    """No test reads or writes the user's own; the fake runners' costs are there, as their clock tells them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        measure_costs(FakeRunner())
        yield
