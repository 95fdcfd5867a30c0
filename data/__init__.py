"""Files to validated cells, and results back to files.

`paths` looks at inputs and outputs before anything slow is imported; `read*` give cells, `write*` take results;
`corpus_*` build and read corpora for pretraining; `multiomics`, `modalities` and `regions` handle cells with peaks.
"""
