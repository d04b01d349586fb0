"""Draws docs/figures/cascades.png: quality by the large model's share, from bench/results/cascades.json."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

result = json.loads((Path(__file__).parents[2] / "bench/results/cascades.json").read_text())
figure, (turns, answers) = plt.subplots(1, 2, figsize=(10, 4))
for rule in dict.fromkeys(row["rule"] for row in result["turns"]):
    rows = sorted((row["large_share"], row["agreement"]) for row in result["turns"] if row["rule"] == rule)
    turns.plot(*zip(*rows, strict=True), "o-", label=rule)
turns.set(xlabel="share of tokens by the large model", ylabel="tokens that are the large model's best")
for row in result["answers"]:
    answers.plot(np.linspace(0, 1, len(row["curve"])), row["curve"], label=row["rule"])
routes = sorted((row["large_share"], row["right"]) for row in result["routes"])
answers.plot(*zip(*routes, strict=True), "k.--", label="uniroute")
answers.set(xlabel="share of answers by the large model", ylabel="right answers")
for axis in (turns, answers):
    axis.legend(fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)
figure.suptitle(f"{result['prompts']} prompts of {result['tokens']} tokens; {result['tasks']} tasks", fontsize=10)
figure.tight_layout()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
