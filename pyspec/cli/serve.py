"""pyspec serve: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import ipaddress
import os

from pyspec.cli.arguments import add_model_arguments, add_speculation_arguments
from pyspec.cli.generate import add_drafter_arguments, drafter_of
from pyspec.cli.shared import BadInput, load_model, make_console

_KEY = "PYSPEC_API_KEY"


def add_parser(commands) -> None:
    serve = commands.add_parser(
        "serve",
        help="an OpenAI-compatible server",
        description="An OpenAI-compatible server: /v1/chat/completions, /v1/completions, /v1/models, /health and "
        "/metrics. Texts are written several at once, each the very text it would be alone. SIGTERM lets running "
        "texts end.",
    )
    add_model_arguments(serve, with_json=False)
    serve.add_argument("--name", help="of the model, for clients; default: what --model says")
    add_drafter_arguments(serve)
    add_speculation_arguments(serve)
    serve.add_argument("--host", default="127.0.0.1", help="to listen on; default: 127.0.0.1, this machine alone")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    serve.add_argument(
        "--api-key", metavar="KEY", help=f"what clients must send; default: the environment's {_KEY}, or none"
    )
    serve.add_argument("--slots", type=int, default=8, help="texts that are written at once; default: 8")
    serve.add_argument(
        "--queue", type=int, default=64, help="texts that wait before others are refused with 429; default: 64"
    )
    serve.add_argument("--capacity", type=int, help="tokens of prompt and text; default: the context, at most 8192")
    serve.add_argument(
        "--prefix-memory", type=float, default=0.25, metavar="GIB", help="for prefixes that are kept; default: 0.25"
    )
    serve.add_argument(
        "--grace", type=float, default=30.0, metavar="SECONDS", help="for running texts after SIGTERM; default: 30"
    )
    serve.add_argument("--most-bytes", type=int, default=2**22, metavar="BYTES", help="of a request; default: 4 MiB")
    serve.add_argument(
        "--most-seconds", type=float, default=600.0, metavar="SECONDS", help="that an answer may take; default: 600"
    )
    serve.set_defaults(command=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    _check(arguments)
    settings = engine_settings(arguments)
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ImportError(f"pyspec serve needs {error.name}: pip install 'pyspec-kernels[serve]'") from None
    console = make_console()
    model = load_model(arguments, console)
    from pyspec.serving.app import Application
    from pyspec.serving.engine import Engine
    from pyspec.serving.server import serve

    drafter = drafter_of(arguments, model, console)
    memory = int(arguments.prefix_memory * 2**30)
    sizes = {"slots": arguments.slots, "queue": arguments.queue, "capacity": arguments.capacity}
    api_key = arguments.api_key or os.environ.get(_KEY) or None
    if api_key is None and not _is_loopback(arguments.host):
        console.print(f"{arguments.host} is open to other machines, and no API key is asked for (--api-key)")
    name = arguments.name or arguments.model
    with Engine(model, drafter=drafter, prefix_memory=memory, **sizes, **settings) as engine:
        application = Application(
            engine, name, api_key=api_key, most_bytes=arguments.most_bytes, most_seconds=arguments.most_seconds
        )
        serve(application, engine, host=arguments.host, port=arguments.port, grace=arguments.grace)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises BadInput for numbers out of range, before a model is loaded for them."""
    for name, least in (("slots", 1), ("queue", 1), ("port", 0), ("most_bytes", 1)):
        if getattr(arguments, name) < least:
            raise BadInput(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    for name in ("prefix_memory", "grace", "most_seconds"):
        value = getattr(arguments, name)
        if not 0 <= value < 2**31:
            raise BadInput(f"--{name.replace('_', '-')} must be in [0, 2**31), got {value}")
    if arguments.port > 65535:
        raise BadInput(f"--port must be at most 65535, got {arguments.port}")
    if arguments.api_key is not None and not arguments.api_key.isascii():
        raise BadInput("--api-key must be ASCII, as a header is")


def engine_settings(arguments: argparse.Namespace) -> dict:
    """The settings of Engine that add_speculation_arguments has, checked before a model is loaded for them."""
    from pyspec.acceptance import acceptance_from_name, settings_of_rules
    from pyspec.controllers import read_controller
    from pyspec.generate import check_limits

    if arguments.prompt_attention != "pyspec":
        raise ValueError(f"--prompt-attention must be pyspec for several texts, got {arguments.prompt_attention}")
    own = {setting: getattr(arguments, setting) for setting in settings_of_rules().values()}
    check_limits(arguments.budget, 1)
    read_controller(arguments.controller)
    rule = acceptance_from_name(arguments.acceptance, own)
    return {"acceptance": rule} | {name: getattr(arguments, name) for name in ("budget", "controller", "cache")}


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
