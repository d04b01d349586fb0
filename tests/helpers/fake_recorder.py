"""A recorder in place of CUDA graphs: rounds have the few padded shapes of a GPU, on any device."""

from pyspec.runners.replay import _GraphedHead


class FakeRecorder:
    """Repeats a step; as with a graph, every result lies in the same memory."""

    is_graph = True
    recorded = 0
    replayed: set[int] = set()

    def __init__(self, *head):
        self._head = _GraphedHead(*head)

    def __call__(self, step, cache, numbers):
        number, result = FakeRecorder.recorded, self._head(*step(cache, numbers))
        FakeRecorder.recorded += 1

        def replay():
            FakeRecorder.replayed.add(number)
            again = self._head(*step(cache, numbers))
            for memory, values in zip([*result[:3], *result.taps], [*again[:3], *again.taps], strict=True):
                if memory is not None:
                    memory.copy_(values)
            return result

        return replay


def with_graphs(runner):
    """The runner, whose rounds have the shapes of a GPU."""
    runner._records_graphs = True
    return runner
