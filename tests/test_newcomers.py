"""A drafter, a rule, a controller and a cache, each one file: generate takes them, and they are listed as they are."""

import contextlib
import re
from pathlib import Path

import pytest
import torch

from pyspec import generate
from pyspec.acceptance import RULES
from pyspec.caches import CACHES, cache_from_name
from pyspec.cli import main
from pyspec.controllers import CONTROLLERS
from pyspec.drafters import DRAFTERS
from pyspec.drafters.model import ModelDrafter
from pyspec.drafters.shapes.by_rule import growth_for
from pyspec.measure.drafters import drafters_of
from tests.helpers.fake_drafters import Oracle
from tests.helpers.fake_runner import FakeRunner, ScriptedRunner
from tests.helpers.newcomers import registered_by
from tests.helpers.random_llama import random_llama, random_tokens
from tests.helpers.site import DOCS, PAGES, load_extension

TESTS = Path(__file__).parent
NEWCOMERS = {
    "echo": (DRAFTERS, TESTS / "drafters" / "echo.py"),
    "one_draft": (RULES, TESTS / "acceptance" / "one_draft.py"),
    "halving": (CONTROLLERS, TESTS / "controllers" / "halving.py"),
    "halves": (CACHES, TESTS / "caches" / "halves.py"),
}


@pytest.fixture
def newcomers():
    with contextlib.ExitStack() as stack:
        for registry, path in NEWCOMERS.values():
            stack.enter_context(registered_by(registry, path))
        yield


@pytest.mark.parametrize("name", NEWCOMERS)
def test_it_is_listed(name, newcomers, capsys):
    registry, path = NEWCOMERS[name]
    assert len(path.read_text().splitlines()) < 60
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    assert re.search(rf"[{{,\s]{name}[,}}\s]", capsys.readouterr().out)
    filled = [load_extension("registries").filled(text) for text in PAGES.values()]
    assert any(f"| {name} | {registry.summaries[name]} |" in page for page in filled)


def test_the_drafter_drafts(newcomers):
    model = ScriptedRunner([97] * 20)
    text = generate(model, [97], drafter="echo", budget=6, max_new_tokens=12)
    assert text.tokens == [97] * 12 and text.stats.mean_accepted_length > 4
    assert "echo" in drafters_of(model) and not DRAFTERS["echo"].learns


def test_the_rule_judges(newcomers):
    model = FakeRunner()
    prompt = list(b"the tree")
    drafter = ModelDrafter(FakeRunner(), model, growth_for("one_draft"))
    text = generate(model, prompt, drafter=drafter, acceptance="one_draft", budget=9, max_new_tokens=20)
    assert text.tokens == generate(model, prompt, drafter=None, max_new_tokens=20).tokens
    assert len(text.stats.accepted_lengths) <= 3 and text.stats.mean_accepted_length > 1.5


def test_the_controller_decides(newcomers):
    model, prompt = FakeRunner(), list(b"the tree")
    text = generate(model, prompt, drafter=Oracle(model), controller="halving", max_new_tokens=60)
    assert text.tokens == generate(model, prompt, drafter=None, max_new_tokens=60).tokens
    assert text.stats.rounds == 1  # as many nodes as a name may ask for
    with pytest.raises(ValueError, match="controller must be one of .*halving, .*, got 'all'"):
        generate(model, prompt, controller="all")


def test_the_cache_keeps(newcomers):
    model, prompt = random_llama(dtype=torch.float32), random_tokens(400)
    (expected,) = model.prefill([prompt])
    (found,) = model.prefill([prompt], cache=cache_from_name("halves"))
    assert not torch.equal(found, expected) and torch.allclose(found, expected, atol=1e-2)
    assert len(generate(model, prompt, cache="halves", max_new_tokens=8).tokens) == 8
    assert cache_from_name("halves").effective_bits(64, 8192) == pytest.approx(16, rel=0.02)


@pytest.mark.parametrize("registry", [DRAFTERS, RULES, CACHES], ids=["drafters", "rules", "caches"])
def test_no_page_keeps_a_list(registry):
    """A table or a list of most of the names is one that somebody would have to keep."""
    for page in (DOCS.parent / "README.md", *DOCS.rglob("*.md")):
        for table in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE):
            named = {name for name in registry if f'"{name}"' in table}
            assert len(named) < len(registry) - 1, f"{page.name} lists {', '.join(sorted(named))}"
