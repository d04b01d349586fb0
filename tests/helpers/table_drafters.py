"""Drafters of tables by name, where there is no runner."""

from types import SimpleNamespace

from pyspec.drafters import new_drafter


def drafter_of(name, vocab_size, fingerprint="tiny"):
    return new_drafter(name, SimpleNamespace(vocab_size=vocab_size, fingerprint=fingerprint))
