"""Rows of a batch at once: those asked for, with labels and indices; genes dropped at random."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scbert.tokenization import ScBertTokenizer
from scbert.training.cell_batches import CellDataset, DataCollatorForCells


@pytest.fixture
def bins(adata, gene_panel):
    return ScBertTokenizer(gene_panel=gene_panel).bin_cells(adata)


def test_rows_labels_and_indices(bins):
    cells = CellDataset(bins, np.arange(120) % 3)
    batch = cells.__getitems__([5, 0, 119, 125])
    assert len(cells) == 120 and batch["labels"].tolist() == [2, 0, 2, 2]
    assert (batch["bins"] != bins[[5, 0, 119, 5]]).nnz == 0 and batch["bins"].dtype == np.int8
    assert batch["indices"].tolist() == [5, 0, 119, 125]
    assert "labels" not in CellDataset(bins).__getitems__([0])


def test_some_rows_in_their_order(bins):
    cells = CellDataset(bins, np.arange(120), rows=[10, 40, 20])
    assert len(cells) == 3 and cells.__getitems__([1, 5])["labels"].tolist() == [40, 20]
    assert cells.bins is bins


def test_batches_are_what_the_tokenizer_says(bins, gene_panel):
    tokenizer = ScBertTokenizer(gene_panel=gene_panel, keep_zeros=False)
    loader = torch.utils.data.DataLoader(
        CellDataset(bins, np.arange(120)), 7, collate_fn=DataCollatorForCells(tokenizer), num_workers=2
    )
    for number, batch in enumerate(loader):
        rows = np.arange(7 * number, min(7 * number + 7, 120))
        assert batch.pop("labels").tolist() == rows.tolist()
        for name, wanted in tokenizer.encode_bins(bins[rows]).items():
            np.testing.assert_array_equal(batch[name].numpy(), wanted)


def test_empty_cells():
    empty = CellDataset(sp.csr_matrix((2, 300), dtype=np.int8))
    assert empty.__getitems__([0, 1])["bins"].nnz == 0


def test_as_many_labels_as_cells(bins):
    with pytest.raises(ValueError, match="3 labels for 120 cells"):
        CellDataset(bins, [1, 2, 3])
