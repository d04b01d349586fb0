"""Arguments that several commands take."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from pyspec.cli.shared import DTYPES

PROMPT_ATTENTION = ("pyspec", "flash-attn")


def add_model_arguments(parser: argparse.ArgumentParser, name: str = "--model", *, with_json: bool = True) -> None:
    """Arguments of which model, and of how it is loaded; with_json has --json too."""
    parser.add_argument(
        name,
        dest="model",
        metavar="MODEL",
        default="demo",
        help="demo, a GGUF file, a Hugging Face folder or a hub id; default: demo",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the model's own")
    parser.add_argument(
        "--prompt-attention",
        choices=PROMPT_ATTENTION,
        default="pyspec",
        help="what reads prompts; flash-attn is for long ones on a GPU, see docs/runner.md; default: pyspec",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    if with_json:
        parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def add_generation_arguments(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    add_speculation_arguments(parser)
    add_sampling_arguments(parser, max_new_tokens=max_new_tokens)


def add_speculation_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of how texts are drafted and accepted, and of how keys and values are kept."""
    from pyspec.acceptance import RULES, settings_of_rules
    from pyspec.caches import CACHES

    add_budget_argument(parser)
    parser.add_argument(
        "--acceptance",
        choices=list(RULES),
        default="exact",
        help="default: exact; see docs/acceptance.md, some are lossy",
    )
    for rule, setting in settings_of_rules().items():
        parser.add_argument(f"--{setting}", type=json_or_text, metavar="VALUE", help=f"of --acceptance {rule}")
    parser.add_argument(
        "--cache", choices=list(CACHES), default="dense", help="how keys and values are kept; default: dense"
    )


def add_sampling_arguments(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """Arguments of a text's length and of what its tokens are drawn from, but the temperature."""
    from pyspec.sampling.warpers import WARPERS

    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help=f"default: {max_new_tokens}")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens, the default")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 keeps all tokens, the default")
    for name, summary in WARPERS.summaries.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=json_or_text, metavar="VALUE", help=summary)
    parser.add_argument("--seed", type=int, help="default: a new one, which is shown")


def add_budget_argument(parser: argparse.ArgumentParser) -> None:
    from pyspec.controllers import CONTROLLERS

    parser.add_argument("--budget", type=_budget, default="auto", help="tree nodes a round, or auto, the default")
    named = "; ".join(f"{name}, {summary}" for name, summary in CONTROLLERS.summaries.items())
    parser.add_argument(
        "--controller",
        metavar="NAME",
        help=f"who decides within the budget, several with + between them; {named}; default: pays, fixed for a number",
    )


def json_or_text(text: str) -> Any:
    """A value that is JSON, or else a string."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _budget(text: str) -> int | str:
    if text != "auto" and not text.lstrip("+-").isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number of nodes or auto, got {text!r}")
    return text if text == "auto" else int(text)


def generation_settings(arguments: argparse.Namespace, temperatures: Sequence[float]) -> dict:
    """The settings of generate but the temperature, checked for each of those before a model is loaded for them."""
    from pyspec.acceptance import acceptance_from_name, settings_of_rules
    from pyspec.controllers import read_controller
    from pyspec.generate import check_limits

    if arguments.cache != "dense" and arguments.prompt_attention != "pyspec":
        raise ValueError(
            f"--cache must be dense with --prompt-attention {arguments.prompt_attention}, got {arguments.cache}"
        )
    own = {setting: getattr(arguments, setting) for setting in settings_of_rules().values()}
    acceptance_from_name(arguments.acceptance, dict(own))
    check_limits(arguments.budget, arguments.max_new_tokens)
    read_controller(arguments.controller)
    sampling = sampling_settings(arguments, temperatures)
    return {name: getattr(arguments, name) for name in ("budget", "controller", "acceptance", "cache")} | own | sampling


def sampling_settings(arguments: argparse.Namespace, temperatures: Sequence[float]) -> dict:
    """The settings of add_sampling_arguments, checked for each of the temperatures."""
    from pyspec.sampling.sampler import Sampler
    from pyspec.sampling.warpers import WARPERS

    warpers = {name: getattr(arguments, name) for name in WARPERS if getattr(arguments, name) is not None}
    for temperature in temperatures:
        Sampler(temperature, arguments.top_k, arguments.top_p, arguments.seed, **warpers)
    return {name: getattr(arguments, name) for name in ("max_new_tokens", "top_k", "top_p", "seed")} | warpers
