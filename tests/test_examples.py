"""The notebooks of `examples/` run from top to bottom, and show what their code shows."""

import nbformat
import pytest
from notebooks import NOTEBOOKS, code_digest, run, shown_by


def outputs_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_are_two_notebooks():
    assert sorted(NOTEBOOKS) == ["esft", "fine_tune"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom(name, tmp_path):
    ran = run(NOTEBOOKS[name], tmp_path)
    code = [cell for cell in ran.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    stored = outputs_of(nbformat.read(NOTEBOOKS[name], as_version=4))
    pictures = ["image/png" in output.get("data", {}) for output in stored]
    assert sum("image/png" in output.get("data", {}) for output in outputs_of(ran)) == sum(pictures)
    assert [path.name for path in tmp_path.iterdir()] == ["tmp"], "it writes into temporary folders alone"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_output_that_is_stored_with_a_notebook_is_that_of_its_code(name):
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    assert shown_by(notebook) == code_digest(notebook), "its code was changed since: make notebooks"
    assert [output.output_type for output in outputs_of(notebook) if output.output_type == "error"] == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_small_and_names_no_folder_of_the_machine_that_ran_it(name):
    assert NOTEBOOKS[name].stat().st_size < 250_000
    shown = "".join(
        str(output.get("text", output.get("data", {}).get("text/plain")))
        for output in outputs_of(nbformat.read(NOTEBOOKS[name], as_version=4))
    )
    assert "/tmp" not in shown and "/home" not in shown and "/work" not in shown
