"""Run the notebook of the documentation again: the Python interface on the embedded demo model.

Writes docs/python-interface.ipynb with the outputs of this run. Needs nbclient and ipykernel.

    python benchmarks/notebook.py [--steps 80]
"""

import argparse
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

NOTEBOOK = Path(__file__).parent.parent / "docs" / "python-interface.ipynb"


def cells(steps: int) -> list[nbformat.NotebookNode]:
    """Return the cells without outputs.

    Args:
        steps: Optimiser steps of the healing.
    """
    return [
        new_markdown_cell(
            "# A smaller model in a notebook\n\n"
            "The functions of `factory` take the options of the command line by name. Everything here runs "
            "on a CPU, without a network, on the model that comes with the program."
        ),
        new_code_cell("import factory\n\nfactory.preview('demo', drop=0.3)"),
        new_markdown_cell("Which layers could go? Nothing is cut yet."),
        new_code_cell(
            "plans = factory.plan('demo', drop=0.3, criterion='all', samples=16, plan_documents=8)\nplans"
        ),
        new_code_cell("plans.figure()"),
        new_markdown_cell("Drop them, heal the cut, and measure source, pruned and healed model."),
        new_code_cell(f"small = factory.build('demo', drop=0.3, heal_steps={steps})\nsmall"),
        new_code_cell("small.plan.dropped, small.evaluations['healed'].loss.nats"),
        new_markdown_cell("The result is a model like any other."),
        new_code_cell(
            "inputs = small.tokenizer('def main(', return_tensors='pt')\n"
            "tokens = small.model.generate(**inputs, max_new_tokens=12, do_sample=False)\n"
            "print(small.tokenizer.decode(tokens[0]))"
        ),
        new_markdown_cell("Errors are one sentence and a hint."),
        new_code_cell(
            "try:\n    factory.build('demo', drop=1.5)\nexcept factory.FactoryError as error:\n"
            "    print(error.message, '|', error.hint)"
        ),
    ]


def main() -> None:
    """Execute the cells in an empty folder, and write the notebook."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=80, help="optimiser steps of the healing")
    notebook = new_notebook(cells=cells(parser.parse_args().steps))
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
