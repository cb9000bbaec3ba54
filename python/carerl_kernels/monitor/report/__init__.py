"""`carerl report`: one self-contained HTML page of a run."""

from .page import Page, build_page, render, write_report
from .record import RunError, RunRecord

__all__ = ["Page", "RunError", "RunRecord", "build_page", "render", "write_report"]
