"""What two models gain together, what speculative cascades gain, and how fast diverse beams are.

    python bench/cascades.py quality    curves of cost and quality, bench/results/cascades.json
    python bench/cascades.py speed      seconds, bench/results/cascades_speed.json; needs transformers

The large model is the demo, and the small one the demo without the layers that it needs least: nothing is trained. A
text's quality is what the large model says of it: perplexity, and the share of tokens that are its own best ones.
Answers are short sums and copies, right or wrong.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import peers
import torch
from command_line import parse, parser_of, positive

import pyspec
from pyspec import measure
from pyspec.answers.chow import ChowAverage, ChowSum
from pyspec.answers.learned import LearnedRule
from pyspec.answers.quantile import ChowQuantile
from pyspec.drafters import new_drafter
from pyspec.measure import prompts
from pyspec.measure.tasks import tasks
from pyspec.turns.entropy import EntropyTurns
from pyspec.turns.foreal import ForealTurns
from training.answers import Answered, answered, fit, router_of

BEAMS, GROUPS, DIVERSITY = 8, 4, 0.5
TURNS = {
    "entropy": [EntropyTurns(threshold) for threshold in (0.5, 1.0, 1.5, 2.0, 3.0)],
    "foreal": [ForealTurns(probability=probability) for probability in (0.25, 0.5, 1.0)],
}
ALPHAS = (0.1, 0.2, 0.3)


def without_layers(model, skipped):
    """A runner of the other layers, on the same weights."""
    layers = [layer for layer in range(model.layers) if layer not in skipped]
    small = model.fork()
    small.weights = copy.copy(model.weights)
    small.weights.layers = [model.weights.layers[layer] for layer in layers]
    windows = tuple(model.config.windows[layer] for layer in layers)
    small.config = replace(model.config, layers=len(layers), windows=windows)
    small._made_ropes, small._rope_positions = [], 0
    return small


def judged(model, prompt: list[int], tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of each token, the model's log probability and whether it is the model's best one."""
    rows = []
    model.prefill(
        [[*prompt, *tokens]],
        capacity=len(prompt) + len(tokens),
        observe=lambda slot, chain, verified: rows.append(verified.logits.clone()),
    )
    rows, chosen = torch.cat(rows)[len(prompt) - 1 : -1], torch.tensor(tokens)
    logprobs = rows.log_softmax(1).gather(1, chosen[:, None])[:, 0]
    return logprobs.double().numpy(), (rows.argmax(1) == chosen).numpy()


def least_needed(model, prompt: list[int], tokens: list[int], count: int) -> list[int]:
    """Layers without which the others say most like the model, taken one by one."""
    skipped: list[int] = []
    for _ in range(count):
        found = {}
        for layer in range(1, model.layers - 1):
            if layer not in skipped:
                found[layer] = judged(without_layers(model, [*skipped, layer]), prompt, tokens)[0].mean()
        skipped.append(max(found, key=found.get))
    return sorted(skipped)


# ==== quality ====


def turn_curves(small, large, asked: list[list[int]], new_tokens: int) -> list[dict]:
    """A row for each rule and setting, and for each model alone."""
    alone = {"small alone": (small, 0.0), "large alone": (large, 1.0)}
    texts: dict[tuple[str, float], list] = {}
    for name, (model, share) in alone.items():
        said = [pyspec.generate(model, prompt, max_new_tokens=new_tokens).tokens for prompt in asked]
        texts[name, share] = [(tokens, share) for tokens in said]
    for name, rules in TURNS.items():
        for rule in rules:
            said = [
                pyspec.cascade(small, large, prompt, rule=rule, max_new_tokens=new_tokens, seed=1) for prompt in asked
            ]
            dial = getattr(rule, "threshold", None) or rule.probability
            texts[name, dial] = [(each.tokens, each.large_share) for each in said]
    rows = []
    for (name, dial), said in texts.items():
        logprobs, best = zip(
            *(judged(large, prompt, tokens) for prompt, (tokens, _) in zip(asked, said, strict=True)), strict=True
        )
        rows.append(
            {
                "rule": name,
                "dial": dial,
                "large_share": float(np.mean([share for _, share in said])),
                "perplexity": float(np.exp(-np.concatenate(logprobs).mean())),
                "agreement": float(np.concatenate(best).mean()),
            }
        )
    return rows


