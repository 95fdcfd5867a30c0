"""Pretrain on cells without labels, then fine-tune from that."""

from scbert.training.run_finetune import finetune
from scbert.training.run_pretrain import pretrain

learnt = pretrain(
    "query.h5ad", "pretrained", recipe="small", input="log1p", epochs=1, min_genes=0, overwrite=True
)
print(f"hidden bins guessed right: {learnt['masked_accuracy']:.3f}")
print(f"each gene's commonest bin would be: {learnt['baseline_masked_accuracy']:.3f}")

finetune(
    "reference.h5ad",
    "cell_type",
    "finetuned",
    base="pretrained",
    input="log1p",
    epochs=1,
    min_genes=0,
    overwrite=True,
)
