"""Drafters that are chosen once a request by its prompt: the text stays, the choice is the file's, and files fit."""

import json

import numpy as np
import pytest

from pyspec import generate
from pyspec.controllers import CONTROLLERS, controller_for, trained
from pyspec.controllers.context_aware import ContextAware
from pyspec.controllers.prompt_features import NAMES
from pyspec.controllers.uniroute import UniRoute
from pyspec.drafters import new_drafter
from pyspec.drafters.several import Several
from pyspec.machine.experience import described
from tests.helpers.fake_drafters import AlwaysWrong, Oracle
from tests.helpers.fake_runner import FakeRunner
from training.routing import clusters, policy

PROMPT = list(b"the tree")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trained, "FOLDER", tmp_path)
    return tmp_path


def write(folder, kind, gains, drafters):
    """A file by which every prompt has the same gains."""
    gains = np.array(gains, float)
    if kind is UniRoute:
        arrays = {"centres": np.zeros((1, len(NAMES))), "scale": np.ones(len(NAMES)), "vectors": gains[None]}
    else:
        arrays = {
            "first": np.zeros((2, len(NAMES))),
            "first_bias": np.zeros(2),
            "second": np.zeros((len(gains) + 1, 2)),
        }
        arrays["second_bias"] = np.append(gains, 0.0)
    trained.write(folder / f"demo_{kind.name}.safetensors", kind.name, json.dumps(drafters), arrays)


@pytest.mark.parametrize("kind", [ContextAware, UniRoute])
@pytest.mark.parametrize("gains, taken", [([0.2, 0.1], 0), ([0.1, 0.2], 1), ([-0.1, -0.2], None)])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_one_drafter_or_none_has_the_request_and_the_text_stays(folder, kind, gains, taken, temperature):
    model = FakeRunner()
    drafters = [AlwaysWrong(model), Oracle(model)]
    write(folder, kind, gains, [described(each) for each in drafters])
    settings = {"max_new_tokens": 40, "temperature": temperature, "seed": 2}
    prompts = [PROMPT, list(b"ab")]
    for name in (kind.name, f"{kind.name}+pays"):
        text = generate(model, prompts, drafter=drafters, controller=name, budget=6, **settings)
        assert text.tokens == generate(FakeRunner(), prompts, drafter=None, **settings).tokens
    text = generate(model, PROMPT, drafter=drafters, controller=kind.name, budget=6, max_new_tokens=40)
    nodes = text.stats.nodes / text.stats.rounds
    assert nodes == 1 if taken is None else nodes > 4
    assert (text.stats.mean_accepted_length > 4) == (taken == 1)


def test_choices_follow_the_prompt_as_they_were_trained():
    features = np.zeros((60, len(NAMES)), np.float32)
    features[:, 0] = np.repeat([-2.0, 0.0, 2.0], 20)
    best = np.repeat([0, 1, 2], 20)  # the third is no drafter
    gains = np.where(best[:, None] == np.arange(2), 0.5, -0.5).astype(np.float32)
    for kind, arrays in ((ContextAware, policy(features, gains)), (UniRoute, clusters(features, gains))):
        made = kind.__new__(kind)
        made.choose_from(arrays, ["a", "b"], ["a", "b"])
        right = np.mean([np.argmax(made.gains(row)) == each for row, each in zip(features, best, strict=True)])
        assert right == 1
        turned = kind.__new__(kind)
        turned.choose_from(arrays, ["a", "b"], ["b", "a"])
        assert turned.gains(features[0]) == pytest.approx(made.gains(features[0])[[1, 0, 2]])


def test_a_drafter_joins_the_clusters_with_a_vector_alone():
    features = np.random.default_rng(0).normal(size=(30, len(NAMES))).astype(np.float32)
    gains = np.random.default_rng(1).normal(size=(30, 3)).astype(np.float32)
    two, three = clusters(features, gains[:, :2]), clusters(features, gains)
    assert (two["centres"] == three["centres"]).all()
    assert two["vectors"] == pytest.approx(three["vectors"][:, :2])


@pytest.mark.parametrize("kind", [ContextAware, UniRoute])
def test_files_for_other_drafters_and_one_drafter_are_refused_before_any_work(folder, kind):
    model = FakeRunner()
    drafters = [new_drafter(name, model) for name in ("lookup", "suffix")]
    write(folder, kind, [0.1, 0.2], [described(drafters[0]), "another"])
    with pytest.raises(ValueError, match="drafters must"):
        generate(model, PROMPT, drafter=drafters, controller=kind.name)
    with pytest.raises(ValueError, match="a list of drafters to choose from"):
        generate(model, PROMPT, drafter="merged", controller=kind.name)
    write(folder, kind, [0.1, 0.2, 0.3], [described(each) for each in drafters])
    with pytest.raises(ValueError, match="must have arrays"):
        generate(model, PROMPT, drafter=drafters, controller=kind.name)
    assert not model.verified


def test_the_choice_of_a_name_stands_in_for_best_arm(folder):
    model = FakeRunner()
    drafters = [new_drafter(name, model) for name in ("lookup", "suffix")]
    write(folder, UniRoute, [0.1, 0.2], [described(each) for each in drafters])
    assert type(controller_for("auto", "uniroute", model, Several(drafters))) is UniRoute
    choosers = {name for name, made in CONTROLLERS.items() if getattr(made, "chooses", False)}
    assert choosers == {"best_arm", "context_aware", "uniroute"}
