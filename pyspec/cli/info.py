"""pyspec info: what is in use and why, and what verifying costs."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from importlib import util

from pyspec.cli.arguments import add_model_arguments
from pyspec.cli.shared import load_model, make_console, print_json, version_of
from pyspec.measure import new_table

EXTRAS = {
    "hf": ("gguf", "safetensors", "tokenizers", "huggingface_hub", "transformers", "jinja2", "rich"),
    "flash": ("flash_attn",),
    "bench": ("pytest", "pytest_benchmark", "matplotlib", "accelerate", "llama_cpp"),
    "train": ("transformers", "tokenizers", "safetensors", "rich", "matplotlib"),
    "test": ("pytest", "xdist", "hypothesis", "pytest_benchmark"),
}
INSTRUCTION_SETS = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)


def add_parser(commands) -> None:
    info = commands.add_parser("info", help="what is in use and why", description="Versions, backends and reasons.")
    info.add_argument(
        "--costs", action="store_true", help="measure what verifying a tree costs, and what a tree must give to pay"
    )
    add_model_arguments(info)
    info.set_defaults(command=_info)


def _info(arguments: argparse.Namespace) -> int:
    if arguments.costs:
        return _info_costs(arguments)
    import torch

    from pyspec.architectures import FAMILIES
    from pyspec.machine import cpu_name
    from pyspec.ops import backends

    report = {
        "versions": {name: version_of(name) for name in ("pyspec-kernels", "torch", "triton", "numpy", "transformers")}
        | {"python": platform.python_version()},
        "platform": platform.platform(),
        "cpu": {
            "name": cpu_name(),
            "instruction_sets": _instruction_sets(),
            "torch_sees": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "ops": backends(),
        "extras": {name: _missing_modules(modules) or "installed" for name, modules in EXTRAS.items()},
        "prompt_attention": _prompt_attention(),
        "families": FAMILIES.summaries,
        "demo_model": _demo_model(),
    }
    if arguments.json:
        print_json(report)
        return 0
    cpu = report["cpu"]
    _section("versions", report["versions"].items())
    _section(
        "machine",
        [
            ("platform", report["platform"]),
            ("cpu", cpu["name"]),
            ("instructions", ", ".join(cpu["instruction_sets"]) or "none that matter here"),
            ("torch sees", cpu["torch_sees"]),
            ("threads", cpu["threads"]),
            ("gpus", ", ".join(report["gpus"]) or "none"),
        ],
    )
    _section(
        "ops", [(f"{row['op']} on {row['device']}", f"{row['backend']} ({row['reason']})") for row in report["ops"]]
    )
    _section(
        "extras",
        [(name, found if found == "installed" else f"missing {found}") for name, found in report["extras"].items()],
    )
    _section("prompts are read by", report["prompt_attention"].items())
    _section("models", [("demo", report["demo_model"]), *report["families"].items()])
    return 0


def _info_costs(arguments: argparse.Namespace) -> int:
    model = load_model(arguments, make_console())
    import torch

    from pyspec.machine.costs import CONTEXT, measure_costs

    costs = measure_costs(model)
    plain, before = costs.seconds[0], (1, costs.seconds[0])
    rows = []
    for nodes, seconds in zip(costs.nodes, costs.seconds, strict=True):
        # the chance that a draft must have so that taking it in makes the round's tokens no dearer
        chance = None if nodes == 1 else (seconds - before[1]) / (nodes - before[0]) / plain
        rows.append({"nodes": nodes, "seconds": seconds, "plain_steps": seconds / plain, "chance_to_pay": chance})
        before = (nodes, seconds)
    dtype = str(model.weight_dtype if hasattr(model, "weight_dtype") else model.dtype).removeprefix("torch.")
    report = {"model": arguments.model, "dtype": dtype, "threads": torch.get_num_threads(), "context": CONTEXT}
    if arguments.json:
        print_json(report | {"costs": rows})
        return 0
    table = new_table("nodes", "ms", "pays from", "and a draft more from")
    for row in rows:
        chance = "" if row["chance_to_pay"] is None else f"a chance of {row['chance_to_pay']:.0%}"
        tokens = f"{row['plain_steps']:.2f} tokens a round"
        table.add_row(str(row["nodes"]), f"{row['seconds'] * 1e3:.1f}", tokens, chance)
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"verifying trees behind {CONTEXT} tokens: {arguments.model}, {dtype}, {report['threads']} threads")
    console.print(table)
    best = max(rows, key=lambda row: row["nodes"] / row["plain_steps"])
    console.print(
        f"Would it pay? {best['nodes']} right guesses are {best['nodes'] / best['plain_steps']:.1f}x as fast as plain "
        "decoding, wrong ones only cost. --budget auto takes the drafts that pay, or none."
    )
    return 0


def _section(title: str, rows) -> None:
    rows = [(str(name), str(value)) for name, value in rows]
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def _missing_modules(modules: Sequence[str]) -> str:
    return ", ".join(module for module in modules if util.find_spec(module) is None)


def _prompt_attention() -> dict[str, str]:
    import torch

    from pyspec.runners.flash_attn import why_not

    reason = why_not(torch.bfloat16, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        "pyspec": "by default: a text has the same cache as a prompt and as an answer",
        "flash-attn": "by request: speculation stays exact, but a text has one cache as a prompt, another as an answer"
        + ("" if reason is None else f"; not here: it {reason}"),
    }


def _demo_model() -> str:
    from pyspec.checkpoints.sources import demo_file

    try:
        return str(demo_file())
    except FileNotFoundError as error:
        return f"not found: {error}"


def _instruction_sets() -> list[str]:
    """The processor's instruction sets, of those that a kernel variant may want."""
    from pyspec.machine import cpu_fields

    fields = cpu_fields()
    has = set((fields.get("flags") or fields.get("Features", "")).split())
    return [name for name in INSTRUCTION_SETS if name in has]
