"""Work that takes as long as it is said to take, without any time going by."""

import heapq
import itertools
from concurrent.futures import Future


class SimulatedTime:
    """A clock that goes on when something is waited for."""

    def __init__(self):
        self.now = 0.0
        self._due, self._order = [], itertools.count()

    def work(self, seconds, result):
        """A future that is done after so many seconds; until then it can be called off."""
        future = Future()
        heapq.heappush(self._due, (self.now + seconds, next(self._order), future, result))
        return future

    def wait(self, futures):
        """Goes on to the first of some futures that is done, which is returned in a list."""
        while True:
            due, _, future, result = heapq.heappop(self._due)
            if not future.cancelled():
                self.now = due
                future.set_result(result)
                if future in futures:
                    return [future]
