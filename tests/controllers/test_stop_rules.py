"""Stop rules: what each says of a level and how it moves; no law of a text changes; what has no laws is refused."""

import numpy as np
import pytest
import torch

from pyspec import generate
from pyspec.acceptance.recursive import recursive_rejection
from pyspec.acceptance.with_replacement import with_replacement
from pyspec.controllers import CONTROLLERS, Controller, Together, controller_for, trained
from pyspec.controllers.adaedl import GAMMA, AdaEDL
from pyspec.controllers.confidence import Confidence
from pyspec.controllers.disco import Disco
from pyspec.controllers.heuristic import FIRST, Heuristic
from pyspec.controllers.moving_threshold import B2, STEP, MovingThreshold
from pyspec.controllers.multi_candidate import MultiCandidate
from pyspec.controllers.stop_rule import StopRule, verified_drafts
from pyspec.controllers.svip import Svip
from pyspec.drafters.model import ModelDrafter
from pyspec.drafters.shapes import Level, Sapling
from pyspec.drafters.shapes.by_rule import growth_for
from pyspec.drafters.shapes.dyspec import DySpecGreedy, DySpecThreshold
from pyspec.drafters.shapes.reranked import TopPaths
from pyspec.drafters.shapes.static import FixedBranching
from pyspec.drafters.shapes.stochastic_beam import StochasticBeam
from pyspec.drafters.table_drafter import TableDrafter
from pyspec.drafters.tables.lookup import Lookup
from pyspec.sampling.noise import Noise
from pyspec.tree import DraftTree
from tests.helpers.enumeration import KINDS, Laws, exact_acceptance, target_law, text_law, total_variation, trees_of
from tests.helpers.fake_runner import FakeRunner
from tests.helpers.trained_files import write_file, write_files

RULES = {name: made for name, made in CONTROLLERS.items() if isinstance(made, type) and issubclass(made, StopRule)}

ONE_DRAFTER = sorted(name for name, made in CONTROLLERS.items() if not getattr(made, "chooses", False))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache folder of its own, and files for trained rules that know nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_files(tmp_path, monkeypatch)


class Drafts:
    """As much of a drafter with laws as a rule touches."""

    goes_on = None
    fingerprint = "fake"


def started(rule, **settings):
    """A rule that has one sequence, in slot 0, and what its drafter asks at every level."""
    controller, drafter = rule(None, Drafts(), None, 64, **settings), Drafts()
    controller.start(0, drafter)
    controller.budgets([0])
    return controller, drafter.goes_on


def level(laws, chances=None, depths=None) -> Level:
    laws = np.array(laws, np.float64)
    chances = np.ones(len(laws)) if chances is None else np.array(chances)
    top = -np.sort(-np.pad(laws, ((0, 0), (0, 8))), axis=1)[:, :8]
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(laws > 0, laws * np.log(laws), 0.0).sum(axis=1)
    depths = np.ones(len(laws), int) if depths is None else np.array(depths)
    return Level(depths, chances, chances, np.pad(top, ((0, 0), (0, 8 - top.shape[1]))), entropy)


SURE, OPEN = [0.98, 0.01, 0.01], [0.4, 0.3, 0.3]


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "policy, judge",
    [
        (FixedBranching((1, 1, 1)), recursive_rejection),
        (FixedBranching((2, 1)), recursive_rejection),
        (FixedBranching((2, 1), "with replacement"), with_replacement),
        (DySpecGreedy(), recursive_rejection),
        (DySpecThreshold(0.2), recursive_rejection),
        (StochasticBeam(2, 2), None),
    ],
    ids=["chain", "tree", "with replacement", "greedy", "threshold", "beam"],
)
def test_the_law_of_the_text_is_the_targets_whatever_stops(name, kind, policy, judge):
    laws = Laws(3, kind)
    if judge is None:  # its waiting times cannot be enumerated: of one sequence of coins after the other
        trees = [grown_by(name, policy, laws, Noise(seed, 0, Noise.DRAFTS))[1] for seed in range(20)]
        assert all(tree.q is not None for tree in trees)
        return
    rounds = trees_of(Stopped(name, policy), laws, 4)
    emitted, _ = text_law(rounds, judge, laws, 4)
    assert total_variation(emitted, target_law(laws, 4)) < 1e-12


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_exact_rule_keeps_the_law_of_chosen_trees_whatever_stops(name):
    laws = Laws(3, "dense")
    rounds = trees_of(Stopped(name, TopPaths(2, 3)), laws, 5)
    emitted, _ = text_law(rounds, exact_acceptance(laws), laws, 4, say_laws=False)
    assert total_variation(emitted, target_law(laws, 4)) < 1e-12


