import csv

import anndata
import numpy as np
import pytest
from typer.testing import CliRunner

from scbert.commands.cli import app
from scbert.inference.annotate_cells import annotate
from scbert.tokenization import InputError

HEADER = "hgnc_id\tsymbol\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id\n"


@pytest.fixture
def ensembl_query(adata, tmp_path):
    """The cells with Ensembl ids for names, and a table that knows them."""
    ids = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    rows = [f"HGNC:{i}\t{symbol}\tApproved\t\t\t{ids[i]}\n" for i, symbol in enumerate(adata.var_names)]
    (tmp_path / "hgnc.txt").write_text(HEADER + "".join(rows))
    adata.var_names = [f"{name}.7" for name in ids]
    adata.write_h5ad(tmp_path / "ensembl.h5ad")
    return tmp_path / "ensembl.h5ad"


def test_a_gene_table_gives_the_answers_of_the_symbols(query, ensembl_query, model_dir, tmp_path):
    expected = annotate(anndata.read_h5ad(query), model_dir, progress=False)
    cells = anndata.read_h5ad(ensembl_query)
    with pytest.raises(InputError, match="--gene-table"):
        annotate(cells, model_dir, progress=False)
    found = annotate(cells, model_dir, gene_table=tmp_path / "hgnc.txt", progress=False)
    np.testing.assert_array_equal(found.obsm["scbert_probabilities"], expected.obsm["scbert_probabilities"])


@pytest.mark.parametrize("verb", ["annotate", "embed"])
def test_report_by_the_command_line(ensembl_query, model_dir, tmp_path, verb):
    report, output = tmp_path / "genes.csv", tmp_path / "out.h5ad"
    command = [verb, str(ensembl_query), "--model", str(model_dir), "--output", str(output)]
    command += ["--gene-table", str(tmp_path / "hgnc.txt"), "--genes-report", str(report)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    with open(report, newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 300 and {row["status"] for row in rows} == {"renamed"}
    assert rows[0]["via"] == "ensembl"
    output.unlink()
    assert CliRunner().invoke(app, command).exit_code != 0
    assert not output.exists()
