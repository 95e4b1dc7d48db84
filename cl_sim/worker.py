"""The process that trains groups: `python -m cl_sim.worker RUN_FOLDER GROUP...`. Started by `launch`, quiet unless one fails."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from cl_sim.errors import ClSimError


def main(run_dir: str, *numbers: str) -> int:
    """Train the groups in turns; 0 when all are finished, 3 when stopped on request, 1 after an error."""
    from cl_sim.session import StopSignal, train_abreast

    stop = StopSignal()
    stop.install()
    ended = train_abreast(Path(run_dir), [int(number) for number in numbers], stop).values()
    for error in ended:
        if isinstance(error, ClSimError):
            print(f"Error: {error}", file=sys.stderr)
        elif isinstance(error, Exception):
            traceback.print_exception(error)
    if any(isinstance(one, Exception) for one in ended):
        return 1
    return 0 if all(one == "finished" for one in ended) else 3


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
