"""Caches: where a runner keeps what it knows of committed tokens."""

from pyspec.caches.blocks import QuantisedCache, QuantisedSettings
from pyspec.caches.codebooks import Codebooks
from pyspec.caches.dense import DenseCache
from pyspec.caches.gear import GearSettings
from pyspec.caches.hybrid import HybridCache
from pyspec.caches.names import CACHES, cache_from_name
from pyspec.caches.residual_vq import ResidualVqSettings
from pyspec.caches.saved import load_quantised, save_quantised
from pyspec.caches.state import StateCache
