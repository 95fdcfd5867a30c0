"""Other names of genes: the table that ships, and the HGNC complete set, downloaded once and kept."""

import csv
import logging
import os
from pathlib import Path

from ..extras import how_to_install
from ..tokenization import GeneTable, InputError
from ..tokenization.genes_scbert import open_text

# the current release; HGNC replaces it in place, so its checksum cannot be known here
HGNC_URL = "https://storage.googleapis.com/public-download-files/hgnc/tsv/tsv/hgnc_complete_set.txt"
HGNC_FILE = "hgnc_complete_set.txt"
# made by scripts/ensembl_table.py
ENSEMBL_IDS = Path(__file__).with_name("ensembl_ids.csv.gz")


def shipped_gene_table():
    """Ensembl ids of the genes of the models that ship, for files that have no symbols, as a `GeneTable`.

    Source: HGNC complete set of 2018-11, and NCBI gene_info of 2019-02 for the ids it lacks.

    Examples
    --------
    >>> shipped_gene_table().resolve("ENSG00000156738.18")
    (('MS4A1',), 'ensembl')
    """
    with open_text(ENSEMBL_IDS) as handle:
        rows = list(csv.DictReader(handle))
    ids = {}
    for row in rows:
        ids.setdefault(row["symbol"], []).append(row["ensembl_id"])
    return GeneTable((symbol, symbol, [], [], names) for symbol, names in ids.items())


def load_gene_table(table):
    """The `GeneTable` of a file, see `GeneTable.from_file`, or of ``"hgnc"``, the HGNC complete set from the cache."""
    return GeneTable.from_file(fetch_hgnc() if str(table) == "hgnc" else table)


def fetch_hgnc():
    """Path of the HGNC complete set, in ``SCBERT_CACHE`` or the user's cache folder; downloaded on the first call.

    The checksum of the first download is kept beside the file, and the file is compared with it at every use, so
    that a damaged or exchanged copy is noticed. Delete the folder to download a newer release.
    """
    try:
        import pooch
    except ImportError:
        raise InputError(
            f"Downloading the gene table needs pooch: {how_to_install('pooch')}. Or give it as a file "
            f"(gene_table=FILE, or --gene-table FILE)."
        ) from None
    folder = Path(os.environ.get("SCBERT_CACHE") or pooch.os_cache("scbert"))
    record = folder / f"{HGNC_FILE}.sha256"
    known = record.read_text(encoding="ascii").strip() if record.is_file() else None
    # a half-finished first download has no record: pooch itself moves a file in only when it is whole
    if (folder / HGNC_FILE).is_file() and known and pooch.file_hash(folder / HGNC_FILE) != known:
        raise InputError(
            f"{folder / HGNC_FILE} does not have the checksum it was downloaded with. Delete {folder} and try again."
        )
    pooch.get_logger().setLevel(logging.WARNING)
    try:
        path = pooch.retrieve(HGNC_URL, known_hash=known, fname=HGNC_FILE, path=folder)
    except ValueError as error:
        raise InputError(f"The download of {HGNC_URL} does not have the checksum {known}.") from error
    # requests' errors are OSErrors
    except OSError as error:
        raise InputError(
            f"The gene table could not be downloaded from {HGNC_URL} ({type(error).__name__}). Without a network, "
            f"download it elsewhere and give the file (gene_table=FILE, or --gene-table FILE)."
        ) from error
    record.write_text(pooch.file_hash(path) + "\n", encoding="ascii")
    return Path(path)
