import numpy as np
import pytest
import scipy.sparse as sp

from scbert.data.cell_dataset import CellDataset, stack_rows
from scbert.tokenization import ScBertTokenizer


@pytest.fixture
def bins(adata, gene_panel):
    return ScBertTokenizer(gene_panel=gene_panel).bin_cells(adata)


def test_rows_and_labels(bins):
    labels = np.arange(120) % 3
    dataset = CellDataset(bins, labels)
    assert len(dataset) == 120 and dataset[4]["labels"] == 1
    back = stack_rows([dataset[i] for i in (5, 0, 119)], 300)
    assert (back != bins[[5, 0, 119]]).nnz == 0 and back.dtype == np.int8
    assert "labels" not in CellDataset(bins)[0]
    np.testing.assert_array_equal(dataset.lengths, np.diff(bins.indptr))


def test_subsets_of_subsets(bins):
    dataset = CellDataset(bins, np.arange(120), rows=[10, 20, 30, 40])
    assert [dataset.subset([3, 1]).subset([1, 0])[i]["labels"] for i in (0, 1)] == [20, 40]
    assert dataset.bins is dataset.subset([0]).bins


def test_empty_cells(bins):
    empty = CellDataset(sp.csr_matrix((2, 300), dtype=np.int8))
    assert stack_rows([empty[0], empty[1]], 300).nnz == 0


def test_wrong_arguments(bins):
    with pytest.raises(TypeError, match="CSR"):
        CellDataset(bins.toarray())
    with pytest.raises(ValueError, match="3 labels for 120 cells"):
        CellDataset(bins, [1, 2, 3])
