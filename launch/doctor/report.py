"""The table, or the same as JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter

from foundation.cli_text import console, print_table
from launch.doctor.examine import Examination
from launch.doctor.rows import Status


def show_table(found: Examination) -> None:
    """One table for all nodes: what was found and, under it, what to do."""
    rows = [(row.check, row.status, row.found + (f"\n→ {row.do}" if row.do else "")) for row in found.rows]
    print_table(("check", "", "found"), rows)
    counts = Counter(row.status for row in found.rows)
    said = ", ".join(f"{counts[status]} {status}" for status in Status if counts[status])
    console.print(f"doctor: {said}; exit code {found.code}", highlight=False)
    sys.stdout.flush()


def show_json(found: Examination) -> None:
    """Rows, and all facts of each process, on standard output."""
    rows = [{"check": r.check, "status": r.status.lower(), "found": r.found, "do": r.do} for r in found.rows]
    json.dump({"code": found.code, "rows": rows, "processes": found.record}, sys.stdout, indent=1)
    sys.stdout.write("\n")
    sys.stdout.flush()
