"""One caller of a runner at a time, because a runner has one batch.

Who generates has the runner to himself until the text ends, and other threads wait; a runner's calls wait too, one by
one. Threads that should not wait use forks: runners on the same weights, each with a batch of its own.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

_locks: WeakKeyDictionary[object, threading.RLock] = WeakKeyDictionary()  # not in the runners: those may be copied
_making = threading.Lock()


def lock_of(owner: object) -> threading.RLock:
    """The lock of a runner, or of a model that runners share. A thread that has it may take it again."""
    with _making:
        return _locks.setdefault(owner, threading.RLock())


def exclusive_use(runner: object) -> threading.RLock:
    """`lock_of` a runner, for those who start a batch and need it for longer than one call.

    Raises:
        RuntimeError: this thread is using the runner's batch already, which another one would replace.
    """
    lock = lock_of(runner)
    # what threading.Condition asks of a lock; `with` on the lock itself leaves no gap for Ctrl-C to lose it in
    if lock._is_owned():
        raise RuntimeError(
            f"model is in use: this thread is still generating with this {type(runner).__name__}, perhaps it calls "
            "from a stream callback. A runner has one batch; use model.fork(), a runner on the same weights"
        )
    return lock
