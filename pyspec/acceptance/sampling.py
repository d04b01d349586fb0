"""Sampler: temperature, top-k, top-p, and noise keyed by seed and position."""


class Sampler: ...