def answer_curves(small: list[Answered], large: list[Answered], rules: dict) -> dict[str, list[float]]:
    """By rule, how many answers are right where the k worst of the small model's are given again, for all k."""
    curves = {}
    for name, rule in rules.items():
        order = np.argsort([rule.score(each.logprobs) for each in small], kind="stable")
        right = [each.is_right for each in small]
        curves[name] = [float(np.mean(right))]
        for place in order:
            right[place] = large[place].is_right
            curves[name].append(float(np.mean(right)))
    return curves


def quality(options) -> dict:
    large = pyspec.load("demo")
    questions = prompts.across_categories(prompts.spec_bench(), options.prompts + 1)
    first, *asked = [question.tokens(large) for question in questions]
    said = pyspec.generate(large, first, max_new_tokens=64).tokens
    skipped = least_needed(large, first, said, options.skipped)
    small = without_layers(large, skipped)
    lessons, exam = tasks(options.tasks, seed=1), tasks(options.tasks, seed=2)
    learned, known = ([answered(model, each) for model in (small, large)] for each in (lessons, exam))
    rules = {"chow_sum": ChowSum(), "chow_average": ChowAverage()}
    rules |= {f"chow_quantile {quantile}": ChowQuantile(quantile=quantile) for quantile in (0.0, 0.1, 0.5)}
    rules["learned"] = LearnedRule(fit(*learned))
    curves = answer_curves(*known, rules)
    cost = 1 - len(skipped) / large.layers
    router = router_of(*learned, cost)
    routed = []
    for price in (0.0, 0.5, 1.0, 2.0, 4.0, 8.0):
        names = [router.route(each.prompt, price) for each in known[0]]
        right = [known[name == "large"][place].is_right for place, name in enumerate(names)]
        routed.append(
            {"price": price, "large_share": names.count("large") / len(names), "right": float(np.mean(right))}
        )
    return {
        "skipped": skipped,
        "cost_of_small": cost,
        "turns": turn_curves(small, large, asked, options.tokens),
        "answers": [
            {"rule": name, "mean_right": float(np.mean(curve)), "none": curve[0], "all": curve[-1], "curve": curve}
            for name, curve in curves.items()
        ],
        "routes": routed,
        "tasks": options.tasks,
        "prompts": options.prompts,
        "tokens": options.tokens,
    }


# ==== speed ====


def speculative_cascades(model, asked: list[list[int]], new_tokens: int) -> list[dict]:
    """Tokens a second of exact speculation and of the cascade, the rounds of all taken in turn, and what it costs."""
    settings = {"exact": {}} | {f"{alpha}": {"acceptance": "cascade", "deferral": alpha} for alpha in ALPHAS}
    found = {name: [] for name in settings}
    for _ in range(2):  # the first time compiles
        for name in found:
            found[name] = []
        for prompt in asked:
            for name, own in settings.items():
                drafter = new_drafter("merged", model)
                found[name].append(
                    pyspec.generate(model, prompt, drafter=drafter, budget=16, max_new_tokens=new_tokens, **own)
                )
    rows = []
    for name, said in found.items():
        judgements = [judged(model, prompt, each.tokens) for prompt, each in zip(asked, said, strict=True)]
        rows.append(
            {
                "alpha": name,
                "tokens_per_second": sum(each.stats.new_tokens for each in said)
                / sum(each.stats.decode_seconds for each in said),
                "tokens_per_round": float(np.mean([each.stats.mean_accepted_length for each in said])),
                "perplexity": float(np.exp(-np.concatenate([logprobs for logprobs, _ in judgements]).mean())),
                "agreement": float(np.concatenate([best for _, best in judgements]).mean()),
            }
        )
    return rows


