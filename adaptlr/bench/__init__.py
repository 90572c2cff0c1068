"""What adaptlr costs on this machine, measured beside what a training loop pays anyway.

Both front ends use this: the command ``adaptlr bench``, and ``benchmarks/overhead``. Nothing else
imports it. Read `measure` first.
"""

from adaptlr.bench.measure import DEFAULT_ROUNDS, measure
from adaptlr.bench.report import Report, Row, Target

__all__ = ["DEFAULT_ROUNDS", "Report", "Row", "Target", "measure"]
