"""pyspec: language models that generate faster without changing what they say."""

from pyspec.caches import GearCache
from pyspec.generate import Generation, generate
from pyspec.loop import Stats
from pyspec.masks import BlockMask
from pyspec.models import load
from pyspec.ops import backend
from pyspec.trees import DraftTree

__version__ = "0.1.0"
__all__ = ["BlockMask", "DraftTree", "GearCache", "Generation", "Stats", "backend", "generate", "load"]
