"""One HTML file about one or several pruning results: what was removed, what it cost, what it brought."""

from secateur.report.advice import advise as advise
from secateur.report.page import render as render
from secateur.report.page import write as write
from secateur.report.record import Record as Record
from secateur.report.record import ReportError as ReportError