def grown_by(name, policy, laws, noise, budget=6):
    rule, goes_on = started(RULES[name])
    return rule, policy.grow(laws, 0, budget, noise, goes_on)


class Stopped:
    """A policy that a rule, always as new, ends."""

    def __init__(self, name, policy):
        self._name, self._policy = name, policy

    def grow(self, laws, token, budget, noise):
        return grown_by(self._name, self._policy, laws, noise, budget)[1]


@pytest.mark.parametrize("policy", [TopPaths(2, 4), FixedBranching((1,) * 4), DySpecThreshold(0.05), DySpecGreedy()])
def test_nothing_is_drafted_or_asked_for_below_a_node_where_drafting_stops(policy):
    asked = []

    class Counted(Laws):
        def laws(self, tokens, parents, nodes):
            asked.extend(nodes)
            return super().laws(tokens, parents, nodes)

    seen = []

    def goes_on(found: Level):
        seen.append(found)
        return found.depths < 1

    tree = policy.grow(Counted(4, "dense"), 0, 12, Noise(1, 0, Noise.DRAFTS), goes_on)
    assert tree.depths.max() == 1 and set(asked) <= set(range(len(tree)))
    for found in seen:
        assert np.allclose(found.top[:, :4].sum(1), 1) and (np.diff(found.top[:, :4]) <= 0).all()
        assert ((0 <= found.entropy) & (found.entropy <= np.log(4) + 1e-9)).all() and (found.chances <= 1).all()
    assert len(policy.grow(Laws(4, "dense"), 0, 12, Noise(1, 0, Noise.DRAFTS), lambda found: found.depths < 0)) == 1


def test_a_level_is_what_the_laws_say():
    laws = Laws(3, "dense")
    found = []
    sapling = Sapling(laws, 0, 9, goes_on=lambda level: found.append(level) or [True] * len(level.depths))
    for _ in range(2):
        sapling.likeliest([len(sapling) - 1], 2)
        sapling.add(len(sapling) - 1, 1)
    q, below = laws.q(()), laws.q((1,))
    assert found[0].chances == [1.0] and found[1].chances == pytest.approx([q[1]]) and found[1].depths == [1]
    assert found[1].top[0, :3] == pytest.approx(np.sort(below)[::-1])
    assert found[1].entropy[0] == pytest.approx(-(below * np.log(below)).sum())


def test_confidence_goes_on_below_likely_nodes_and_finds_the_threshold_that_tells_right_from_wrong():
    rule, goes_on = started(Confidence)
    assert goes_on(level([OPEN] * 3, [1.0, 0.5, 0.3], [0, 1, 1])).tolist() == [True, True, False]
    right, wrong = chain_of([0.8]), chain_of([0.6])
    for _ in range(10):
        rule.learn([right], [[0, 1]], 0.0, 1.0)
        rule.learn([wrong], [[0]], 0.0, 1.0)
    assert rule.threshold == pytest.approx(0.8)
    for _ in range(300):  # another kind of text
        rule.learn([wrong], [[0, 1]], 0.0, 1.0)
        rule.learn([chain_of([0.2])], [[0]], 0.0, 1.0)
    assert rule.threshold == pytest.approx(0.6)


def test_a_wrong_stop_counts_three_times():
    rule, _ = started(Confidence)
    for chance, path in [(0.9, [0, 1])] * 5 + [(0.5, [0, 1])] * 5 + [(0.5, [0])] * 5 + [(0.1, [0])] * 2:
        rule.learn([chain_of([chance])], [path], 0.0, 1.0)
    # at 0.9 half of the right ones are missed: 1.5; at 0.5 five of seven wrong ones are drafted: 0.71
    assert rule.threshold == pytest.approx(0.5)


def chain_of(chances) -> DraftTree:
    nodes = len(chances) + 1
    return DraftTree(range(nodes), range(-1, nodes - 1), chances=np.cumprod([1.0, *chances]))


