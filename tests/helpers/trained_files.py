"""Files of trained controllers that know nothing, for drafters of the fake model."""

import numpy as np

from pyspec.controllers import CONTROLLERS, trained
from pyspec.controllers.trained_rule import TrainedRule


def write_file(file, rule, drafters="fake", threshold=0.5, **arrays):
    draw = np.random.default_rng(5)
    shapes = {"first": (4, rule.inputs), "first_bias": (4,), "second": (4,), "second_bias": (1,)}
    arrays = {name: draw.normal(size=shape) for name, shape in shapes.items()} | arrays
    trained.write(file, rule.name, drafters, arrays, threshold=threshold)
    return file


def write_files(folder, monkeypatch):
    """Puts random networks in the place of those that ship with pyspec."""
    monkeypatch.setattr(trained, "FOLDER", folder)
    for name, rule in CONTROLLERS.items():
        if isinstance(rule, type) and issubclass(rule, TrainedRule):
            write_file(folder / f"demo_{name}.safetensors", rule)
