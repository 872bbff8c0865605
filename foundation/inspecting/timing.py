"""How fast a run was and where its time went, from the lines of its metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple

from foundation.config import Config
from foundation.inspecting.lines import sound
from foundation.models.families import flops
from foundation.planning.cluster import Cluster, known_gpu
from foundation.planning.engines import peak

Rows = Sequence[Mapping[str, Any]]


class Window(NamedTuple):
    """The time before one line: its end (seconds since 1970), its length, and the seconds of it that were lost."""

    end: float
    seconds: float
    images_per_s: float
    data: float
    checkpoint: float
    monitor: float

    @property
    def rest(self) -> float:
        """Seconds of targets, model, optimiser and collectives."""
        return max(self.seconds - self.data - self.checkpoint - self.monitor, 0.0)


class Speed(NamedTuple):
    """Images per second over all processes; `mfu` in [0, 1] at the median, None where no data sheet is known."""

    last: float
    median: float
    slow_tenth: float
    mfu: float | None
    peak_memory_gb: float | None


class Spent(NamedTuple):
    """Seconds of the logged windows, and what they went into."""

    seconds: float
    data: float
    checkpoint: float
    monitor: float
    rest: float


def windows(rows: Rows) -> list[Window]:
    """The windows of lines that know their speed. Lines of older programs have no length: it follows from positions."""
    found, before = [], 0.0
    for row in rows:
        speed, position = row.get("images_per_s"), row["position"]
        if sound(speed) and speed > 0:
            seconds = _number(row, "window_s") or max(position - before, 0) / speed
            data = _number(row, "data_wait") * seconds
            stall, look = _number(row, "checkpoint_stall_s"), _number(row, "monitor_s")
            found.append(Window(row["time"], seconds, speed, data, stall, look))
        before = position
    return found


def _number(row: Mapping[str, Any], key: str) -> float:
    """A measurement, 0 where the line has none."""
    value = row.get(key)
    return float(value) if sound(value) else 0.0


def speed(found: Sequence[Window], rows: Rows, config: Config | None, record: Mapping[str, Any]) -> Speed | None:
    """Of these windows; `record` is what environment.json says."""
    if not found:
        return None
    rates = [window.images_per_s for window in found]
    slow = quantiles(rates, n=10, method="inclusive")[0] if len(rates) > 1 else rates[0]
    device, host = (max(_number(row, key) for row in rows) for key in ("peak_device_gb", "peak_rss_gb"))
    middle = median(rates)
    return Speed(rates[-1], middle, slow, utilisation(middle, config, record), device or host or None)


def utilisation(rate: float, config: Config | None, record: Mapping[str, Any]) -> float | None:
    """Executed operations over the data sheet's dense peak in the arithmetic of the run; None for an unknown device."""
    gpu, world = known_gpu(str(record.get("device", ""))), record.get("world_size")
    if config is None or gpu is None or not sound(world) or not world:
        return None
    most = peak(config, Cluster.of(int(world), 1, gpu, {}))
    return rate * flops(config).training / (most * int(world))


def spent(found: Iterable[Window]) -> Spent | None:
    """The sum over the windows."""
    columns = [(w.seconds, w.data, w.checkpoint, w.monitor, w.rest) for w in found]
    return Spent(*map(sum, zip(*columns, strict=True))) if columns else None
