"""`python -m unreported ...` is `foundation ...` whose runs end without their report, which takes longer than they."""

from __future__ import annotations

from foundation.cli import main
from foundation.training import run

if __name__ == "__main__":
    run.publish = lambda *_: None
    main()