@torch.inference_mode()
def group_beams(model, prompt: list[int], new_tokens: int, ends: frozenset[int]) -> list[tuple[list[int], float]]:
    """Diverse beam search as transformers had it, on its model: rows of a batch, and a cache whose rows are reordered.

    transformers has dropped its own. No group ends before the last step unless all its beams have.
    """
    size = BEAMS // GROUPS
    totals = torch.full((BEAMS,), -1e9)
    totals[::size] = 0
    texts: list[list[int]] = [[] for _ in range(BEAMS)]
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(GROUPS)]
    done = [False] * GROUPS
    out = model(torch.tensor([prompt] * BEAMS), use_cache=True)
    for step in range(1, new_tokens + 1):
        laws = out.logits[:, -1].float().log_softmax(1)
        said: list[int] = []
        order = list(range(BEAMS))
        following = [0] * BEAMS
        before, totals = totals, totals.clone()
        old = list(texts)
        for group in range(GROUPS):
            rows = slice(group * size, (group + 1) * size)
            if done[group]:
                continue
            scores = laws[rows].clone()
            for token, count in Counter(said).items():
                scores[:, token] -= DIVERSITY * count
            best = (scores + before[rows, None]).flatten().topk(size * max(2, 1 + len(ends)))
            place = 0
            for rank, (total, index) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
                row, token = divmod(index, laws.shape[1])
                row += rows.start
                if token in ends:
                    if rank < size:
                        finished[group].append((total / step, [*old[row], token]))
                elif place < size:
                    slot = rows.start + place
                    order[slot], following[slot], texts[slot] = row, token, [*old[row], token]
                    totals[slot] = total
                    place += 1
            finished[group] = sorted(finished[group], reverse=True)[:size]
            done[group] = len(finished[group]) == size and finished[group][-1][0] >= float(totals[rows.start]) / step
            if not done[group]:
                said += following[rows]
        if all(done) or step == new_tokens:
            break
        out.past_key_values.reorder_cache(torch.tensor(order))
        out = model(torch.tensor(following)[:, None], past_key_values=out.past_key_values, use_cache=True)
    for group in range(GROUPS):
        if not done[group]:
            rows = range(group * size, (group + 1) * size)
            finished[group] += [(float(totals[row]) / new_tokens, texts[row]) for row in rows]
        finished[group] = sorted(finished[group], reverse=True)[:size]
    return [(tokens, score) for group in finished for score, tokens in group]


def beams(options) -> dict:
    """Seconds of ours and of transformers', taken in turn, in fp32; and whether the beams are the same."""
    model = pyspec.load("demo", dtype=torch.float32)
    dense = peers.dense_transformers(model)
    (question,) = prompts.across_categories(prompts.spec_bench(), 1)
    prompt, seconds = question.tokens(model), {"pyspec": [], "transformers": []}
    settings = {"beams": BEAMS, "groups": GROUPS, "diversity": DIVERSITY, "max_new_tokens": options.beam_tokens}
    pyspec.beam_search(model, prompt, **settings)
    for _ in range(options.repeats):
        start = time.perf_counter()
        ours = pyspec.beam_search(model, prompt, **settings).beams
        middle = time.perf_counter()
        theirs = group_beams(dense, prompt, options.beam_tokens, model.eos_tokens)
        seconds["pyspec"].append(middle - start)
        seconds["transformers"].append(time.perf_counter() - middle)
    theirs = sorted(theirs, key=lambda beam: -beam[1])
    scores = [score for _, score in theirs]
    gap = min((left - right for left, right in pairwise(scores)), default=math.inf)
    least = {name: min(each) for name, each in seconds.items()}
    return {
        "tokens": options.beam_tokens,
        "prompt_tokens": len(prompt),
        "seconds": least,
        "speedup": least["transformers"] / least["pyspec"],
        "same_beams": sum(beam.tokens == tokens for beam, (tokens, _) in zip(ours, theirs, strict=True)),
        "beams": BEAMS,
        "largest_difference": max(abs(beam.score - score) for beam, score in zip(ours, scores, strict=True)),
        "least_gap": gap,
    }


def speed(options) -> dict:
    model = pyspec.load("demo")
    asked = [each.tokens(model) for each in prompts.across_categories(prompts.spec_bench(), options.prompts)]
    return {"speculative": speculative_cascades(model, asked, options.tokens), "beams": [beams(options)]}


def main() -> int:
    parser = parser_of(__doc__, repeats=2)
    parser.add_argument("part", choices=("quality", "speed"))
    parser.add_argument("--prompts", type=positive, default=6, help="of Spec-Bench; default: 6")
    parser.add_argument("--tokens", type=positive, default=48, help="new tokens of a text; default: 48")
    parser.add_argument("--tasks", type=positive, default=120, help="sums and copies; default: 120")
    parser.add_argument("--skipped", type=positive, default=3, help="layers that the small model lacks; default: 3")
    parser.add_argument("--beam-tokens", type=positive, default=32, help="new tokens of a beam; default: 32")
    options = parse(parser)
    found = {"quality": quality, "speed": speed}[options.part](options)
    name = "cascades" if options.part == "quality" else "cascades_speed"
    path = measure.save(name, {"machine": measure.machine(), **found})
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
