"""Paired modalities to one AnnData, coordinates and builds checked, peaks mapped by overlap, then tokenized."""

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scbert.data.modalities import combine_modalities, map_peaks, modalities_of
from scbert.data.multiomics import read_multiomics
from scbert.data.regions import genome_build, map_regions, parse_regions
from scbert.tokenization import InputError, ScBertTokenizer
from scbert.tokenization.cells_scbert import feature_modalities

pytest.importorskip("bioframe")

PEAK_NAMES = ["chr1:1000-1500", "chr1:2000-2600", "chr2:100-300", "chrX:5000-5400"]


def make_rna(n=6, seed=0, names=("CD3E", "MS4A1", "NKG7")):
    counts = np.random.default_rng(seed).poisson(2.0, size=(n, len(names))).astype(np.float32)
    obs = pd.DataFrame({"cell_type": ["a", "b"] * (n // 2)}, index=[f"cell{i}" for i in range(n)])
    return anndata.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=list(names)))


def make_atac(cells, names=PEAK_NAMES, seed=1):
    values = (np.random.default_rng(seed).random((len(cells), len(names))) < 0.5).astype(np.float32)
    obs = pd.DataFrame({"fragments": range(len(cells))}, index=list(cells))
    return anndata.AnnData(sp.csc_matrix(values), obs=obs, var=pd.DataFrame(index=list(names)))


@pytest.fixture
def pair():
    rna = make_rna()
    return rna, make_atac(rna.obs_names[::-1])


def test_cells_are_paired_by_name(pair, tmp_path):
    rna, atac = pair
    rna.write_h5ad(tmp_path / "rna.h5ad"), atac[:5].copy().write_h5ad(tmp_path / "atac.h5ad")
    both = read_multiomics(tmp_path / "rna.h5ad", tmp_path / "atac.h5ad", genome="GRCh38")
    assert list(both.obs_names) == [f"cell{i}" for i in range(1, 6)]
    assert list(both.obs.columns) == ["cell_type", "fragments"]
    assert both.uns["genome_build"] == "hg38"
    assert both.var["feature_types"].tolist() == ["Gene Expression"] * 3 + ["Peaks"] * 4
    np.testing.assert_array_equal(both[:, :3].X.toarray(), rna[both.obs_names].X.toarray())
    np.testing.assert_array_equal(both[:, 3:].X.toarray(), atac[both.obs_names].X.toarray())


def test_cells_that_cannot_be_paired_are_refused(pair):
    rna, atac = pair
    atac.obs_names = [f"other{i}" for i in range(6)]
    with pytest.raises(InputError, match=r"no cell name in common.*cell0.*other0"):
        combine_modalities({"Gene Expression": rna, "Peaks": atac})
    rna.obs_names = ["same"] * 6
    with pytest.raises(InputError, match="not unique"):
        combine_modalities({"Gene Expression": rna, "Peaks": atac})


def test_mudata(pair, tmp_path):
    mudata = pytest.importorskip("mudata")
    rna, atac = pair
    mdata = mudata.MuData({"rna": rna, "atac": atac})
    mdata.obs["clone"], mdata.obs["cell_type"], mdata.obs["rna:cell_type"] = list("ABCDEF"), "of both", "old"
    mdata.write(tmp_path / "cells.h5mu")
    both = read_multiomics(tmp_path / "cells.h5mu", genome="hg38")
    assert both.shape == (6, 7)
    assert both.obs["clone"].to_dict() == mdata.obs["clone"].to_dict()
    assert list(both.obs["cell_type"]) == list(rna.obs["cell_type"]) and "rna:cell_type" not in both.obs
    assert set(modalities_of(mdata)) == {"Gene Expression", "Peaks"}
    with pytest.raises(InputError, match="spliced"):
        modalities_of(mudata.MuData({"spliced": rna}))


def write_10x_multiome(path, rna, atac):
    """A Cell Ranger ARC file: features x cells, genes and peaks."""
    matrix = sp.hstack([rna.X, atac[rna.obs_names].X], format="csr").astype(np.int32)
    features = {
        "id": [f"ENSG{i:011d}" for i in range(rna.n_vars)] + list(atac.var_names),
        "name": [*rna.var_names, *atac.var_names],
        "feature_type": ["Gene Expression"] * rna.n_vars + ["Peaks"] * atac.n_vars,
        "genome": ["GRCh38"] * (rna.n_vars + atac.n_vars),
    }
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(matrix, name)
        group["shape"] = matrix.shape[::-1]
        group["barcodes"] = [name.encode() for name in rna.obs_names]
        for name, values in features.items():
            group[f"features/{name}"] = [value.encode() for value in values]


def test_10x_multiome_file(pair, tmp_path):
    rna, atac = pair
    write_10x_multiome(tmp_path / "multiome.h5", rna, atac)
    both = read_multiomics(tmp_path / "multiome.h5")
    assert both.shape == (6, 7) and both.uns["genome_build"] == "hg38"
    np.testing.assert_array_equal(both[:, :3].X.toarray(), rna.X.toarray())


def test_a_file_of_one_modality_says_what_is_missing(pair, tmp_path):
    pair[0].write_h5ad(tmp_path / "rna.h5ad")
    with pytest.raises(InputError, match="feature_types"):
        read_multiomics(tmp_path / "rna.h5ad")
    strange = pair[0].copy()
    strange.var["feature_types"] = "Spots"
    strange.write_h5ad(tmp_path / "strange.h5ad")
    with pytest.raises(InputError, match="holds Spots"):
        read_multiomics(tmp_path / "strange.h5ad")


@pytest.mark.parametrize(
    "name, build",
    [("GRCh38", "hg38"), ("GRCh38-2020-A", "hg38"), ("hg19", "hg19"), ("mine", "mine"), (None, None)],
)
def test_build_names(name, build):
    assert genome_build(name) == build


def test_regions_in_every_spelling():
    table = parse_regions(["chr1:5-9", "1-5-9", "chr1_5_9", "X:1-2", "MT:1-2", "GL000194.1:5-9"])
    assert table["chrom"].tolist() == ["chr1"] * 3 + ["chrX", "chrM", "GL000194.1"]
    assert table["start"].tolist() == [5, 5, 5, 1, 1, 5]


@pytest.mark.parametrize(
    "name, message",
    [("CD3E", "not named by their region"), ("chr1:9-5", "end before they start"), ("chr1:5", "not named")],
)
def test_bad_coordinates_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        parse_regions(["chr1:1-2", name])


def test_peaks_beyond_a_chromosome_tell_a_wrong_build():
    # chr1 ends at 249,250,621 in hg19 and at 248,956,422 in hg38
    names = ["chr1:249000000-249000500"]
    assert len(parse_regions(names, "hg19")) == 1
    with pytest.raises(InputError, match="hg38"):
        parse_regions(names, "hg38")


def test_a_peak_goes_to_the_region_it_overlaps_most():
    regions = parse_regions(["chr1:0-100", "chr1:100-300", "chr2:0-50"])
    peaks = parse_regions(["chr1:90-150", "chr1:50-150", "chr1:300-400", "chr2:10-20", "chr3:1-5"])
    found = map_regions(peaks, regions).toarray().tolist()
    assert found == [[0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1], [0, 0, 0]]


def test_overlap_equals_a_plain_search():
    rng = np.random.default_rng(0)

    def draw(n):
        starts, widths = rng.integers(0, 2000, n), rng.integers(1, 90, n)
        return [f"chr{c}:{s}-{s + w}" for c, s, w in zip(rng.integers(1, 4, n), starts, widths)]

    peaks, regions = parse_regions(draw(200)), parse_regions(draw(60))
    found = map_regions(peaks, regions).toarray()
    for i, peak in peaks.iterrows():
        shared = np.minimum(peak["end"], regions["end"]) - np.maximum(peak["start"], regions["start"])
        shared = np.where(regions["chrom"] == peak["chrom"], shared, 0)
        expected = np.zeros(60)
        if shared.max() > 0:
            expected[shared.argmax()] = 1
        np.testing.assert_array_equal(found[i], expected)


def test_panel_of_both_and_its_tokenizer(pair, tmp_path):
    both = combine_modalities({"Gene Expression": pair[0], "Peaks": pair[1]}, "hg38")
    modalities = feature_modalities(both.var).tolist()
    assert modalities == [0] * 3 + [1] * 4 and feature_modalities(pair[0].var) is None
    tokenizer = ScBertTokenizer(
        gene_panel=list(both.var_names), feature_modalities=modalities,
        genome_build=both.uns["genome_build"], keep_zeros=False, binning="quantile", n_bins=51,
    )  # fmt: skip
    batch = tokenizer(both)
    expected = np.append(modalities, 0)[batch["gene_ids"]]
    np.testing.assert_array_equal(batch["modality_ids"], expected)
    tokenizer.save_pretrained(tmp_path)
    again = ScBertTokenizer.from_pretrained(tmp_path)
    assert again.init_kwargs["genome_build"] == "hg38"
    assert again.feature_modalities.tolist() == modalities


def test_other_peaks_are_summed_into_the_panel(pair):
    both = combine_modalities({"Gene Expression": pair[0], "Peaks": pair[1]}, "hg38")
    panel = ["CD3E", "chr1:900-2700", "chrX:5300-6000", "chr7:1-5"]
    mapped = map_peaks(both, panel, [0, 1, 1, 1], "GRCh38")
    assert list(mapped.var_names) == ["CD3E", "MS4A1", "NKG7", *panel[1:]]
    peaks = both[:, PEAK_NAMES].X.toarray()
    np.testing.assert_array_equal(mapped[:, "chr1:900-2700"].X.toarray()[:, 0], peaks[:, :2].sum(1))
    np.testing.assert_array_equal(mapped[:, "chrX:5300-6000"].X.toarray()[:, 0], peaks[:, 3])
    assert mapped[:, "chr7:1-5"].X.nnz == 0
    assert mapped.uns["peak_mapping"] == {"peaks": 4, "mapped": 3, "regions": 3, "regions_found": 2}


def test_other_builds_and_strangers_are_refused(pair):
    both = combine_modalities({"Gene Expression": pair[0], "Peaks": pair[1]}, "hg38")
    with pytest.raises(InputError, match=r"hg38.*mm10"):
        map_peaks(both, ["chr1:1-2"], [1], "mm10")
    with pytest.raises(InputError, match="No peak overlaps"):
        map_peaks(both, ["chr9:1-2"], [1], "hg38")
