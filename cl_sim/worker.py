"""The process that trains one group: `python -m cl_sim.worker RUN_FOLDER GROUP`. Started by `launch`, quiet unless it fails."""

from __future__ import annotations

import sys
from pathlib import Path

from cl_sim.errors import ClSimError


def main(run_dir: str, group: str) -> int:
    """Train the group; 0 when finished, 3 when stopped on request, 1 after an error."""
    from cl_sim.session import StopSignal, train

    stop = StopSignal()
    stop.install()
    try:
        return 0 if train(Path(run_dir), int(group), stop) == "finished" else 3
    except ClSimError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
