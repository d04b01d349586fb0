"""pyspec info: what is in use and why, and whether speculation pays here."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from importlib import util

from pyspec.cli.arguments import add_model_arguments
from pyspec.cli.shared import load_model, make_console, print_json, set_threads, version_of

EXTRAS = {
    "hf": ("gguf", "safetensors", "tokenizers", "huggingface_hub", "transformers", "jinja2", "rich"),
    "serve": ("starlette", "uvicorn", "prometheus_client"),
    "ray": ("ray",),
    "flash": ("flash_attn",),
    "bench": ("pytest", "pytest_benchmark", "matplotlib", "accelerate", "llama_cpp"),
    "train": ("transformers", "tokenizers", "safetensors", "rich", "matplotlib"),
    "test": ("pytest", "xdist", "hypothesis", "pytest_benchmark"),
}


def add_parser(commands) -> None:
    info = commands.add_parser(
        "info",
        help="what is in use and why, and whether it pays here",
        description="Versions, backends and reasons; what this machine does in a second and what verifying costs.",
    )
    add_model_arguments(info)
    info.add_argument(
        "--draft-head", metavar="HEAD", help="say what this trained head is beside the model, and no more"
    )
    info.set_defaults(command=_info)


def _info(arguments: argparse.Namespace) -> int:
    import torch

    from pyspec.architectures import FAMILIES
    from pyspec.machine import cpu_name
    from pyspec.ops import backends
    from pyspec.ops._library import instruction_sets

    set_threads(arguments)
    if arguments.draft_head is not None:
        return _head(arguments)
    report = {
        "versions": {name: version_of(name) for name in ("pyspec-kernels", "torch", "triton", "numpy", "transformers")}
        | {"python": platform.python_version()},
        "platform": platform.platform(),
        "cpu": {
            "name": cpu_name(),
            "instruction_sets": instruction_sets(),
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
    if not arguments.json:
        _show(report)
    start = time.perf_counter()
    measured = _rates() | _costs(arguments)
    measured["seconds"] = time.perf_counter() - start
    if arguments.json:
        print_json(report | {"measured": measured})
    else:
        _show_measured(report["cpu"]["instruction_sets"], measured)
    return 0


def _head(arguments: argparse.Namespace) -> int:
    """Shows what a draft head is."""
    from pyspec.drafters.heads import drafter_of_head

    found = drafter_of_head(arguments.draft_head, load_model(arguments, make_console())).head.described()
    if arguments.json:
        print_json({"draft_head": arguments.draft_head} | found)
    else:
        _section(f"{arguments.draft_head}, {found.pop('kind')} for {arguments.model}", found.items())
    return 0


def _show(report: dict) -> None:
    cpu = report["cpu"]
    _section("versions", report["versions"].items())
    _section(
        "ops", [(f"{row['op']} on {row['device']}", f"{row['backend']} ({row['reason']})") for row in report["ops"]]
    )
    _section(
        "extras",
        [(name, found if found == "installed" else f"missing {found}") for name, found in report["extras"].items()],
    )
    _section("prompts are read by", report["prompt_attention"].items())
    _section("models", [("demo", report["demo_model"]), *report["families"].items()])
    _section(
        "machine",
        [
            ("platform", report["platform"]),
            ("cpu", cpu["name"]),
            ("torch sees", cpu["torch_sees"]),
            ("threads", cpu["threads"]),
            ("gpus", ", ".join(report["gpus"]) or "none"),
        ],
    )


def _rates() -> dict:
    """What the CPU reads, and multiplies and adds in our own kernels, in a second."""
    import torch

    from pyspec.measure import kernel_rate, read_bandwidth

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
    return {
        "bytes_per_second": read_bandwidth("cpu"),
        "operations_per_second": {name: kernel_rate(dtype) for name, dtype in dtypes.items()},
    }


def _costs(arguments: argparse.Namespace) -> dict:
    """What verifying trees costs with a model, measured anew and kept; nothing if there is not even a demo model."""
    from pyspec.checkpoints.sources import demo_file

    try:
        if arguments.model == "demo":
            demo_file()
    except FileNotFoundError as error:
        return {"costs": [], "why_not": f"the demo model was not found: {error}"}
    model = load_model(arguments, make_console())
    from pyspec.machine.costs import CONTEXT, measure_costs
    from pyspec.measure.drafters import drafters_of

    costs = measure_costs(model)
    plain, before = costs.seconds[0], (1, costs.seconds[0])
    rows = []
    for nodes, seconds in zip(costs.nodes, costs.seconds, strict=True):
        # the chance that a draft must have so that taking it in makes the round's tokens no dearer
        chance = None if nodes == 1 else (seconds - before[1]) / (nodes - before[0]) / plain
        rows.append({"nodes": nodes, "seconds": seconds, "plain_steps": seconds / plain, "chance_to_pay": chance})
        before = (nodes, seconds)
    dtype = str(model.weight_dtype if hasattr(model, "weight_dtype") else model.dtype).replace("torch.", "")
    found = {"model": arguments.model, "dtype": dtype, "context": CONTEXT, "costs": rows}
    return found | {"drafters": drafters_of(model)}


def _show_measured(sets: dict, measured: dict) -> None:
    rates = measured["operations_per_second"].items()
    rows = [
        ("reads", f"{measured['bytes_per_second'] / 1e9:.1f} GB/s"),
        ("multiplies and adds", ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates) + " GFLOP/s in `linear`"),
    ]
    if sets:
        rows[:0] = [
            ("compiled for", ", ".join(sets["compiled"])),
            ("found here", ", ".join(sets["found"])),
            ("used", f"{sets['used']} ({sets['reason']})"),
        ]
    _section("what this machine does", rows)
    if "why_not" in measured:
        print(f"does it pay here? {measured['why_not']}")
        return
    title = f"verifying trees behind {measured['context']} tokens: {measured['model']}, {measured['dtype']}"
    rows = []
    for row in measured["costs"]:
        nodes, steps, chance = row["nodes"], row["plain_steps"], row["chance_to_pay"]
        pays = (
            "a plain step"
            if chance is None
            else (f"pays from {steps:.2f} tokens a round, a draft more from a chance of {chance:.0%}")
        )
        rows.append((f"{nodes} {'node' if nodes == 1 else 'nodes'}", f"{row['seconds'] * 1e3:6.1f} ms  {pays}"))
    _section(title, rows)
    print(f"drafters that it can have: {', '.join(measured['drafters'])}")
    best = max(measured["costs"], key=lambda row: row["nodes"] / row["plain_steps"])
    print(
        f"Does it pay here? {best['nodes']} right guesses are {best['nodes'] / best['plain_steps']:.1f}x as fast as "
        "plain decoding, wrong ones only cost.\n--budget auto takes the drafts that pay, or none. "
        f"Measured in {measured['seconds']:.1f} s."
    )


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
