"""Genomic regions: coordinates read and checked, genome builds told apart, peaks mapped to other regions by overlap."""

import re

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ..extras import require
from ..tokenization import InputError

# chrom:start-end, or with - or _ throughout
REGION = re.compile(r"^(?P<chrom>[\w.]+?)[:\-_](?P<start>\d+)[\-_](?P<end>\d+)\Z")
# UCSC's name of each build, and the names it goes by
BUILDS = {
    "hg38": ("grch38", "hg38"),
    "hg19": ("grch37", "hg19"),
    "hs1": ("t2t-chm13", "chm13", "hs1"),
    "mm10": ("grcm38", "mm10"),
    "mm39": ("grcm39", "mm39"),
    "mm9": ("mgscv37", "mm9"),
}


def genome_build(name):
    """UCSC's name of a genome build, given any of its names, with or without a release.

    The name comes back unchanged if the build is not known here.

    Examples
    --------
    >>> genome_build("GRCh38-2020-A")
    'hg38'
    """
    if not name:
        return None
    spelt = str(name).lower().replace("_", "-")
    known = (build for build, prefixes in BUILDS.items() if spelt.startswith(prefixes))
    return next(known, str(name))


def parse_regions(names, genome=None):
    """Coordinates of regions named chrom:start-end (or chrom-start-end, chrom_start_end).

    In the order given: ``chrom`` (with "chr" in front of 1-22, X, Y and the like), ``start``, ``end``. What is no
    region, ends before it starts, or starts beyond the end of its chromosome in the build `genome`, where that is
    known, is refused.

    Examples
    --------
    >>> parse_regions(["chr1:100-200", "X-5-9"])
      chrom  start  end
    0  chr1    100  200
    1  chrX      5    9
    """
    names = pd.Series([str(name) for name in names], dtype=object)
    table = names.str.extract(REGION)
    _refuse(
        names,
        table["chrom"].isna(),
        "are not named by their region: chrom:start-end or chrom-start-end is needed, such as chr1:9963-10665",
    )
    table = table.astype({"start": np.int64, "end": np.int64})
    table["chrom"] = table["chrom"].map(_chromosome)
    _refuse(names, table["start"] >= table["end"], "end before they start")
    build, known = genome_build(genome), {}
    if build in BUILDS:
        # of the tables that come with bioframe
        known = require("bioframe").assembly_info(build).chromsizes.to_dict()
    lengths = table["chrom"].map(known)
    # callers let peaks run past the end by a few bases; a peak that starts there belongs to another build
    _refuse(
        names,
        table["start"] >= lengths,
        f"lie beyond the end of their chromosome in {genome}: say the genome build the peaks were called on",
    )
    return table


def _chromosome(name):
    """1 and chr1 are one; MT is chrM; scaffolds keep their names."""
    bare = name.removeprefix("chr")
    if bare == "MT":
        return "chrM"
    return f"chr{bare}" if re.fullmatch(r"\d{1,2}|[XYMWZ]", bare) else name


def _refuse(names, faulty, what):
    if faulty.any():
        first = ", ".join(names[faulty][:3])
        raise InputError(f"{int(faulty.sum())} of {len(faulty)} peaks (first: {first}) {what}.")


def map_regions(peaks, regions):
    """The region that each peak overlaps most, as CSR [peaks, regions]: a 1 in its column, or an empty row.

    Both are tables of `parse_regions`, of one genome build. If several regions overlap equally, the first of the panel
    is taken; no peak is counted twice.
    """
    shape = (len(peaks), len(regions))
    if not len(peaks) or not len(regions):
        return sp.csr_matrix(shape, dtype=np.float32)
    pairs = require("bioframe").overlap(
        peaks, regions, how="inner", return_index=True, return_input=False, return_overlap=True
    )
    pairs = pairs.astype(np.int64).rename(columns={"index": "peak", "index_": "region"})
    pairs["length"] = pairs["overlap_end"] - pairs["overlap_start"]
    # regions that only touch end to end share no base
    pairs = pairs[pairs["length"] > 0].sort_values(
        ["peak", "length", "region"], ascending=[True, False, True]
    )
    best = pairs.drop_duplicates("peak")
    ones = np.ones(len(best), dtype=np.float32)
    return sp.csr_matrix((ones, (best["peak"], best["region"])), shape=shape)
