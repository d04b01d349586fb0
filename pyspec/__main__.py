"""python -m pyspec"""

import sys

from pyspec.cli import main

sys.exit(main())
