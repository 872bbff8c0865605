"""The facts about a run as tables of text, the same on the terminal and in the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from foundation.inspecting.inspection import Inspection
from foundation.inspecting.lines import sound
from foundation.inspecting.words import bars, facts, span, when

CURVES = ("loss", "grad_norm", "lr", "feature_std", "rankme", "target_variance", "probe_knn", "probe_linear")
NEWEST = 20  # events that are shown
Row = tuple[str, ...]


class Section(NamedTuple):
    """A table under a title; its `anchor` is its name in the report. Notes stand below it."""

    anchor: str
    title: str
    header: Row
    rows: Sequence[Row]
    notes: tuple[str, ...] = ()


def sections(found: Inspection) -> Iterator[Section]:
    """What there is to say, in the order it is asked for; without rows only the notes count."""
    yield from (state(found), curve(found), throughput(found), time(found), restarts(found), events(found))
    yield from (checkpoints(found), data(found), stragglers(found), standstill(found), environment(found))


def state(found: Inspection) -> Section:
    """How far the run is."""
    share = f" ({found.position / found.samples:.1%} of {found.samples:,})" if found.samples else ""
    rows = [("state", found.state), ("samples seen", f"{found.position:,}{share}")]
    last = found.attempts[-1] if found.attempts else None
    rows += [("why", last.reason)] if last and last.reason and found.state != "complete" else []
    rows += [("last heard of", when(last.ended))] if last else []
    notes = [f"{count} damaged line(s) of {name} were left out" for name, count in found.damaged.items() if count]
    return Section("state", "State", ("", found.run), rows, tuple(notes))


def curve(found: Inspection) -> Section:
    """First and last values, extremes and a line of bars of what was measured."""
    rows = []
    for key in CURVES:
        values = [row[key] for row in found.rows if sound(row.get(key))]
        if values:
            numbers = (values[0], values[-1], min(values), max(values))
            rows.append((key, *(f"{value:.4g}" for value in numbers), bars(values)))
    header = ("metric", "first", "last", "lowest", "highest", "over the run")
    return Section("curve", "Training curve", header, rows, () if rows else ("metrics.jsonl holds no lines yet",))


def throughput(found: Inspection) -> Section:
    """Images per second, and what share of the device that is."""
    if (speed := found.speed) is None:
        return Section("throughput", "Throughput", (), [], ("no speed was logged yet",))
    rows = [("images/s, median", f"{speed.median:,.1f}"), ("images/s, last line", f"{speed.last:,.1f}")]
    rows += [("images/s, slowest tenth", f"below {speed.slow_tenth:,.1f}")]
    rows += [("over the run", bars([window.images_per_s for window in found.windows]))]
    rows += [("MFU at the median", "no data sheet of this device" if speed.mfu is None else f"{speed.mfu:.1%}")]
    rows += [("peak memory of rank 0", f"{speed.peak_memory_gb:.2f} GB")] if speed.peak_memory_gb else []
    return Section("throughput", "Throughput", ("", "all processes together"), rows)


def time(found: Inspection) -> Section:
    """Shares of the logged time."""
    if (spent := found.spent) is None:
        return Section("time", "Where the time went", (), [], ("no time was logged yet",))
    parts = {
        "waiting for data": spent.data,
        "standing still for checkpoints": spent.checkpoint,
        "looks of the monitor": spent.monitor,
        "the rest: targets, model, optimiser, collectives": spent.rest,
    }
    rows = [(name, span(value), f"{value / max(spent.seconds, 1e-9):.1%}") for name, value in parts.items()]
    notes = ["Of rank 0, over the lines of metrics.jsonl: what was done again after a restart is not among them."]
    if idle := sum(attempt.idle_s or 0 for attempt in found.attempts):
        notes.append(f"Between the attempts, with what was never heard of: {span(idle)}.")
    return Section("time", "Where the time went", ("part", "time", "share"), rows, tuple(notes))


def restarts(found: Inspection) -> Section:
    """Every attempt."""
    header = ("attempt", "began", "from", "to", "done again", "end", "processes", "engine", "host", "commit")
    rows = [
        (
            f"{a.number} ({a.kind})",
            when(a.began),
            f"{a.position:,}",
            f"{a.reached:,}",
            f"{a.redone:,}",
            f"{a.status}: {a.reason}" if a.reason else a.status,
            "-" if a.world_size is None else str(a.world_size),
            a.engine or "-",
            a.host or "-",
            a.commit or "-",
        )
        for a in found.attempts
    ]
    again = sum(attempt.redone for attempt in found.attempts)
    notes = [f"{again:,} samples were seen again after {len(rows) - 1} restart(s)."] if len(rows) > 1 else []
    notes += [] if rows else ["there is no events.jsonl: an older program trained this run, or it was imported"]
    return Section("restarts", "Attempts and restarts", header, rows, tuple(notes))


def events(found: Inspection) -> Section:
    """What the guard, the monitor and the reader had to say; starts, checkpoints and ends stand in their own tables."""
    shown = [e for e in found.events if e["kind"] not in ("start", "restart", "stop", "checkpoint")]
    counts = Counter(str(event["kind"]) for event in shown)
    rows = [(when(e["time"]), f"{e['position']:,}", str(e["kind"]), facts(e)) for e in shown[-NEWEST:]]
    notes = [", ".join(f"{count} x {kind}" for kind, count in counts.items())] if len(shown) > NEWEST else []
    notes += [] if rows else ["nothing was spoken of: no collapse, no damaged samples, no skipped updates"]
    return Section("events", "Guard and monitor", ("when", "sample", "kind", "facts"), rows, tuple(notes))


def checkpoints(found: Inspection) -> Section:
    """Those that are there."""
    kept = found.checkpoints
    header = ("checkpoint", "samples", "GB", "committed", "written in", "pin", "what it is")
    rows = []
    for c in kept.kept:
        roles = [word for word, yes in (("newest", c.newest), ("best by the probe", c.best)) if yes]
        written = "-" if c.seconds is None else f"{c.seconds:.2f} s"
        committed = "-" if c.when is None else when(c.when)
        what = f"NOT USABLE: {c.flaw}" if c.flaw else ", ".join(roles)
        rows.append((c.name, f"{c.position:,}", f"{c.bytes / 1e9:.3g}", committed, written, c.pin or "-", what))
    notes = [f"in {kept.where}" + (f"; {kept.gone} earlier one(s) were removed" if kept.gone else "")] if rows else []
    notes += [] if rows else [f"{kept.where} {kept.problem or 'holds no checkpoint'}"]
    return Section("checkpoints", "Checkpoints", header, rows, tuple(notes))


def data(found: Inspection) -> Section:
    """Samples of each source that were seen."""
    covered = found.coverage
    header = ("source", "samples", "seen", "share", "passes", "passes at the end", "damaged")
    if covered is None or covered.problem:
        return Section("coverage", "Data", header, [], (covered.problem if covered else "not asked for",))
    rows = [
        (s.source, f"{s.samples:,}", f"{s.seen:,}", f"{s.share:.1%}", f"{s.passes:.3g}", f"{s.passes_at_end:.3g}",
         f"{s.damaged:,}")
        for s in covered.sources
    ]  # fmt: skip
    note = f"After {covered.position:,} samples, counted from the order of the run."
    return Section("coverage", "Data", header, rows, (note,))


def stragglers(found: Inspection) -> Section:
    """Which processes the others waited for."""
    lines = sum(slow.lines for slow in found.stragglers)
    rows = [
        (str(s.rank), f"{s.lines / lines:.0%} of {lines}", f"{s.ratio:.2f}", f"{s.worst:.2f}", f"{s.wait:.1%}")
        for s in found.stragglers[:NEWEST]
    ]
    header = ("rank", "slowest in lines", "time / median", "highest", "its share of waiting for data")
    note = "Time that a process needs before it meets the others; with two processes a ratio of 2 is the most."
    return Section("stragglers", "Stragglers", header, rows, (note if rows else "one process, or none compared yet",))


def standstill(found: Inspection) -> Section:
    """Where every process was when none of them went on."""
    if (stood := found.standstill) is None:
        return Section("standstill", "Standstill", (), [], ("the run never stood still for train.patience seconds",))
    rows = [(str(p.rank), p.host, f"{p.position:,}", span(p.seconds), p.where) for p in stood.processes[:NEWEST]]
    header = ("rank", "host", "samples", "without an update", "where its main thread was")
    return Section("standstill", "Standstill", header, rows, (f"{when(stood.processes[0].time)}: {stood.verdict}",))


def environment(found: Inspection) -> Section:
    """What the newest attempt ran with."""
    rows = [(str(name), str(value)) for name, value in found.environment.items()]
    note = () if rows else ("there is no environment.json",)
    return Section("environment", "Environment", ("fact", "newest attempt"), rows, note)
