"""The process of one run: `python -m fulltune_nb.experiments.one_run FOLDER`, started by a sweep."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fulltune_nb.errors import FulltuneError
from fulltune_nb.experiments.execution import NotebookError, execute
from fulltune_nb.experiments.runs import OUTCOME, REQUEST
from fulltune_nb.files import write_text


def main(folder: Path) -> int:
    """Executes the notebook that `request.json` names, and writes how it went to `outcome.json`."""
    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    outcome = {"status": "done"}
    try:
        execute(Path(request["notebook"]), Path(request["executed"]), request["parameters"])
    except FulltuneError as error:
        print(error, file=sys.stderr)
        outcome = {"status": "failed", "reason": error.reason if isinstance(error, NotebookError) else str(error)}
    write_text(folder / OUTCOME, json.dumps(outcome) + "\n")
    return 0 if outcome["status"] == "done" else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
