"""Findings as text for a terminal: the answer, the boundaries, the fits, the warnings."""

from __future__ import annotations

from collections.abc import Iterator

from dbscale.report.fits import Findings
from dbscale.report.schema import BoundaryRecord, FitRecord
from dbscale.report.words import about, interval_text, percent


def summary(findings: Findings) -> str:
    """A screenful; laws.json and boundary.json hold the rest."""
    return "\n".join(_lines(findings))


def _lines(findings: Findings) -> Iterator[str]:
    laws, boundary = findings.laws, findings.boundary
    yield from boundary.answers
    for dataset in dict.fromkeys(fit.dataset for fit in laws.fits):
        yield ""
        yield f"Laws on {dataset} (residual, held-out largest D_p)"
        yield from (_fit_line(fit) for fit in laws.fits if fit.dataset == dataset)
    records = [record for record in boundary.boundaries if record.method == "law"]
    if records:
        yield ""
        yield f"Boundary from the chosen laws, {percent(boundary.level, 0)} intervals"
        width = max(len(record.dataset) for record in records) + 2
        yield from (_boundary_line(record, width) for record in records)
    notes = (*laws.notes, *boundary.notes)
    if notes:
        yield ""
        yield from (f"note: {note}" for note in notes)


def _fit_line(fit: FitRecord) -> str:
    name = f"  {'*' if fit.chosen else ' '} {fit.law:<13}{fit.arm:<11}{fit.student or 'all':<10}"
    if fit.status != "fitted":
        return f"{name}no fit: {fit.reason}"
    quality = [percent(value) if value is not None else "–" for value in (fit.rmsd_log, fit.held_out_rmsd_log)]
    params = "  ".join(f"{key} {value.value:.4g}" for key, value in fit.params.items())
    return f"{name}{quality[0]:>8}{quality[1]:>8}  {params}"


def _boundary_line(record: BoundaryRecord, width: int) -> str:
    whom = "pooled" if record.student is None else f"{record.student}, {record.downstream_samples:,} labels"
    root = record.upstream_samples
    found = (
        f"{about(root.value)} ({interval_text(root)})"
        if root
        else (record.direction or "too little data").replace("_", " ")
    )
    return (
        f"    {record.dataset:<{width}}{whom:<26}{found}{'  extrapolated' if record.status == 'extrapolated' else ''}"
    )
