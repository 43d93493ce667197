"""Run the notebook of the documentation again: the Python interface on the embedded demo model.

Writes docs/notebook.ipynb with the outputs of this run, and docs/notebook.md, the page made from it. Needs
the extra `notebook`.

    python benchmarks/notebook.py [--steps 20]
"""

import argparse
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

DOCS = Path(__file__).parent.parent / "docs"
NOTICE = "<!-- Written by benchmarks/notebook.py, which runs the notebook. -->"
INTRODUCTION = """# A smaller model in a notebook

The functions of `factory` take the options of the command line by name. Everything here runs on a CPU,
without a network, on the demo model that comes with the program, in a few minutes.
[The notebook](notebook.ipynb) is stored with its outputs."""


def cells(steps: int) -> list[nbformat.NotebookNode]:
    """Return the cells without outputs.

    Args:
        steps: Optimiser steps of the healing.
    """
    quick = "limit=50, eval_documents=8"
    return [
        new_markdown_cell(INTRODUCTION),
        new_markdown_cell("What would a build do and need? Nothing is downloaded or computed."),
        new_code_cell("import factory\n\nfactory.preview('demo', drop=0.25)"),
        new_markdown_cell("Which layers could go? Every criterion answers, and nothing is cut yet."),
        new_code_cell(
            "plans = factory.plan('demo', drop=0.3, criterion='all', samples=64, plan_documents=8)\nplans"
        ),
        new_code_cell("plans.figure()"),
        new_markdown_cell(
            "Drop them, heal the cut, and measure the source, the pruned and the healed model."
        ),
        new_code_cell(f"small = factory.build('demo', drop=0.3, heal_steps={steps}, {quick})\nsmall"),
        new_code_cell("small.plan.dropped, small.evaluations['healed'].loss.nats"),
        new_markdown_cell("Every table is a DataFrame, and every number behind it an attribute."),
        new_code_cell("plans.table.sort_values('loss, unhealed').head(2)['criterion'].tolist()"),
        new_markdown_cell("The result is a model like any other."),
        new_code_cell(
            "inputs = small.tokenizer('def main(', return_tensors='pt')\n"
            "tokens = small.model.generate(**inputs, max_new_tokens=12, do_sample=False)\n"
            "print(small.tokenizer.decode(tokens[0]))"
        ),
        new_markdown_cell("Errors are one sentence and a hint."),
        new_code_cell(
            "try:\n    factory.build('demo', drop=1.5)\nexcept factory.FactoryError as error:\n"
            "    print(error.message)\n    print(error.hint)"
        ),
    ]


def without_progress(notebook: nbformat.NotebookNode) -> None:
    """Drop what does not belong to a stored notebook: times, progress bars, warnings with paths."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [
                one
                for one in cell.outputs
                if one.get("name") != "stderr"
                and "application/vnd.jupyter.widget-view+json" not in one.get("data", {})
            ]
    notebook.metadata.pop("widgets", None)


def main() -> None:
    """Execute the cells in an empty folder, and write the notebook and its page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of the healing")
    notebook = new_notebook(cells=cells(parser.parse_args().steps))
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": folder}}).execute()
    without_progress(notebook)
    nbformat.write(notebook, DOCS / "notebook.ipynb")
    page, resources = MarkdownExporter().from_notebook_node(notebook, {"unique_key": "notebook"})
    ((name, image),) = resources["outputs"].items()
    (DOCS / "notebook.png").write_bytes(image)
    page = page.replace(f"![png]({name})", "![The angular distances and the chosen cut](notebook.png)")
    (DOCS / "notebook.md").write_text(f"{NOTICE}\n\n{page.strip()}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
