"""Does speculation change one token?

    python bench/equality.py            counts, bench/results/equality.json; exit code 1 if anything differs

In fp32, on Spec-Bench prompts of every category:
  greedy      every drafter gives the tokens of plain decoding by the same runner
  sampled     so it does at temperature 0.8 with one seed, alone and with each warper
  reference   plain greedy tokens are transformers' own choice after the same tokens, wherever its two best logits
              differ by more than 1e-4

Finished prompts are kept, as JSON lines, so that an interrupted run goes on where it was; a change of pyspec or of the
settings starts it over.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata

import peers
import torch
from command_line import parse, parser_of, positive
from recording import record
from resume import Finished, seconds_a_token, work_through

import pyspec
from pyspec import measure
from pyspec.drafters import new_drafter
from pyspec.measure import first_difference, prompts
from pyspec.measure.results import RESULTS

SEED = 2024
SAMPLED = {"temperature 0.8": {"temperature": 0.8}} | {
    f"temperature 0.8, {name}": {"temperature": 0.8, **warpers}
    for name, warpers in {
        "top-p 0.95": {"top_p": 0.95},
        "min-p, typical-p": {"min_p": 0.05, "typical_p": 0.95},
        "penalties": {"repetition_penalty": 1.1, "frequency_penalty": 0.2, "presence_penalty": 0.1},
        "biased, banned and forced tokens": {
            "logit_bias": {32: 2.0},
            "banned_tokens": [101],
            "forced_tokens": [97, 98],
        },
        "Mirostat 1": {"mirostat": 1},
        "Mirostat 2": {"mirostat": {"version": 2, "tau": 5.0, "eta": 0.1}},
        "grammar": {"grammar": {"regex": "[ -~\\n]+"}},
    }.items()
}
LARGEST_TIE = 1e-4  # two logits this close may be ordered either way by two orders of summation
FINISHED = RESULTS / "equality.jsonl"


def check_drafters(
    model, prompt: list[int], drafters: dict, new_tokens: int, budget: int, **sampling
) -> tuple[list[int], dict]:
    """Whether each drafter's tokens equal plain decoding's, and how far its logits were from the plain ones.

    Returns:
        Plain decoding's tokens, and {name: {"difference": None or what is known of the first one, "drift": the largest
        difference of a logit up to there}}.
    """
    settings = {"max_new_tokens": new_tokens, "budget": budget, "seed": SEED, **sampling}
    ((plain,), _) = record(model, [prompt], drafter=None, **settings)
    expected = plain.tokens
    found = {}
    for name, drafter in drafters.items():
        ((drafted,), _) = record(model, [prompt], drafter=drafter, **settings)
        tokens = drafted.tokens
        place = first_difference(tokens, expected)
        # logits after a difference follow another text; the ones that made the difference still belong
        shared = min(len(tokens), len(expected)) if place is None else place + 1
        drifts = [
            float((ours - theirs).abs().max())
            for ours, theirs in zip(drafted.logits[:shared], plain.logits[:shared], strict=False)
        ]
        difference = None
        if place is not None:
            difference = {"place": place, "drift": drifts[-1]}
            if place < min(len(tokens), len(expected)):
                pair = [expected[place], tokens[place]]
                difference |= {
                    "plain_token": pair[0],
                    "drafted_token": pair[1],
                    "plain_logits": plain.logits[place][pair].tolist(),
                    "drafted_logits": drafted.logits[place][pair].tolist(),
                }
        found[name] = {"difference": difference, "drift": max(drifts)}
    return expected, found


def check_reference(dense_model, prompt: list[int], tokens: Sequence[int]) -> dict:
    """Where transformers, given the same tokens so far, would have said another next one.

    Returns:
        {"differences": [{"place", "gap": how far its two best logits are apart}], "near_ties": how many of all places
        have a gap of at most LARGEST_TIE}
    """
    best = peers.logits_along(dense_model, prompt, tokens).topk(2)
    gaps = (best.values[:, 0] - best.values[:, 1]).tolist()
    choices = best.indices[:, 0].tolist()
    return {
        "differences": [
            {"place": place, "gap": gap}
            for place, (gap, choice, token) in enumerate(zip(gaps, choices, tokens, strict=True))
            if choice != token
        ],
        "near_ties": sum(gap <= LARGEST_TIE for gap in gaps),
    }


def summary(lines: list[dict]) -> dict:
    """Counts over all finished prompts; "failed" counts what must not be."""
    kinds: dict[str, dict] = {}
    for line in lines:
        kind = kinds.setdefault(line["kind"], {"prompts": 0, "tokens": 0, "drafters": {}})
        kind["prompts"] += 1
        kind["tokens"] += line["new_tokens"]
        for name, found in line["drafters"].items():
            drafter = kind["drafters"].setdefault(name, {"equal": 0, "failed": 0, "largest_drift": 0.0})
            drafter["equal" if found["difference"] is None else "failed"] += 1
            drafter["largest_drift"] = max(drafter["largest_drift"], found["drift"])
        if "reference" in line:
            reference = kind.setdefault(
                "reference", {"near_ties": 0, "differences": 0, "largest_gap": 0.0, "failed": 0}
            )
            gaps = [difference["gap"] for difference in line["reference"]["differences"]]
            reference["near_ties"] += line["reference"]["near_ties"]
            reference["differences"] += len(gaps)
            reference["largest_gap"] = max([reference["largest_gap"], *gaps])
            reference["failed"] += sum(gap > LARGEST_TIE for gap in gaps)
    return kinds


def failures(kinds: dict[str, dict]) -> int:
    """All that differs and must not."""
    checks = [check for kind in kinds.values() for check in (*kind["drafters"].values(), kind.get("reference"))]
    return sum(check["failed"] for check in checks if check is not None)


def show(kinds: dict[str, dict], lines: list[dict]) -> None:
    for name, kind in kinds.items():
        print(f"{name}: {kind['prompts']} prompts, {kind['tokens']} tokens")
        for drafter, counts in kind["drafters"].items():
            print(
                f"  {drafter}: {counts['equal']} of {kind['prompts']} equal plain decoding; "
                f"its logits differ from the plain ones by at most {counts['largest_drift']:.1e}"
            )
        if "reference" in kind:
            counts = kind["reference"]
            print(
                f"  transformers: {counts['differences']} other tokens (largest gap of its two best logits there "
                f"{counts['largest_gap']:.1e}), {counts['failed']} of them beyond a near tie; "
                f"{counts['near_ties']} near ties in all"
            )
    for line in lines:
        found = {name: found["difference"] for name, found in line["drafters"].items()}
        found |= {
            f"transformers at {difference['place']}": difference
            for difference in line.get("reference", {}).get("differences", [])
            if difference["gap"] > LARGEST_TIE
        }
        for name, difference in found.items():
            if difference is not None:
                print(f"DIFFERENT: question {line['question_id']}, {line['kind']}, {name}: {difference}")


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, devices=True)
    parser.add_argument(
        "--prompts", type=positive, default=50, help="for greedy decoding and the reference; default: 50"
    )
    parser.add_argument("--sampled-prompts", type=positive, default=20, help="default: 20")
    parser.add_argument("--tokens", type=positive, default=128, help="new tokens of greedy decoding; default: 128")
    parser.add_argument("--sampled-tokens", type=positive, default=64, help="default: 64")
    parser.add_argument("--budget", type=positive, default=16, help="tree nodes a round; default: 16")
    parser.add_argument("--model", default="demo", help="as for pyspec.load, of the Llama family; default: demo")
    return parse(parser)


def main() -> int:
    options = arguments()
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with console.status("loading the models"):
        model = pyspec.load(options.model, dtype=torch.float32, device=options.device)
        dense_model = peers.dense_transformers(model)
        drafters = {name: new_drafter(name, model) for name in peers.DRAFTERS}
    new_tokens = {"greedy": options.tokens, **dict.fromkeys(SAMPLED, options.sampled_tokens)}
    counts = {"greedy": options.prompts, **dict.fromkeys(SAMPLED, options.sampled_prompts)}
    asked = prompts.across_categories(prompts.spec_bench(), max(counts.values()))
    questions = {question.question_id: question for question in asked}
    with console.status("compiling"):
        longest = max(len(question.tokens(model)) for question in questions.values())
        model.warm(longest + max(new_tokens.values()) + options.budget)
    units = [
        {"kind": kind, "question_id": question_id}
        for kind, count in counts.items()
        for question_id in list(questions)[:count]
    ]

    def work(unit: dict) -> dict:
        kind, prompt = unit["kind"], questions[unit["question_id"]].tokens(model)
        tokens, found = check_drafters(
            model, prompt, drafters, new_tokens[kind], options.budget, **SAMPLED.get(kind, {})
        )
        reference = {"reference": check_reference(dense_model, prompt, tokens)} if kind == "greedy" else {}
        return {"new_tokens": len(tokens), "drafters": found, **reference}

    def expected_seconds(remaining: list[dict]) -> float:
        tokens = (1 + len(drafters)) * sum(new_tokens[unit["kind"]] for unit in remaining)
        return tokens * seconds_a_token(model, next(iter(questions.values())).tokens(model))

    settings = {
        "tokens": [options.tokens, options.sampled_tokens],
        "budget": options.budget,
        "transformers": metadata.version("transformers"),
        "model": model.fingerprint,
        "device": options.device,
    }
    finished = Finished(FINISHED, settings)
    lines = work_through(units, finished, work, lambda unit: unit["kind"], expected_seconds, console)
    kinds = summary(lines)
    name = "equality" if options.device == "cpu" else "equality_cuda"
    path = measure.save(name, {"machine": measure.machine(), **finished.made_with, "checks": kinds})
    show(kinds, lines)
    failed = failures(kinds)
    print(f"{failed} differences" if failed else "no token differs", f"(wrote {path})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
