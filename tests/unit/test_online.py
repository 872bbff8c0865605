"""The labelled images of the online probe: two parts that share nothing, a function of seed and content alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.config import Config
from foundation.errors import DataError
from foundation.training.chosen import Chosen, first
from foundation.training.online import Probe, split
from foundation.training.ranks import Ranks
from shards.catalog import load
from shards.stream import Reader

Make = Callable[..., Config]
SAMPLES = st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(0, 30)), max_size=40)


@given(SAMPLES, st.integers(2, 12), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_the_parts_share_no_image_and_hold_each_class_alike(
    samples: list[tuple[str | None, int]], count: int, seed: int
) -> None:
    named = {number: label for label, number in reversed(samples)}  # equal images have equal classes
    classes, hashes = [named[n] for _, n in samples], [str(n) for _, n in samples]
    known = Counter(label for label in named.values() if label)
    usable = {label: n for label, n in known.items() if n > 1}
    if len(usable) < 2:
        with pytest.raises(DataError, match=rf"two classes of two different images, and found {len(usable)}"):
            split(classes, hashes, count, seed)
        return
    parts = split(classes, hashes, count, seed)
    bank, held = ({hashes[i] for i in part} for part in parts)
    assert not bank & held
    assert len(bank) == len(parts.bank) == min(count, sum((n + 1) // 2 for n in usable.values()))
    assert len(held) == len(parts.held_out) == min(count, sum(n // 2 for n in usable.values()))
    assert {classes[i] for part in parts for i in part} <= set(usable)
    counts = Counter(classes[i] for i in parts.held_out)
    assert all(counts[a] >= min(n // 2, max(counts.values()) - 1) for a, n in usable.items())
    turned = split(classes[::-1], hashes[::-1], count, seed)
    for part, other in zip(parts, turned, strict=True):
        assert [hashes[i] for i in part] == [hashes[::-1][i] for i in other]


def test_the_test_split_is_never_read(tiny_config: Make, catalog: Path) -> None:
    whole = load(catalog)
    probe = Probe(whole, tiny_config("monitor.probe_images=20"), 8)
    assert [source.split for source in probe.chosen.reader.catalog.sources] == ["train"]
    assert len(probe.chosen) == 40
    tested = Reader(whole.select("test"))
    keys = {probe.chosen.reader[i].key for i in probe.chosen.ids}
    assert not keys & {tested[i].key for i in range(len(tested))}


def test_scores_are_those_of_the_part_that_was_held_out(tiny_config: Make, catalog: Path) -> None:
    probe = Probe(load(catalog), tiny_config("monitor.probe_images=24", "monitor.probe_linear=true"), 8)
    labels = torch.cat([part.labels for part in probe.chosen.parts(Ranks(), torch.device("cpu"))])
    features = torch.nn.functional.one_hot(labels).float()
    assert probe.scores(features, labels) == {"probe_knn": 1, "probe_linear": 1}
    wrong = features.clone()
    wrong[probe.known :] = features[probe.known :].roll(1, 1)
    assert probe.scores(wrong, labels) == {"probe_knn": 0, "probe_linear": 0}
    assert all(value != value for value in probe.scores(features * torch.inf, labels).values())


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16])
def test_ranks_look_at_all_images_in_equally_many_passes(tiny_config: Make, catalog: Path, size: int) -> None:
    config = tiny_config()
    learnt = load(catalog).select(config.data.splits)
    chosen = Chosen(learnt, first(learnt, config, 13), 64, 4)
    assert len(set(chosen.ids)) == 13
    everything = torch.cat([p.images for p in Chosen(learnt, chosen.ids, 64, 13).parts(Ranks(), torch.device("cpu"))])
    found = [list(chosen.parts(Ranks(rank, size), torch.device("cpu"))) for rank in range(size)]
    assert len({tuple(len(part.numbers) for part in each) for each in found}) == 1
    rows = [torch.cat([part.images for part in each]) for each in found]
    alone = Ranks(0, size, lambda _: rows)
    assert torch.equal(chosen.whole(alone, [rows[0]]), everything)


def test_the_images_looked_at_are_those_the_run_begins_with(tiny_config: Make, catalog: Path) -> None:
    from foundation.training.data import open_data, open_stream
    from foundation.training.engine import Engine

    config = tiny_config("data.weights={free: 1, known: 3}")
    data = open_data(config)
    batch = next(iter(open_stream(config, data, Engine(config), 0)))
    assert first(data, config, 8) == batch.sample_id.tolist()
    assert len(first(data, config, 10_000)) == data.samples
