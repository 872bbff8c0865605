"""`foundation --help` as a page: what this is, the commands in groups, the first two of them."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

HELP = "Self-supervised pretraining for SAR images: from chips of any sensor to an encoder and its scores."
EPILOG = (
    "[bold]Begin with[/]\n\n"
    "foundation demo    [dim]# synthetic corpus, pretraining, probe and report in a few minutes[/]\n\n"
    "foundation shards pack corpus CHIPS --name mychips --split train    [dim]# your chips; parent folder = class[/]"
)
GROUPS = {
    "Data": ("shards",),
    "Pretraining": ("demo", "train", "compare"),
    "A run": ("inspect", "report", "curves", "track", "replay", "profile"),
    "Judging an encoder": ("evaluate", "splits", "paired", "robustness", "drift"),
    "Encoders in and out": ("export", "import"),
    "Cluster": ("plan", "doctor", "submit"),
    "This installation": ("list", "parity", "bench"),
}
"""Every command, in the order of the page; some of them join from other packages."""


class Page(TyperGroup):
    """The commands by group; one without a group comes first, where it is seen."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        places = {name: title for title, names in GROUPS.items() for name in names}
        for name, command in self.commands.items():
            command.rich_help_panel = places.get(name)  # type: ignore[attr-defined]  # typer's, of commands and groups
        order = list(places)
        self.commands = dict(sorted(self.commands.items(), key=lambda c: order.index(c[0]) if c[0] in order else -1))
