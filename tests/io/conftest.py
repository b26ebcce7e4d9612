"""Makes `cli_runs`, the command line's helpers, importable here too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
