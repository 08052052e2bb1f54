"""dbscale: scaling laws for visual transfer learning, and where distillation stops paying.

Four ground wings that know nothing of each other (`laws`, `study`, `kernels`, `data`), two rooms where they meet
(`training`, `report`), and `launch` on top, which decides where things run.  ARCHITECTURE.md draws the house.
"""

__version__ = "0.1.0"
