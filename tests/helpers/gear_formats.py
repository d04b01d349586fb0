"""Formats of GEAR that tests share, and keys and values like those of a model."""

import torch

from pyspec.ops import GearFormat
from pyspec.ops.gear_format import BLOCK

KIVI = GearFormat(2, 64)
FORMATS = {
    "int8": GearFormat(8, 128),
    "int4": GearFormat(4, 128),
    "3 bits": GearFormat(3, 32),
    "kivi": KIVI,
    "gear-l": GearFormat(2, 64, rank=4),
    "outliers": GearFormat(2, 32, outliers=4),
    "gear": GearFormat(2, 64, rank=4, outliers=2),
    "gear-4bit": GearFormat(4, 128, rank=3, outliers=2),
    "gear-3bit": GearFormat(3, 64, rank=1, outliers=2),
    "gear-8bit": GearFormat(8, 64, rank=16, outliers=16),
    "kivi, fitted": GearFormat(2, 64, fitted=True),
    "gear, fitted": GearFormat(2, 64, rank=4, outliers=2, fitted=True),
}
PRUNED = {
    "channels": GearFormat(4, 64, rank=2, outliers=2, key_channels=48),
    "few channels": GearFormat(2, 32, outliers=4, fitted=True, key_channels=16),
    "3 bits of channels": GearFormat(3, 64, key_channels=32),
    "8 bits of channels": GearFormat(8, 128, rank=4, key_channels=48),
}


def keys_values(tokens=2 * BLOCK, batch=1, heads=2, head_dim=64, dtype=torch.float32, seed=0):
    """Random keys and values; keys with offsets and outlier channels, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, batch, heads, tokens, head_dim, generator=generator).unbind(0)
    channels = torch.randn(heads, 1, head_dim, generator=generator)
    return (k * channels.exp() + 3 * channels).to(dtype), v.to(dtype)


def channels_of(k, format):
    """Channels that records keep, others in each: the strongest."""
    if not format.key_channels:
        return None
    strength = k.float().unflatten(2, (-1, BLOCK)).square().sum(3)
    return strength.argsort(-1, descending=True)[..., : format.key_channels].sort(-1).values.to(torch.uint8)


def relative_error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def formats_for(head_dim):
    """The formats that fit heads of this size."""
    for name, format in FORMATS.items():
        try:
            format.check_head_dim(head_dim)
            yield name, format
        except ValueError:
            pass
