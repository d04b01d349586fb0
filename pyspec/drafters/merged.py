"""What was emitted before and what the target thought, in one tree."""

from __future__ import annotations

from pyspec.drafters import DRAFTERS
from pyspec.drafters.table_drafter import of_tables
from pyspec.drafters.tables.lookup import Lookup
from pyspec.drafters.tables.recycling import Recycling

DRAFTERS.register("merged", of_tables(Lookup, Recycling), "lookup and recycling, in one tree")
