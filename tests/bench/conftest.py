import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# the benchmarks are scripts, not a package
sys.path += [str(ROOT / "bench"), str(ROOT / "tests"), str(ROOT / "tests" / "models")]
