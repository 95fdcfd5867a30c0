"""Streaming: the same cells as from memory, each once over processes and workers, exact restarts."""

import numpy as np
import pytest
import scipy.sparse as sp
from torch.utils.data import DataLoader, Dataset

from scbert import ScBertTokenizer
from scbert.data.corpus_build import build_corpus
from scbert.data.corpus_stream import BinnedCells, CellFile, StreamOrder, open_corpus
from scbert.data.read import read_cells
from scbert.tokenization import InputError
from scbert.training.cell_batches import CellDataset


@pytest.fixture
def tokenizer(gene_panel):
    # in another order than the files', and with genes that they lack
    return ScBertTokenizer(gene_panel=[*gene_panel[::-2], "NOWHERE1", *gene_panel[:100:2]])


@pytest.fixture
def files(adata, tmp_path):
    folder = tmp_path / "cells"
    folder.mkdir()
    adata[:70].write_h5ad(folder / "a.h5ad")
    logged = adata[70:].copy()
    sums = np.asarray(logged.X.sum(axis=1)).ravel()
    logged.X = sp.csr_matrix(logged.X.multiply(1e4 / sums[:, None])).log1p().astype(np.float32)
    logged.write_h5ad(folder / "b.h5ad")
    return [folder / "a.h5ad", folder / "b.h5ad"]


@pytest.fixture
def corpus(files, tmp_path):
    build_corpus(files, tmp_path / "corpus", min_genes=0, shard_cells=25)
    return tmp_path / "corpus"


def bins_in_memory(files, tokenizer):
    return sp.vstack([tokenizer.bin_cells(read_cells(path)) for path in files], format="csr")


@pytest.mark.parametrize("source", ["corpus", "files"])
def test_bins_are_those_of_the_files(corpus, files, tokenizer, source):
    wanted = bins_in_memory(files, tokenizer)
    parts = (
        open_corpus(corpus, tokenizer)
        if source == "corpus"
        else [CellFile(path, tokenizer) for path in files]
    )
    cells = BinnedCells(parts, tokenizer)
    assert cells.shape == wanted.shape and (cells[np.arange(120)] != wanted).nnz == 0
    order = np.random.default_rng(0).permutation(120)
    assert (cells[order] != wanted[order]).nnz == 0
    assert (cells[[7, 100, 7]] != wanted[[7, 100, 7]]).nnz == 0


@pytest.mark.parametrize("source", ["corpus", "files"])
def test_workers_read_the_same(corpus, files, tokenizer, source):
    parts = (
        open_corpus(corpus, tokenizer)
        if source == "corpus"
        else [CellFile(path, tokenizer) for path in files]
    )
    cells = BinnedCells(parts, tokenizer)
    cells[[0]]  # opened before the workers are forked
    loader = DataLoader(
        CellDataset(cells), batch_size=32, num_workers=2, collate_fn=lambda batch: batch["bins"]
    )
    assert (sp.vstack(list(loader)) != bins_in_memory(files, tokenizer)).nnz == 0


class Numbers(Dataset):
    """Items that say which they are."""

    def __getitem__(self, number):
        return number


def stream(n_cells, rank, world_size, n_workers, epoch=0, skip=0, **options):
    order = StreamOrder(n_cells, 8, 3, rank, world_size, n_workers, **options)
    order.set_epoch(epoch)
    batches = list(order)
    assert len(batches) == len(order)
    loader = DataLoader(Numbers(), batch_sampler=batches[skip:], num_workers=n_workers, collate_fn=list)
    return list(loader)


def test_four_ranks_of_two_workers_see_each_cell_once():
    ranks = [stream(1003, rank, 4, 2, block_size=16, window=4) for rank in range(4)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [cell for batches in ranks for batch in batches for cell in batch]
    assert len(seen) == 1003 and set(seen) == set(range(1003))


@pytest.mark.parametrize("n_cells", [8, 9, 63, 64, 65, 127, 128, 129, 1000])
@pytest.mark.parametrize("world_size, n_workers", [(1, 0), (2, 1), (4, 2)])
def test_every_size_is_dealt_out(n_cells, world_size, n_workers):
    orders = [StreamOrder(n_cells, 8, 0, rank, world_size, n_workers, 5, 3) for rank in range(world_size)]
    ranks = [list(order) for order in orders]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(1 <= len(batch) <= 9 for batches in ranks for batch in batches)
    assert sorted(cell for batches in ranks for batch in batches for cell in batch) == list(range(n_cells))


def test_epochs_differ_and_repeat_and_windows_shuffle():
    first, again, other = (stream(600, 0, 2, 1, epoch, block_size=16) for epoch in (0, 0, 1))
    assert first == again != other
    assert len({cell // 16 for cell in first[0]}) > 2
    numbered = StreamOrder(10, 4, numbered=True)
    numbered.set_epoch(3)
    assert {cell // 10 for batch in numbered for cell in batch} == {3}


def test_exact_restart_in_the_middle():
    whole = stream(600, 1, 2, 2, epoch=4)
    assert stream(600, 1, 2, 2, epoch=4, skip=7) == whole[7:]
    with pytest.raises(InputError, match="shared among 4 workers"):
        StreamOrder(3, 8, world_size=4)


def test_damaged_shards_are_named(corpus, tokenizer):
    path = corpus / "cells-00000-00001.arrow"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cells-00000-00001.* bytes.*--verify"):
        open_corpus(corpus, tokenizer)
    path.write_bytes(bytes(len(content)))
    with pytest.raises(InputError, match="cannot be read"):
        BinnedCells(open_corpus(corpus, tokenizer), tokenizer)[[30]]
    path.unlink()
    with pytest.raises(InputError, match="is missing"):
        open_corpus(corpus, tokenizer)
