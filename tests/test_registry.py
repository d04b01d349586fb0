"""A registry finds the files of its folder, and of the folders in it, when it is first read."""

import sys

import pytest

MEMBER = """
from {package} import THINGS

THINGS.register("{name}", {member}, "what {name} is")
"""


@pytest.fixture
def things(tmp_path, monkeypatch):
    """The registry of a package of three files, one of them deeper."""
    package = tmp_path / "folder_of_things"
    (package / "deeper").mkdir(parents=True)
    (package / "__init__.py").write_text("from pyspec.registry import Registry\n\nTHINGS = Registry(__name__)\n")
    (package / "deeper" / "__init__.py").write_text("")
    for file, name, member in (("zebra", "ape", 1), ("bear", "cat", 2), ("deeper/ant", "bee", 3)):
        text = MEMBER.format(package=package.name, name=name, member=member)
        (package / f"{file}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield __import__(package.name).THINGS
    for name in [name for name in sys.modules if name.startswith(package.name)]:
        del sys.modules[name]


def test_members(things):
    assert "folder_of_things.zebra" not in sys.modules
    assert dict(things) == {"ape": 1, "bee": 3, "cat": 2} and list(things) == ["ape", "bee", "cat"]
    assert things.summaries["bee"] == "what bee is" and "dog" not in things and len(things) == 3
    things.register("dog", 4, "a newcomer")
    assert things["dog"] == 4
    with pytest.raises(ValueError, match="'cat' is registered in folder_of_things already, as 2"):
        things.register("cat", 5, "another cat")


def test_names(things):
    assert things.named("animal", "cat", "or none") == 2
    with pytest.raises(ValueError, match="animal must be one of ape, bee, cat, or none, got 'dog'"):
        things.named("animal", "dog", "or none")
    with pytest.raises(TypeError, match="animal must be one of ape, bee, cat, or none, got 4"):
        things.named("animal", 4, "or none")
