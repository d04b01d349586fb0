"""What drafters are worth on some prompts: tokens a round, speed over plain decoding, and the time of drafting.

Two questions. Prompt after prompt, at some temperatures: drafters start empty and keep what they learn, as in a server.
And several drawn answers to one problem, where a drafter starts empty with each problem: the setting of STAND.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pyspec.drafters import DRAFTERS, new_drafter
from pyspec.generate import Generation, check_limits, generate
from pyspec.measure import first_difference, new_table, pyplot, ratio, save_figure
from pyspec.runners import Runner

TEMPERATURES = (0.0, 0.8)
ANSWERS = 4
PROBLEMS = 4  # prompts that several answers are drawn to, of different categories


def drafters_of(model: Runner) -> list[str]:
    """The names of the drafters that this model can have."""
    return [name for name, drafter in DRAFTERS.items() if drafter.fits(model)]


def runs_of(prompts: Sequence, names: Sequence[str], temperatures: Sequence[float], answers: int) -> int:
    """How many texts `measure` makes."""
    problems = len(_problems(prompts)) * answers
    return len(prompts) * (1 + len(names)) * len(temperatures) + problems * len({*names, "recycling"})


def measure(
    model: Runner,
    prompts: Sequence[tuple[str, list[int]]],
    names: Sequence[str],
    *,
    budget: int | str = "auto",
    max_new_tokens: int = 128,
    temperatures: Sequence[float] = TEMPERATURES,
    answers: int = ANSWERS,
    seed: int = 0,
    advance: Callable[[str], None] = lambda name: None,
    **settings,
) -> dict:
    """The figures of drafters, ready for JSON; all engines take turns on each prompt.

    Args:
        prompts: (category, token ids) of each.
        names: of drafters, of DRAFTERS.
        answers: to each of at most 4 problems, prompts of different categories; 0 leaves that question out.
        seed: of the drawn texts; the answers to a problem have seeds from this one on.
        advance: called with the name of the drafter before each text; `runs_of` tells how many there are.
        settings: of generate, others than these. Plain decoding has the rule "exact", whichever the drafters have.

    Returns:
        Under "temperatures", by temperature, then "all" or category, then "plain" or drafter, tokens_per_second,
        speedup, tokens_per_round, draft_share, and how many texts are those of plain decoding (equal) of how many
        (texts). Under "answers", by drafter, the same without a plain decoding, and over_recycling, a ratio of tokens
        a second. Under "texts", by prompt, its category and each run's Stats and first difference from plain decoding.

    Raises:
        ValueError: for a setting that does not fit, before any work.
        RuntimeError: if a text ended by an error.
    """
    check_limits(budget, max_new_tokens)
    unknown = [name for name in names if name not in DRAFTERS]
    if unknown or not names:
        raise ValueError(f"names must be some of {', '.join(DRAFTERS)}, got {unknown or 'none'}")
    if not prompts:
        raise ValueError("prompts must not be empty")
    settings |= dict(budget=budget, max_new_tokens=max_new_tokens)
    for name in names:  # what is computed from the model is not a drafter's speed, nor the first call of a kernel
        _run(model, prompts[0][1], new_drafter(name, model), **settings | {"max_new_tokens": 8})
    categories = [category for category, _ in prompts]
    runs = {
        str(temperature): _in_turn(model, prompts, names, advance, settings | dict(temperature=temperature, seed=seed))
        for temperature in temperatures
    }
    return {
        **settings,
        "seed": seed,
        "prompts": len(prompts),
        "temperatures": {temperature: _by_category(categories, of_names) for temperature, of_names in runs.items()},
        "answers": _answers(model, prompts, names, answers, seed, settings, advance),
        "texts": [
            {"category": category, "temperatures": {name: _text(of_names, place) for name, of_names in runs.items()}}
            for place, category in enumerate(categories)
        ],
    }


def _in_turn(model, prompts, names, advance, settings) -> dict[str, list[Generation]]:
    drafters = {"plain": None} | {name: new_drafter(name, model) for name in names}
    runs: dict[str, list[Generation]] = {name: [] for name in drafters}
    for _, tokens in prompts:
        for name, drafter in drafters.items():
            advance(name)
            own = settings if drafter is not None else settings | {"acceptance": "exact"}
            runs[name].append(_run(model, tokens, drafter, **own))
    return runs


def _run(model: Runner, tokens: list[int], drafter, **settings) -> Generation:
    run = generate(model, tokens, drafter=drafter, **settings)
    if run.finish_reason == "interrupted":
        raise KeyboardInterrupt
    if run.finish_reason == "error":
        raise RuntimeError(run.error)
    return run


def _text(runs: dict[str, list[Generation]], place: int) -> dict[str, dict]:
    plain = runs["plain"][place].tokens
    texts = {name: of_name[place] for name, of_name in runs.items()}
    return {
        name: {"first_difference": first_difference(text.tokens, plain), "stats": text.stats.to_dict()}
        for name, text in texts.items()
    }


def _by_category(categories: list[str], runs: dict[str, list[Generation]]) -> dict[str, dict[str, dict]]:
    found = {}
    for category in ("all", *dict.fromkeys(categories)):
        chosen = [place for place, other in enumerate(categories) if category in ("all", other)]
        plain = [runs["plain"][place] for place in chosen]
        rates = {}
        for name, of_name in runs.items():
            texts = [of_name[place] for place in chosen]
            rates[name] = _figures(texts) | {
                "equal": sum(text.tokens == other.tokens for text, other in zip(texts, plain, strict=True)),
                "texts": len(texts),
            }
            rates[name]["speedup"] = ratio(rates[name]["tokens_per_second"], rates["plain"]["tokens_per_second"])
        found[category] = rates
    return found


def _answers(model, prompts, names, answers, seed, settings, advance) -> dict[str, dict]:
    runs: dict[str, list[Generation]] = {name: [] for name in dict.fromkeys((*names, "recycling"))}
    for tokens in _problems(prompts) if answers else []:
        for name in runs:
            drafter = new_drafter(name, model)
            for answer in range(answers):
                advance(name)
                call = settings | dict(temperature=TEMPERATURES[-1], seed=seed + answer)
                runs[name].append(_run(model, tokens, drafter, **call))
    figures = {name: _figures(texts) for name, texts in runs.items() if texts}
    for row in figures.values():
        row["over_recycling"] = ratio(row["tokens_per_second"], figures["recycling"]["tokens_per_second"])
    return figures


def _problems(prompts: Sequence[tuple[str, list[int]]]) -> list[list[int]]:
    first: dict[str, list[int]] = {}
    for category, tokens in prompts:
        first.setdefault(category, tokens)
    return list(first.values())[:PROBLEMS]


def _figures(runs: Iterable[Generation]) -> dict[str, float]:
    """Over some texts: sums first, then ratios."""
    stats = [run.stats for run in runs]
    lengths = [(length, count) for one in stats for length, count in enumerate(one.accepted_lengths)]
    tokens, seconds = sum(length * count for length, count in lengths), sum(one.decode_seconds for one in stats)
    return {
        "tokens_per_second": ratio(tokens, seconds),
        "tokens_per_round": ratio(tokens, sum(count for _, count in lengths)),
        "draft_share": ratio(sum(one.draft_seconds for one in stats), seconds),
    }


def tables(report: dict) -> Iterable:
    """Tables of rich: one a temperature, and one of the answers."""
    for temperature, categories in report["temperatures"].items():
        names, all_rows = list(categories["all"]), categories["all"].values()
        made = new_table("", *names, title=f"temperature {temperature}: tokens a round, speed over plain decoding")
        for category, rows in categories.items():
            cells = [f"{rows[name]['tokens_per_round']:.2f} {rows[name]['speedup']:.2f}x" for name in names]
            made.add_row(category, *cells, end_section=category == "all")
        made.add_row("tokens/s", *(f"{row['tokens_per_second']:.1f}" for row in all_rows))
        made.add_row("drafting", *(f"{row['draft_share']:.1%}" for row in all_rows))
        made.add_row("same text", *(f"{row['equal']}/{row['texts']}" for row in all_rows))
        yield made
    if report["answers"]:
        title = "several drawn answers to one problem"
        made = new_table("", "tokens a round", "tokens/s", "over recycling", title=title)
        for name, row in report["answers"].items():
            rates = f"{row['tokens_per_round']:.2f}", f"{row['tokens_per_second']:.1f}", f"{row['over_recycling']:.2f}x"
            made.add_row(name, *rates)
        yield made


def plot(report: dict, path: Path) -> None:
    """Speed over plain decoding by category, a panel for each temperature, and the answers, as a picture."""
    plt = pyplot()
    panels = len(report["temperatures"]) + bool(report["answers"])
    figure, axes = plt.subplots(panels, 1, figsize=(12, 3.6 * panels), squeeze=False)
    axes = axes[:, 0].tolist()
    for axis, (temperature, categories) in zip(axes, report["temperatures"].items(), strict=False):
        names = [name for name in categories["all"] if name != "plain"]
        width = 0.85 / len(names)
        for index, name in enumerate(names):
            rates = [rows[name]["speedup"] for rows in categories.values()]
            places = [place + index * width for place in range(len(rates))]
            axis.bar(places, rates, width, label=name, color=plt.get_cmap("tab10")(index))
        ticks = [place + 0.425 - width / 2 for place in range(len(categories))]
        axis.set_xticks(ticks, [category.replace("_", "\n") for category in categories], fontsize=8)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_ylabel("speed over plain")
        axis.set_title(f"temperature {temperature}", fontsize=10, loc="left")
        axis.legend(fontsize=8, ncols=len(names), frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98))
    if report["answers"]:
        rates = [row["over_recycling"] for row in report["answers"].values()]
        bars = axes[-1].bar(list(report["answers"]), rates, color="tab:gray")
        axes[-1].bar_label(bars, [f"{rate:.2f}" for rate in rates], fontsize=8)
        axes[-1].axhline(1, color="black", linewidth=0.8)
        axes[-1].set_ylabel("speed over recycling")
        axes[-1].set_title("several drawn answers to one problem", fontsize=10)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    save_figure(figure, f"{report['model']}, {report['dtype']}, {report['prompts']} prompts", report, path)
