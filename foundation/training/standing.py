"""What a tracking store has of a run: `tracking.json` in the run folder."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from foundation.errors import StorageError
from foundation.files import write_whole

FILE, RUNNING = "tracking.json", "RUNNING"


@dataclass(frozen=True)
class Facts:
    """`key` names the run in every store, and `run_id` in the one that was used last.

    `sent` counts the bytes of metrics.jsonl that this store has. `status` is what the training left: RUNNING where it
    goes on, or where it was killed.
    """

    key: str
    run_id: str | None = None
    sent: int = 0
    status: str | None = None
    config_hash: str | None = None


class Standing:
    """The facts of a run folder, which threads change and which are on disk after every change."""

    def __init__(self, folder: Path, run_id: str | None = None) -> None:
        """`run_id` is that of a checkpoint, for a run folder without such a file."""
        self.folder = folder
        self._lock = threading.Lock()
        self._rewound = 0
        self.facts = read(folder) or Facts(uuid.uuid4().hex, run_id)

    def update(self, **changes: object) -> None:
        """Change facts. A file that cannot be written is no error: something is then sent again."""
        with self._lock:
            self._change(changes)

    def _change(self, changes: Mapping[str, object]) -> None:
        self.facts = replace(self.facts, **changes)  # type: ignore[arg-type]
        with suppress(StorageError):
            write_whole(self.folder / FILE, json.dumps(asdict(self.facts), indent=1) + "\n")

    def rewind(self, same: int) -> None:
        """Of metrics.jsonl only the first `same` bytes are what they were; what is being sent is from before that."""
        with self._lock:
            self._rewound += 1
            self._change({"sent": min(self.facts.sent, same)})

    def mark(self) -> tuple[int, int]:
        """How many bytes the store has, and how many rewinds there were before: `advance` wants to know."""
        with self._lock:
            return self.facts.sent, self._rewound

    def advance(self, sent: int, rewound: int) -> bool:
        """The store has so many bytes of the file as it was after that many rewinds; False if there was another."""
        with self._lock:
            if same := rewound == self._rewound:
                self._change({"sent": sent})
            return same

    def begin(self, config_hash: str, position: int, same: int) -> str | None:
        """A training begins at `position`, of whose metrics.jsonl the first `same` bytes are what they were.

        One that begins anew with other settings is another run. Returns the id of the run before it, if that was killed
        and nobody has said so to the store.
        """
        before, left = self.facts, None
        if position == 0 and before.config_hash not in (None, config_hash):
            left = before.run_id if before.status == RUNNING else None
            self.facts = Facts(uuid.uuid4().hex)
        self.update(status=RUNNING, config_hash=config_hash, sent=min(self.facts.sent, same))
        return left

    def belongs_to(self, run_id: str) -> None:
        """The run is called so in the store; in another one than before nothing is known to be there."""
        if run_id != self.facts.run_id:
            self.update(run_id=run_id, sent=0)


def read(folder: Path) -> Facts | None:
    """The facts of a run folder; None where there are none, or none that can be read."""
    try:
        return Facts(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
