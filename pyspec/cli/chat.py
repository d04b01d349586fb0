"""pyspec chat: a conversation in the terminal."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from pyspec.arguments import check_unicode
from pyspec.cli.arguments import add_generation_arguments, add_model_arguments, sampling_settings
from pyspec.cli.generate import add_drafter_arguments, add_template_arguments, drafter_of
from pyspec.cli.serve import engine_settings
from pyspec.cli.shared import BadInput, load_model, make_console, read_text, write

HELP = '''/reset         forgets all but the system's turn
/system TEXT   sets the system's turn, or takes it away
/stats         figures of the last answer and of all
/save FILE     writes the conversation as JSON
/quit          ends the chat, as Ctrl-D does
"""            begins and ends a message of several lines
Ctrl-C         ends an answer'''


def add_parser(commands) -> None:
    chat = commands.add_parser(
        "chat",
        help="a conversation",
        description="A conversation in the terminal; what was said stays in the cache, so each answer begins at once.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(chat, with_json=False)
    add_drafter_arguments(chat)
    add_generation_arguments(chat, max_new_tokens=2048)
    chat.add_argument("--temperature", type=float, default=0.7, help="0 is greedy; default: 0.7")
    add_template_arguments(chat)
    chat.add_argument(
        "--conversation", type=Path, metavar="FILE", help="go on from it if it is there; written after each answer"
    )
    chat.set_defaults(command=_chat)


def _chat(arguments: argparse.Namespace) -> int:
    if arguments.system is not None:
        check_unicode("--system", arguments.system)
    from pyspec.generate import check_limits

    for_engine = engine_settings(arguments)
    settings = sampling_settings(arguments, [arguments.temperature]) | {"temperature": arguments.temperature}
    check_limits(1, arguments.max_new_tokens)
    messages = _read_conversation(arguments.conversation)
    console = make_console()
    model = load_model(arguments, console)
    if model.tokenizer.chat_template is None:
        raise BadInput(f"{arguments.model} has no chat template: pyspec generate continues texts")
    from pyspec.serving.engine import Engine

    laws = {"temperature": arguments.temperature or 1.0, "top_k": arguments.top_k, "top_p": arguments.top_p}
    drafter = drafter_of(arguments, model, console, **laws)
    with Engine(model, slots=1, queue=1, drafter=drafter, **for_engine) as engine:
        chat = Chat(engine, console, messages, dict(arguments.variable), settings, arguments.conversation)
        if arguments.system is not None:
            chat.system(arguments.system)
        console.print("/help tells what else there is", style="dim", highlight=False)
        chat.run()
    return 0


class Chat:
    """A conversation: what was said, and the commands.

    Args:
        engine: answers.
        console: for all but the texts.
        messages: said so far, dicts with role and content; changed in place.
        variables: for the model's chat template.
        settings: of engine.submit.
        path: of a file that the conversation is written to after each answer, or None.
    """

    def __init__(self, engine, console, messages: list[dict], variables: dict, settings: dict, path: Path | None):
        self.messages = messages
        self._engine, self._console, self._path = engine, console, path
        self._variables, self._settings = variables, settings
        self._figures: list = []  # of each answer: seconds to its first piece, and its Stats

    def run(self) -> None:
        """Reads and answers until the input ends."""
        commands = {
            "/reset": lambda rest: self.reset(),
            "/system": self.system,
            "/stats": lambda rest: self.stats(),
            "/save": self.save,
            "/help": lambda rest: self._tell(HELP),
        }
        while True:
            try:
                message = read_message()
            except KeyboardInterrupt:
                self._tell("\nCtrl-D or /quit ends the chat")
                continue
            if message is None:
                return
            name, _, rest = message.partition(" ")
            if name == "/quit":
                return
            try:
                if name in commands:
                    commands[name](rest.strip())
                elif name.startswith("/"):
                    self._tell(f"there is no command {name}; /help tells which there are")
                elif message.strip():
                    self.say(message)
            except (ValueError, OSError) as error:
                self._tell(str(error))

    def say(self, text: str) -> None:
        """Says something and shows the answer as it comes; Ctrl-C ends the answer.

        Raises:
            ValueError: there is no answer, so nothing was said.
        """
        check_unicode("the message", text)
        begin, first = time.perf_counter(), None
        turns = [*self.messages, {"role": "user", "content": text}]
        tokens = self._engine.model.tokenizer.chat(turns, **self._variables)
        if len(tokens) >= self._engine.context_length:
            raise ValueError(
                f"the conversation has {len(tokens)} tokens, and the model takes {self._engine.context_length}: "
                "/reset begins a new one"
            )
        answer = self._engine.submit(tokens, **self._settings)
        try:
            for piece in answer:
                first = first or time.perf_counter() - begin
                write(piece.text)
        except KeyboardInterrupt:
            answer.cancel()
        result = answer.result()
        write("\n")
        if result.finish_reason == "error":
            raise ValueError(f"the model failed: {result.error}")
        if result.finish_reason in ("cancelled", "length"):
            self._tell("(ended by Ctrl-C)" if result.finish_reason == "cancelled" else "(ended at the limit)")
        self.messages[:] = [*turns, {"role": "assistant", "content": result.text}]
        self._figures.append((first or 0.0, result.stats))
        if self._path is not None:
            self.save(str(self._path))

    def reset(self) -> None:
        """Forgets all but the system's turn."""
        self.messages[:] = [message for message in self.messages if message["role"] == "system"]
        self._tell("forgotten")

    def system(self, text: str) -> None:
        """Sets the system's turn; an empty one is none."""
        turns = [message for message in self.messages if message["role"] != "system"]
        self.messages[:] = [*([{"role": "system", "content": text}] if text else []), *turns]

    def save(self, path: str) -> None:
        """Writes the conversation as JSON."""
        if not path:
            raise ValueError("/save needs the name of a file")
        Path(path).write_text(json.dumps(self.messages, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    def stats(self) -> None:
        """Shows figures of the last answer and of all."""
        if not self._figures:
            return self._tell("there is no answer yet")
        for name, figures in (("last", self._figures[-1:]), ("all", self._figures)):
            tokens = sum(stats.new_tokens for _, stats in figures)
            seconds = sum(stats.decode_seconds for _, stats in figures)
            rounds = sum(sum(stats.accepted_lengths) for _, stats in figures)
            waited = sum(first for first, _ in figures) / len(figures)
            known = sum(stats.prefix_tokens for _, stats in figures)
            self._tell(
                f"{name}: {tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s, "
                f"{tokens / max(rounds, 1):.2f} tokens/round, first after {waited:.2f} s, {known} known from before"
            )

    def _tell(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def read_message() -> str | None:
    """The next message, of several lines where it begins with three quotes; None where the input ends."""
    line = _read_line("> ")
    if line is None or not line.startswith('"""'):
        return line
    lines = [line[3:]]
    while not lines[-1].endswith('"""'):
        line = _read_line(". ")
        if line is None:
            return None
        lines.append(line)
    return "\n".join(lines)[:-3].strip("\n")


def _read_line(prompt: str) -> str | None:
    if sys.stdin is None:
        raise BadInput("nothing can be read: standard input is closed")
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        try:
            import readline  # noqa: F401  input() edits lines with it
        except ImportError:
            pass
    try:
        return input(prompt if is_terminal else "")
    except EOFError:
        return None


def _read_conversation(path: Path | None) -> list[dict]:
    """The messages of a file, or none where there is no file."""
    if path is None or not path.exists():
        return []
    try:
        messages = json.loads(read_text(path))
        known = ("system", "user", "assistant")
        if not all(each["role"] in known and isinstance(each["content"], str) for each in messages):
            raise TypeError
    except (ValueError, TypeError, LookupError, RecursionError):
        raise BadInput(f"{path} must be a conversation: a JSON array of objects with role and content") from None
    return messages
