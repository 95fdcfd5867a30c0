"""Convert an original scBERT checkpoint: original.pth, and its genes in genes.txt, one a line, in its order."""

from transformers import AutoModelForMaskedLM, AutoTokenizer

from scbert.inference.convert_original import convert

print(convert("original.pth", "genes.txt", "converted", overwrite=True))

model = AutoModelForMaskedLM.from_pretrained("converted")
tokenizer = AutoTokenizer.from_pretrained("converted")
print(f"{len(tokenizer.gene_panel):,} genes, {model.num_parameters():,} parameters")
