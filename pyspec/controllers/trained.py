"""What controllers were trained to know, in safetensors files that say for which controller and drafters.

Those of the demo model are in this folder. A file of more than a megabyte is none: controllers decide in microseconds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pyspec.checkpoints.safetensors_file import SafetensorsFile

FOLDER = Path(__file__).parent
LARGEST_FILE = 2**20  # bytes


def read(
    controller: str, drafters: str | None, file: str | os.PathLike | None = None
) -> tuple[dict, Mapping[str, str]]:
    """The arrays, fp32, of a file and what it says beside them.

    Args:
        controller: whose file it must be.
        drafters: names of those that it must have been trained for; None leaves that to the caller.
        file: None is the one that ships with pyspec for the demo model.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large or corrupt, of another controller, or for other drafters.
    """
    file = FOLDER / f"demo_{controller}.safetensors" if file is None else Path(file)
    size = file.stat().st_size
    if size > LARGEST_FILE:
        raise ValueError(f"{file} must have at most {LARGEST_FILE} bytes, got {size}")
    found = SafetensorsFile(file)
    if found.metadata.get("controller") != controller:
        raise ValueError(f"{file} must be for controller {controller}, got {found.metadata.get('controller')}")
    if drafters is not None and found.metadata.get("drafters") != drafters:
        raise ValueError(
            f"{file} was trained for {found.metadata.get('drafters')}, not for {drafters}: train one for it "
            "(docs/controllers.md)"
        )
    return {name: found.tensor(name).float().numpy() for name in found.shapes}, found.metadata


def write(file: Path, controller: str, drafters: str, arrays: Mapping[str, np.ndarray], **said: object) -> None:
    """Writes such a file, which needs safetensors."""
    from safetensors.numpy import save_file

    metadata = {"controller": controller, "drafters": drafters} | {name: str(value) for name, value in said.items()}
    save_file({name: np.ascontiguousarray(each, np.float32) for name, each in arrays.items()}, file, metadata)


class Classifier:
    """A small network: sigmoid(second @ relu(first @ x + first_bias) + second_bias).

    Args:
        arrays: first [H, F], first_bias [H], second [H], second_bias [1].
        features: F, as the controller counts them.

    Raises:
        ValueError: they have other shapes.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], features: int):
        shapes = {name: arrays[name].shape for name in sorted(arrays)}
        hidden = arrays["second"].size if "second" in arrays else 0
        expected = {"first": (hidden, features), "first_bias": (hidden,), "second": (hidden,), "second_bias": (1,)}
        if not hidden or shapes != expected:
            raise ValueError(f"a classifier of {features} features must have arrays {expected}, got {shapes}")
        self._first, self._first_bias = arrays["first"].T, arrays["first_bias"]
        self._second, self._second_bias = arrays["second"], float(arrays["second_bias"][0])

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Chances [N] of rows [N, F]."""
        found = np.maximum(rows @ self._first + self._first_bias, 0.0) @ self._second + self._second_bias
        return 1 / (1 + np.exp(-found))
