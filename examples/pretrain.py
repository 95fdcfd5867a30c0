"""Pretrain on cells without labels, then fine-tune from that."""

import scbert

# one pass and the smallest size show that it works
few = {"input": "log1p", "epochs": 1, "min_genes": 0, "overwrite": True}

base = scbert.pretrain("query.h5ad", "pretrained", recipe="small", **few)
print(f"hidden bins guessed right: {base.metrics['masked_accuracy']:.3f}")
print(f"each gene's commonest bin would be: {base.metrics['baseline_masked_accuracy']:.3f}")

model = scbert.finetune("reference.h5ad", "cell_type", "finetuned", base=base, **few)
print(model)