def test_judged_drafts_are_those_below_accepted_nodes():
    tree = DraftTree([0, 1, 2, 3], [-1, 0, 0, 1], chances=np.array([1.0, 0.5, 0.4, 0.25]))
    assert list(verified_drafts(tree, [0, 1])) == [(0.5, True), (0.4, False), (0.5, False)]
    assert [right for _, right in verified_drafts(tree, [0, 2])] == [False, True]
    drawn = DraftTree([0, 2], [-1, 0], q=np.array([[0.1, 0.2, 0.7], [1.0, 0, 0]]))
    assert list(verified_drafts(drawn, [0])) == [(pytest.approx(0.7), False)]
    assert not list(verified_drafts(DraftTree([0, 2], [-1, 0]), [0]))


@pytest.mark.parametrize(
    "rule, bound",
    [(MovingThreshold, lambda law: max(law)), (AdaEDL, lambda law: 1 - (GAMMA * entropy(law)) ** 0.5)],
)
def test_moving_thresholds(rule, bound):
    for law in (SURE, OPEN, [0.75, 0.25, 0.0]):
        for threshold in (bound(law) - 0.01, bound(law) + 0.01):
            if 0 < threshold < 1:
                _, goes_on = started(rule, threshold=threshold)
                assert goes_on(level([law])).tolist() == [threshold < bound(law)]
    controller, goes_on = started(rule, threshold=0.7)
    step = (1 - B2) * STEP
    controller.learn([chain_of([0.9] * 4)], [range(5)], 0.0, 1.0)  # all, and nothing stopped it: stays
    assert controller.threshold(0) == pytest.approx(0.7)
    controller.learn([chain_of([0.9] * 4)], [[0]], 0.0, 1.0)  # the rate falls below the target: up
    assert controller.threshold(0) == pytest.approx(0.7 + step)
    for _ in range(20):
        controller.budgets([0])
        goes_on(level([OPEN]))  # the rule ended it
        controller.learn([chain_of([0.9])], [[0, 1]], 0.0, 1.0)
    assert controller.threshold(0) < 0.7  # down, for more could have been drafted
    before = controller.threshold(0)
    controller.learn([DraftTree.chain([0])], [[0]], 0.0, 1.0)
    assert controller.threshold(0) == pytest.approx(before - step)


def entropy(law):
    return -sum(chance * np.log(chance) for chance in law if chance)


def test_texts_have_thresholds_of_their_own_that_can_be_put_back():
    controller, _ = started(AdaEDL)
    controller.start(1, Drafts())
    controller.budgets([0, 1])
    before = controller.snapshot()
    controller.learn([chain_of([0.9] * 4)] * 2, [[0], range(5)], 0.0, 1.0)
    assert controller.threshold(0) > controller.threshold(1)
    controller.restore(before)
    assert controller.threshold(0) == controller.threshold(1)


def test_svip_goes_on_while_the_entropy_is_low():
    _, goes_on = started(Svip, most=0.6)
    laws = [SURE, OPEN, [0.9, 0.1, 0.0]]
    assert goes_on(level(laws)).tolist() == [entropy(law) <= 0.36 for law in laws] == [True, False, True]


@pytest.mark.parametrize("has_laws", [True, False])
def test_the_heuristic_counts(has_laws):
    drafter = Drafts() if has_laws else object()
    controller = Heuristic(None, drafter, None, 16)
    controller.start(0, drafter)
    found = []
    for path in ([0], range(3), range(3), [0, 1]):
        found.append(controller.drafts)
        if has_laws:
            assert controller.nodes == 16
            depths = np.arange(16)
            assert drafter.goes_on(level([OPEN] * 16, depths=depths)).tolist() == (depths < found[-1]).tolist()
        else:
            assert controller.nodes == found[-1] + 1
        controller.learn([DraftTree.chain([1, 2, 3])], [list(path)], 0.0, 1.0)
    assert [*found, controller.drafts] == [FIRST, FIRST - 1, FIRST + 1, FIRST + 3, FIRST + 2]
    controller.learn([DraftTree.chain([1])], [[0]], 0.0, 1.0)  # nothing was drafted
    assert controller.drafts == FIRST + 2


@pytest.mark.parametrize("name", [*ONE_DRAFTER, "adaedl+pays", "heuristic+confidence"])
@pytest.mark.parametrize("acceptance, temperature", [("exact", 0.0), ("exact", 0.8), ("recursive", 0.8)])
def test_texts_are_those_of_plain_decoding(name, acceptance, temperature):
    model = FakeRunner()
    prompts = [list(b"the tree"), list(b"ab")]
    drafter = ModelDrafter(FakeRunner(), model, growth_for(acceptance))
    settings = {"max_new_tokens": 50, "temperature": temperature, "seed": 5}
    text = generate(model, prompts, drafter=drafter, controller=name, acceptance=acceptance, **settings)
    if acceptance == "exact":
        assert text.tokens == generate(FakeRunner(), prompts, drafter=None, **settings).tokens
    assert all(map(len, text.tokens)) and drafter.goes_on is None  # that of each sequence is its own


