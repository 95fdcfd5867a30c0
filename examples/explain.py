"""Ask which genes decide on each type, and which of three explanations to trust."""

import scbert
from scbert.interpretation.explain_files import explain_file

# few cells and steps, to be quick; leave both out for real use
quick = {"input": "log1p", "cells_per_type": 2, "n_steps": 4}

genes = scbert.explain("query.h5ad", "my_model", n_top=3, **quick)
print(genes[["cell_type", "gene", "score"]])

# what the command does: tables, pictures, and the deletion test
said = explain_file("query.h5ad", "my_model", "explained", overwrite=True, **quick)
print(said["verdict"])
