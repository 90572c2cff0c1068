"""One page, offline and in one file, that tells what happened in a run: ``adaptlr report``.

The charts are drawn by uPlot (MIT; ``uPlot.LICENSE``), which is part of the page.
"""

from adaptlr.report.page import make_page

__all__ = ["make_page"]
