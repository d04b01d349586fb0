"""Taps of a transformers model: the residual stream between its layers, by hooks, because not all models return it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from pyspec.runners._checks import check_taps
from pyspec.runners.foreign_support import refuse


class Taps:
    """The taps of a batch, see pyspec.runners.Runner.prefill.

    Args:
        model: a transformers model with a language modelling head.
        taps: ascending.

    Raises:
        ValueError: there are no such layers, or the model's code does not say where its layers are.
    """

    def __init__(self, model, taps: Sequence[int]):
        layers = _layers_of(model)
        self._taps = check_taps(taps, len(layers))
        self._readers = [*layers, None, model.get_output_embeddings()]  # of what each tap holds
        self._last = layers[-1]

    @contextmanager
    def kept(self) -> Iterator[Callable[[], list[Tensor]]]:
        """In this context, what it gives tells the [rows, T, hidden] fp32 that the model's last forward had there."""
        found: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            for tap in self._taps:
                reader, keep = self._readers[tap], _Keep(found, tap)
                if reader is None:  # models call their last norm by many names
                    hook = self._last.register_forward_hook(keep.result)
                else:
                    hook = reader.register_forward_pre_hook(keep.input, with_kwargs=True)
                hooks.callback(hook.remove)
            yield lambda: [found[tap] for tap in self._taps]


class _Keep:
    """Hooks that keep what a module takes in or gives."""

    def __init__(self, found: dict[int, Tensor], tap: int):
        self._found, self._tap = found, tap

    def input(self, module: nn.Module, args: tuple, given: dict) -> None:
        self._found[self._tap] = (args[0] if args else given["hidden_states"]).float().clone()

    def result(self, module: nn.Module, args: tuple, result: Tensor | tuple) -> None:
        self._found[self._tap] = (result if isinstance(result, Tensor) else result[0]).float().clone()


def _layers_of(model) -> nn.ModuleList:
    """The layers of a model's decoder, each of which takes the residual stream in as its first argument."""
    decoder, count = model.get_decoder(), model.config.get_text_config(decoder=True).num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    return refuse(type(model), "its code does not say which its layers are, whose hidden states a draft head reads")
