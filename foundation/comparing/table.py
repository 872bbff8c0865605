"""The results of a comparison as a table, in the terminal and in Markdown."""

from __future__ import annotations

from foundation.comparing.plan import Comparison
from foundation.comparing.results import Results, Value, rank_correlation

FEWEST = 3  # seeds for a verdict


def table(comparison: Comparison, results: Results) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows: one row per objective, then the controls; one column per protocol."""
    published = {row.name: row.published for row in comparison.spec.rows if row.published is not None}
    monitors = tuple(dict.fromkeys(key for health in results.health.values() for key in health))
    header = ("", *results.protocols, *monitors, *(("published",) if published else ()))
    rows = []
    for name, values in {**results.rows, **results.controls}.items():
        health = results.health.get(name, {}) if name in results.rows else {}
        last = (f"{published[name]:g}" if name in published else "",) if published else ()
        shown = name if name in results.rows else f"*{name}*"
        rows.append((shown, *map(cell, values), *(f"{health[m]:.3g}" if m in health else "" for m in monitors), *last))
    return header, rows


def cell(value: Value) -> str:
    """`46.3 ± 1.2 (-2.1, worse)`: mean, half of the interval, difference from the first row where it is certain."""
    if not value.values:
        return "-"
    text = f"{100 * value.mean:.1f}"
    if len(value.values) > 1:
        text += f" ± {50 * (value.high - value.low):.1f}"
    if value.difference is None:
        return text
    mean, low, high = value.difference
    verdict = ", better" if low > 0 else ", worse" if high < 0 else ""
    return f"{text} ({100 * mean:+.1f}{verdict if len(value.values) >= FEWEST else ''})"


def caption(comparison: Comparison, results: Results) -> list[str]:
    """What the numbers are, and what they are not."""
    f, spec = results.facts, comparison.spec
    seeds = ", ".join(map(str, f["seeds"]))
    unlike = [key for key in f["differing"] if not key.startswith(("objective.", "model."))]
    lines = [
        *(f"WARNING: {warning.rstrip('.')}." for warning in results.warnings),
        f"Accuracy in %: mean over pretraining seeds {seeds} ± half of the 95 % t-interval; few-shot scores are means "
        f"over {spec.evaluate.draws} draws. In brackets the difference from {spec.rows[0].name}, paired by seed, and "
        "what is shown of it, if its 95 % interval leaves out 0 (no correction for the number of rows).",
        f"The first row: {f['encoder']}, {f['samples']:,} samples, {f['global_batch']} per update. Rows differ in "
        f"{', '.join(f['differing'])}, and in nothing else"
        + (f"; so not in task alone, but in {', '.join(unlike)} too." if unlike else "."),
    ]
    for protocol in results.protocols:
        if (found := rank_correlation(comparison, results, protocol)) is not None:
            lines.append(
                f"Spearman's correlation of {protocol} with the published column: {found[0]:+.2f} over {found[1]} rows."
            )
    lines += [f"Leakage: {sentence}" for sentence in results.clean]
    if results.missing:
        lines.append(f"Not finished, so not in the table: {', '.join(results.missing)}.")
    return lines


def to_markdown(comparison: Comparison, results: Results) -> str:
    """The table under its title, then what it says."""
    header, rows = table(comparison, results)
    lines = [header, tuple("---" for _ in header), *(tuple(c.replace("|", "\\|") for c in row) for row in rows)]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        f"# {comparison.spec.name}\n\n{body}\n\n"
        + "\n".join(f"- {line}" for line in caption(comparison, results))
        + "\n"
    )
