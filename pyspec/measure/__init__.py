"""Measuring: what `pyspec bench` and the scripts of bench/ share."""

from pyspec.measure.results import pyplot, save, save_figure, write
from pyspec.measure.show import counted, first_difference, name_of, new_table, ratio
from pyspec.measure.timing import in_turn, in_turn_for, kernel_rate, machine, multiply_rate, read_bandwidth, replayed
