"""Tell how a run went, from the files in its folder; nothing is trained or loaded."""

from tsmoe.report.write import WrittenReport, write_report

__all__ = ["WrittenReport", "write_report"]
