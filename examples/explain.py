"""Ask which genes decide, and which of three explanations to trust."""

from scbert.interpretation.explain_files import explain_file

# few cells and steps, to be quick; leave both out for real use
said = explain_file(
    "query.h5ad", "my_model", "explained", input="log1p", cells_per_type=2, n_steps=4, overwrite=True
)
print(said["verdict"])
