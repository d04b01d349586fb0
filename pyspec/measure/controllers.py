"""What controllers are worth on some prompts: rounds are recorded once, and every controller plays the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from pyspec.controllers import CONTROLLERS, LARGEST, Controller, controller_for
from pyspec.controllers.stop_rule import StopRule
from pyspec.drafters import Drafter
from pyspec.generate import check_limits
from pyspec.machine import store
from pyspec.machine.costs import Costs, keep_costs, key_of, measure_costs
from pyspec.machine.running_costs import NODES
from pyspec.measure import new_table, pyplot, ratio, save_figure
from pyspec.measure.replays import Machine, RecordedRound, Recording, Replayed, best_possible, played, record, replay
from pyspec.measure.replays import total as total_of
from pyspec.runners import Runner

PLAIN, BEST_FIXED, ORACLE = "plain", "best fixed", "oracle"


def names_for(model: Runner, drafters: Mapping[str, Drafter]) -> list[str]:
    """The controllers that take these drafters, and the stop rules within what pays."""
    names, stands = [], played(drafters)
    with store.apart():
        for name, made in CONTROLLERS.items():
            try:
                made(_Standing(model), stands, None, LARGEST)
            except ValueError:  # it needs laws, or several drafters
                continue
            names.append(name)
            if isinstance(made, type) and issubclass(made, StopRule):
                names.append(f"{name}+pays")
    return names


def measure(
    model: Runner,
    prompts: Sequence[tuple[str, list[int]]],
    drafters: Mapping[str, Drafter],
    names: Sequence[str] | None = None,
    *,
    costs: Costs | None = None,
    max_new_tokens: int = 128,
    advance: Callable[[str], None] = lambda name: None,
    **settings,
) -> dict:
    """The figures of controllers, ready for JSON.

    Args:
        prompts: (category, token ids) of each; requests in this order.
        drafters: one or more by name, with deterministic proposals; of several the controllers choose.
        names: of controllers, as generate takes them; None for all that take these drafters.
        costs: of a verification by its nodes; None to measure them.
        advance: called with the category of each prompt before it is recorded.
        settings: of generate, others than these.

    Returns:
        Under "categories", by "all" or category, then "plain", controller, "best fixed" or "oracle",
        tokens_per_second, speedup, tokens_per_round and microseconds, what the controller takes a round. "best fixed"
        is the number of nodes that is best for a category, and "oracle" has the best one for every round: nobody
        knows them beforehand. Under "machine_costs" nodes and seconds, under "drafting" plain steps of a proposal and
        of a level, by drafter.

    Raises:
        ValueError: for a setting that does not fit, before any work.
        RuntimeError: if a text ended by an error.
    """
    check_limits("auto", max_new_tokens)
    if not prompts:
        raise ValueError("prompts must not be empty")
    names = names_for(model, drafters) if names is None else list(names)
    with store.apart():
        for name in names:  # whether it takes these drafters
            controller_for("auto", name, _Standing(model), played(drafters))
        costs = measure_costs(model) if costs is None else costs
    recordings: list[Recording] = []
    for category, tokens in prompts:
        advance(category)
        recordings.append(
            record(model, tokens, drafters, nodes=LARGEST, max_new_tokens=max_new_tokens, **settings),
        )
        if recordings[-1].text.finish_reason == "interrupted":
            raise KeyboardInterrupt
    rounds = [recording.rounds for recording in recordings]
    machines = {name: machine_of([one[name] for one in rounds], costs) for name in drafters}
    categories, features = [category for category, _ in prompts], [one.features for one in recordings]
    return {
        **settings,
        "max_new_tokens": max_new_tokens,
        "prompts": len(prompts),
        "machine_costs": [costs.nodes, costs.seconds],
        "drafting": {name: {"proposal": on.proposal, "level": on.level} for name, on in machines.items()},
        "categories": play(model, categories, rounds, drafters, machines, names, features),
    }


def machine_of(texts: Iterable[Sequence[RecordedRound]], costs: Costs) -> Machine:
    """What rounds take by a table of costs in seconds and by what the recorded proposals of one drafter took."""
    plain = costs.seconds[0]
    steps = Costs(costs.nodes, tuple(second / plain for second in costs.seconds))
    rounds = [one for rounds in texts for one in rounds if one.seconds]
    levels = [
        one.seconds / (1 + max(int(one.tree.depths[node]) for node in one.laws)) / plain for one in rounds if one.laws
    ]
    proposals = [one.seconds / plain for one in rounds if len(one.tree) > 1]
    if levels:
        return Machine(steps, level=median(levels))
    return Machine(steps, proposal=median(proposals) if proposals else 0.0)


def play(
    model: Runner,
    categories: Sequence[str],
    texts: Sequence[Mapping[str, Sequence[RecordedRound]]],
    drafters: Mapping[str, Drafter],
    machines: Mapping[str, Machine],
    names: Sequence[str],
    features: Sequence[np.ndarray | None] | None = None,
) -> dict[str, dict[str, dict[str, float]]]:
    """What `measure` says under "categories", of recorded texts; steps of the machines are plain ones.

    features are those of the prompts, where controllers look at them.
    """
    features = [None] * len(texts) if features is None else features
    by_name: dict[str, list[Replayed]] = {}
    tokens = [len(next(iter(text.values()))) for text in texts]
    by_name[PLAIN] = [Replayed(count, count, float(count)) for count in tokens]
    for name in names:
        by_name[name] = list(_requests(name, model, texts, features, drafters, machines))
    fixed = []
    for one in drafters:
        stands = {one: drafters[one]}
        for nodes in NODES:
            alone = [{one: text[one]} for text in texts]
            fixed.append(
                [replay(text, Controller(nodes), {one: machines[one]}, played(stands)) for text in alone],
            )
    chosen: list[Replayed | None] = [None] * len(texts)
    for category in dict.fromkeys(categories):
        places = [place for place, other in enumerate(categories) if other == category]
        best = min(fixed, key=lambda replayed: sum(replayed[place].steps for place in places))
        for place in places:
            chosen[place] = best[place]
    by_name[BEST_FIXED] = chosen
    by_name[ORACLE] = [best_possible(text, machines) for text in texts]
    found = {}
    for category in ("all", *dict.fromkeys(categories)):
        places = [place for place, other in enumerate(categories) if category in ("all", other)]
        found[category] = {
            name: _figures(total_of(of_name[place] for place in places)) for name, of_name in by_name.items()
        }
    return found


def _requests(name, model, texts, features, drafters, machines) -> Iterator[Replayed]:
    """One text after another, the later ones knowing what the earlier ones showed."""
    with store.apart():
        keep_costs(key_of(model, None), next(iter(machines.values())).costs)
        for text, of_prompt in zip(texts, features, strict=True):
            stands = played(drafters)
            controller = controller_for("auto", name, _Standing(model), stands)
            yield replay(text, controller, machines, stands, of_prompt)


def _figures(replayed: Replayed) -> dict[str, float]:
    return {
        "speedup": ratio(replayed.tokens, replayed.steps),
        "tokens_per_round": ratio(replayed.tokens, replayed.rounds),
        "microseconds": 1e6 * ratio(replayed.deciding, replayed.rounds),
    }


class _Standing:
    """A model between two texts: what controllers ask of one."""

    def __init__(self, model: Runner):
        self._model = model

    def __getattr__(self, name: str):
        return getattr(self._model, name)

    def lengths(self) -> list[int]:
        return []


def tables(report: dict) -> Iterator:
    """The table of rich: tokens a second by category."""
    categories = report["categories"]
    plain = report["machine_costs"][1][0]
    names = list(categories["all"])
    made = new_table("tokens a second", *categories)
    for name in names:
        cells = [f"{rows[name]['speedup'] / plain:.1f}" for rows in categories.values()]
        made.add_row(name, *cells, end_section=name in (PLAIN, names[-3]))
    yield made
    made = new_table("", "speedup", "worst category", "of best fixed", "tokens a round", "microseconds a round")
    for name in names:
        row, best = categories["all"][name], categories["all"][BEST_FIXED]
        worst = min(rows[name]["speedup"] for category, rows in categories.items() if category != "all")
        cells = f"{row['speedup']:.3f}", f"{worst:.3f}", f"{ratio(row['speedup'], best['speedup']):.0%}"
        cost = f"{row['microseconds']:.0f}" if name not in (PLAIN, BEST_FIXED, ORACLE) else ""
        made.add_row(name, *cells, f"{row['tokens_per_round']:.2f}", cost, end_section=name in (PLAIN, names[-3]))
    yield made


def plot(report: dict, path: Path) -> None:
    """Speed over plain decoding by category, the oracle behind the controllers, as a picture."""
    plt = pyplot()
    categories = report["categories"]
    names = [name for name in categories["all"] if name not in (PLAIN, ORACLE)]
    figure, axis = plt.subplots(figsize=(13, 4.2))
    width = 0.85 / len(names)
    oracle = [rows[ORACLE]["speedup"] for rows in categories.values()]
    axis.bar([place + 0.425 - width / 2 for place in range(len(oracle))], oracle, 0.88, color="0.9", label=ORACLE)
    for index, name in enumerate(names):
        rates = [rows[name]["speedup"] for rows in categories.values()]
        places = [place + index * width for place in range(len(rates))]
        axis.bar(places, rates, width, label=name, color=plt.get_cmap("tab20")(index))
    ticks = [place + 0.425 - width / 2 for place in range(len(categories))]
    axis.set_xticks(ticks, [category.replace("_", "\n") for category in categories], fontsize=8)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_ylabel("speed over plain")
    axis.legend(fontsize=7, ncols=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    axis.spines[["top", "right"]].set_visible(False)
    what = f"{report['model']}, {report['dtype']}, {', '.join(report['drafting'])}, {report['prompts']} prompts"
    save_figure(figure, what, report, path)
