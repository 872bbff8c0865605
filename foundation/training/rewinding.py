"""Going back: the newest checkpoint before the trouble, and a note of what is passed over, which outlives a restart."""

from __future__ import annotations

import json

from foundation.config import Config
from foundation.errors import NumericsError
from foundation.files import read_json, write_whole
from foundation.training import checkpoint
from foundation.training.committed import committed, place_of, position_of
from foundation.training.guard import ADVICE, Guard, Rewind
from foundation.training.pins import settle
from foundation.training.places import home
from foundation.training.ranks import Ranks, everywhere, together
from foundation.training.setup import fill
from foundation.training.step import Learner
from foundation.training.tracking import Tracker

JUMPS = "jumps.json"  # in the run folder: spans [begin, end) of samples that are passed over


def jumps(config: Config, ranks: Ranks) -> list[list[int]]:
    """The spans that this run passes over, as rank 0 finds them."""
    first, file = ranks.rank == 0, config.run_folder / JUMPS
    return together(ranks, lambda: list(read_json(file).get("jumps", [])) if first and file.exists() else [])[0]


def go_back(learner: Learner, guard: Guard, tracker: Tracker, ranks: Ranks, why: Rewind) -> int:
    """Load the newest checkpoint before the trouble, note the span to pass over; the position to go on from.

    Checkpoints beyond it go: they hold what came of the trouble. Raises NumericsError when there is none before it.
    """
    config, rank0 = learner.config, ranks.rank == 0
    path, state, _ = checkpoint.restore(home(config), ranks, at_most=why.first)
    if path is None:
        raise NumericsError(
            f"updates since sample {why.first:,} were spoilt, and no checkpoint is from before them",
            where=f"sample {why.end}",
            do=f"{ADVICE}; a smaller train.checkpoint_every or a larger train.keep leaves more to go back to",
        )
    guard.jumps.append((why.first, why.end))
    position: int = state["position"]

    def note() -> None:
        if rank0:  # first the note: after a crash in between the span is passed over all the same
            write_whole(config.run_folder / JUMPS, json.dumps({"jumps": guard.jumps}) + "\n")
            folder = place_of(home(config))
            settle(folder, path.name)  # before the later ones go: the best of what remains is pinned at any time
            for name in committed(folder):
                if position_of(name) > position:
                    (folder / name).remove()

    everywhere(ranks, note)
    fill(learner, path, state, ranks)
    guard.restore(state.get("guard", {}))
    tracker.rewind(position)
    tracker.event("rewound", why.end, to=position, passed_over=[why.first, why.end])
    tracker.note(f"{why}; back to {path.name}, samples {why.first:,} to {why.end:,} will be passed over")
    return position
