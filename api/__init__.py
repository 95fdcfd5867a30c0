"""The face in Python: what `scbert.annotate`, `scbert.finetune` and the others are, and the model they hand out."""