def test_a_rule_within_what_pays_takes_the_smaller_of_both():
    model = FakeRunner()
    controller = controller_for("auto", "adaedl+pays", model, ModelDrafter(FakeRunner(), model))
    assert isinstance(controller, Together) and [type(each).__name__ for each in controller.controllers] == [
        "AdaEDL",
        "CuttingController",
    ]
    one, other = Controller(9), Controller(4)
    both = Together([one, other])
    assert both.largest == both.nodes == 4 and both.budgets([0, 1]) == [4, 4]
    state = both.snapshot()
    one.largest = 3
    both.restore(state)
    assert one.largest == 9


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_drafter_without_laws_is_refused_before_any_work(name):
    model = FakeRunner()
    with pytest.raises(ValueError, match="laws of its own for a .* got a TableDrafter"):
        generate(model, [97], drafter=TableDrafter([Lookup(model.vocab_size)]), controller=name)
    assert not model.verified and not model.committed


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, float("nan")])
def test_thresholds_outside_of_0_and_1_are_refused(threshold):
    for rule in (Confidence, MovingThreshold, AdaEDL):
        with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\), got"):
            rule(None, Drafts(), None, 8, threshold)
    with pytest.raises(ValueError, match="most must be above 0"):
        Svip(None, Drafts(), None, 8, -abs(threshold))


def test_disco_goes_on_where_its_network_expects_a_right_draft(tmp_path):
    arrays = {
        "first": np.eye(4, Disco.inputs),
        "first_bias": np.zeros(4),
        "second": np.array([10.0, 0, 0, 0]),
        "second_bias": np.array([-6.0]),
    }
    file = write_file(tmp_path / "it", Disco, **arrays)  # sigmoid(10 top - 6) >= 1/2: top from 0.6 on
    _, goes_on = started(Disco, file=file)
    assert goes_on(level([SURE, OPEN, [0.61, 0.39, 0.0], [0.59, 0.41, 0.0]])).tolist() == [True, False, True, False]


def test_multi_candidate_decides_for_a_whole_level_by_its_best_path(tmp_path):
    arrays = {
        "first": np.eye(4, MultiCandidate.inputs, k=1),  # from the best path's chance on
        "first_bias": np.zeros(4),
        "second": np.array([10.0, 0, 0, 0]),
        "second_bias": np.array([-6.0]),
    }
    _, goes_on = started(MultiCandidate, file=write_file(tmp_path / "it", MultiCandidate, **arrays))
    for best in (0.7, 0.5):
        found = level([SURE, OPEN])._replace(paths=np.array([0.1, best]))
        assert goes_on(found).tolist() == [best > 0.6] * 2


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"drafters": "another"}, "trained for another, not for fake"),
        ({"threshold": 1.0}, r"threshold must be in \(0, 1\)"),
        ({"threshold": "much"}, "much"),
        ({"first": np.zeros((4, 3))}, "11 features"),
        ({"second": np.zeros(2**18)}, "at most 1048576 bytes"),
    ],
)
def test_files_that_do_not_fit_are_refused_before_any_work(tmp_path, wrong, words):
    file = write_file(tmp_path / "it", Disco, **wrong)
    with pytest.raises(ValueError, match=words):
        Disco(None, Drafts(), None, 8, file)
    with pytest.raises(ValueError, match="for controller multi_candidate, got disco"):
        MultiCandidate(None, Drafts(), None, 8, write_file(tmp_path / "other", Disco))
    with pytest.raises(FileNotFoundError):
        Disco(None, Drafts(), None, 8, tmp_path / "nowhere")


def test_a_network_is_what_torch_says():
    draw = np.random.default_rng(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1), torch.nn.Sigmoid())
    first, _, second, _ = network
    arrays = {"first": first.weight, "first_bias": first.bias, "second": second.weight[0], "second_bias": second.bias}
    rows = draw.normal(size=(7, 5)).astype(np.float32)
    found = trained.Classifier({name: each.detach().numpy() for name, each in arrays.items()}, 5)(rows)
    assert found == pytest.approx(network(torch.from_numpy(rows))[:, 0].detach().numpy(), rel=1e-5)
