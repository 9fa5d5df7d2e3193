"""docs/first_steps.ipynb runs from its first cell to its last."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

import lightning_prune as lp
from lightning_prune.demo import demo_text

NOTEBOOK = Path(__file__).parent.parent / "docs" / "first_steps.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_shows_plots_and_a_fair_table(tmp_path: Path) -> None:
    """On a few windows of the demo: its whole test split takes most of a run, and the README's example has it."""
    np.save(tmp_path / "demo.npy", lp.calibration_set(demo_text("test"), "demo", num_samples=8).numpy())
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('evaluate_on=["demo"]', 'evaluate_on=["demo.npy"]')
    assert sum("demo.npy" in cell.source for cell in notebook.cells) == 2
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert shown.count("image/png") == 2
    assert "[]\n" in [output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"]
    assert shown.count("text/html") == 2


def test_the_notebook_is_kept_without_outputs() -> None:
    """They would go stale, and two plots are larger than the text of the page."""
    code = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[]] * len(code)
    assert [cell.execution_count for cell in code] == [None] * len(code)
