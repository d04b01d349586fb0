"""pyspec: language models that generate faster without changing what they say."""

from pyspec.adadec import adadec
from pyspec.beams import Beam, Beams, beam_search
from pyspec.caches import GearSettings, ResidualVqSettings
from pyspec.cascade import Cascade, cascade
from pyspec.checkpoints import from_transformers, load
from pyspec.generate import Generation, generate
from pyspec.masks import BlockMask
from pyspec.ops import backend
from pyspec.stats import Stats
from pyspec.tree import DraftTree

__version__ = "0.1.0"
