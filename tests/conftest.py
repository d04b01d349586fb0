import pytest
from hypothesis import settings

from pyspec.controllers import pays
from pyspec.machine import costs, measured
from tests.helpers.fake_runner import FakeRunner

pytest_plugins = ["tests.helpers.on_gpu"]

settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory):
    """No test reads or writes the user's costs; those of the fake runners are known, so that nothing hangs on time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(pays, "MOST_LOST", 0.0)  # drafting never rests, however long a draft takes
        measured.keep("costs", costs._key(FakeRunner()), {"nodes": [1, 64], "seconds": [1.0, 2.0]})
        yield
