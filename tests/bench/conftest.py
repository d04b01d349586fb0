import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "bench"))  # the benchmarks are scripts, not a package
