"""What the compiled CUDA kernels cost by count, and the time that a model makes of it.

See docs/compiled.md. The interpreter in tests/kernels/ptx runs the kernels and counts; nothing here
has been measured on a GPU.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The interpreter belongs to the tests, which find it by this path, too.
sys.path.append(str(ROOT / "tests" / "kernels"))
RESULTS = ROOT / "benchmarks" / "results" / "compiled"
