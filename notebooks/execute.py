"""Runs the notebooks and keeps their outputs, so that they can be read without running.

    python notebooks/execute.py                            # all of them
    python notebooks/execute.py notebooks/01_kashin_in_five_minutes.ipynb

What depends on the machine is left out: times, versions of Python, kernel metadata.
A warning or an error is no output that anybody should read: the notebook stays as it
was, and the exit code is 1.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from traitlets.config import Config

HERE = Path(__file__).parent
METADATA = {
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}
MAX_SECONDS_OF_A_CELL = 900


def run(path: Path) -> tuple[NotebookNode, list[str]]:
    """Runs a notebook where it lies: it with outputs, and what nobody should read."""
    notebook = nbformat.read(path, as_version=4)
    config = Config()
    with TemporaryDirectory() as sockets:
        if sys.platform != "win32":
            # A port that was free may be taken by the time a kernel binds it.
            config.KernelManager.transport = "ipc"
            config.KernelManager.ip = f"{sockets}/kernel"
        client = NotebookClient(
            notebook,
            timeout=MAX_SECONDS_OF_A_CELL,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": str(path.parent)}},
            config=config,
        )
        try:
            client.execute()
        except CellExecutionError as error:
            return notebook, [str(error)]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    return notebook, [each.text for each in outputs if each.get("name") == "stderr"]


def execute(path: Path) -> list[str]:
    """Runs a notebook and writes it back; returns what keeps it from being written."""
    notebook, faults = run(path)
    if not faults:
        notebook.metadata = nbformat.from_dict(METADATA)
        nbformat.write(notebook, path)
    return faults


def main(arguments: list[str]) -> int:
    """Executes the notebooks named, or all; returns the exit code."""
    paths = [Path(name) for name in arguments] or sorted(HERE.glob("*.ipynb"))
    failed = 0
    for path in paths:
        faults = execute(path.resolve())
        failed |= bool(faults)
        print(f"{path.name}: {'not written' if faults else 'written'}")
        print("".join(f"  {fault}\n" for fault in faults), end="", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
