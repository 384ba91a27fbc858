r"""Make a run readable: one HTML page, its numbers as JSON, ten lines for a terminal, pictures for a model card.

    from fastsft.report import summarize, summary_lines, write_report

    page = write_report("runs/a")                       # runs/a/report.html and runs/a/report.json
    print("\n".join(summary_lines(summarize("runs/a"))))

Reads the run directory only (`fastsft.record`); trains nothing and loads no model.
"""

from fastsft.report.lines import summary_lines
from fastsft.report.page import write_report
from fastsft.report.pictures import write_pictures
from fastsft.report.summary import summarize

__all__ = ["summarize", "summary_lines", "write_pictures", "write_report"]
