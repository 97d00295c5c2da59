"""Running the notebooks of `examples/`, as their readers do: from top to bottom in a new kernel.

    python tests/support/notebooks.py [NAME ...]      runs them, and keeps in the files what they show

What is kept is text and pictures, without progress bars and the names of temporary folders, and a digest of the code
that showed it: `shown_by` tells whether that is still the notebook's code.
"""

import hashlib
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from places import ROOT

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "examples").glob("*.ipynb"))}
_DIGEST = "code_that_showed_this"
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_PLACE = re.compile(rf"(/\S*/tmp\w+|{re.escape(str(ROOT))})(\S*)( *)")


def code_digest(notebook: nbformat.NotebookNode) -> str:
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def shown_by(notebook: nbformat.NotebookNode) -> str | None:
    """Digest of the code that made the outputs."""
    return notebook.metadata.get(_DIGEST)


def run(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in `folder`, with its temporary folders in `folder/tmp`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; the message has the cell and its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    (folder / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "HF_HUB_OFFLINE": "1"}
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}})
    client.execute(env=environment)
    return notebook


def keep_outputs(path: Path, ran: nbformat.NotebookNode) -> None:
    """Writes what a notebook showed into its file."""
    for cell in ran.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := _kept(output))]
    ran.metadata = {"kernelspec": ran.metadata.kernelspec, _DIGEST: code_digest(ran)}
    nbformat.write(ran, path)


def _kept(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    if output.output_type == "stream":
        output.text = _without_places(output.text)
        return output if output.name == "stdout" and output.text.strip() else None
    output.metadata = {}
    if "image/png" in output.data:
        output.data = {"image/png": output.data["image/png"]}
        return output
    text = _without_places(output.data.get("text/plain", ""))
    output.data = {"text/plain": text}
    # The Trainer's progress is a table of HTML that is drawn anew at every step.
    return output if text.strip() and not text.startswith("<IPython.core.display.HTML") else None


def _without_places(text: str) -> str:
    """Without colours and this machine's folders; the frame of a table stays straight."""
    return _PLACE.sub(_named, _COLOURS.sub("", text))


def _named(match: re.Match) -> str:
    name = "CHECKOUT" if match[1] == str(ROOT) else "FOLDER"
    return (name + match[2] + match[3]).ljust(len(match[0]) if match[3] else 0)


if __name__ == "__main__":
    import tempfile

    for name in sys.argv[1:] or NOTEBOOKS:
        with tempfile.TemporaryDirectory() as scratch:
            keep_outputs(NOTEBOOKS[name], run(NOTEBOOKS[name], Path(scratch)))
        print(f"{NOTEBOOKS[name].relative_to(ROOT)}: run, and kept what it shows")
