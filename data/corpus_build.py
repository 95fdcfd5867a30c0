"""Many files of cells to one corpus for pretraining: the job behind ``scbert build-corpus``.

A corpus is a folder of Arrow shards that `datasets.load_from_disk` opens too. A cell is its non-zero values and
their gene ids (positions in ``genes.txt``), just as its file holds them, and its columns of `obs`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial

import numpy as np
import pandas as pd
from datasets import DatasetInfo, Features
from tqdm import tqdm

from ..tokenization import InputError
from ..tokenization.expression_scbert import INPUT_KINDS
from ..tokenization.genes_scbert import write_gene_panel
from .corpus_manifest import FORMAT, GENES, MANIFEST, checksum, verify_corpus
from .corpus_shards import corpus_schema, scan_file, write_file
from .corpus_sources import find_sources
from .paths import PARTIAL, keep_record, partial_folder, stamp_of
from .quality_control import QualityRules
from .read import opened_cells
from .worker_processes import end_with_parent

logger = logging.getLogger(__name__)

SETTINGS = "build.json"
SCANS = "scans"


def build_corpus(
    sources,
    output=None,
    *,
    layer=None,
    input="auto",
    min_genes=200,
    min_cells=1,
    max_mito_fraction=None,
    doublet_key=None,
    keep_duplicates=False,
    columns=None,
    shard_cells=16_384,
    num_proc=1,
    strict=False,
    verify=False,
    resume=False,
    overwrite=False,
):
    """Build a corpus from files of cells, folders of them and manifests (see `find_sources`), or verify one.

    Every file is read twice, in chunks: once to check its cells and apply the quality rules, once to write them. Of
    cells with the same genes and values, in one file or in several, the first one stays, or all with `keep_duplicates`.

    The corpus is built in ``OUTPUT.partial``; `resume` continues an interrupted build, `overwrite` replaces an existing
    corpus. `layer` is where the values are, `input` what they are: ``"auto"``, ``"counts"`` or ``"log1p"``. The limits
    are those of `QualityRules`. All `columns` of `obs` are kept unless some are named. A shard, the unit of restarts,
    holds `shard_cells` cells; `num_proc` worker processes take a file each. A file that cannot be used is reported and
    left out, or ends the build if `strict`. With `verify` the one source is a corpus, compared with its checksums.

    The summary counts cells, genes, files, ``files_skipped`` (``skipped_files`` says which), duplicates and seconds; by
    file they stand in ``corpus.json`` and ``report.csv``.
    """
    if verify:
        if len(sources) != 1 or output is not None:
            raise InputError("To verify a corpus, give it as the only source, and no output.")
        return verify_corpus(sources[0])
    if output is None:
        raise InputError(
            "Name the corpus to write (output=, or --output), or check an existing one (verify=True, or --verify)."
        )
    if input not in INPUT_KINDS:
        raise InputError(f"input must be one of {', '.join(INPUT_KINDS)}; found {input!r}.")
    started = time.monotonic()
    found = find_sources(sources, layer)
    _check_columns(found, [*(columns or ()), *([doublet_key] if doublet_key else [])])
    rules = QualityRules(min_genes, min_cells, max_mito_fraction, doublet_key)
    settings = {
        "sources": [
            [str(source.path), source.layer, source.columns, stamp_of(source.path)] for source in found
        ],
        "input": input,
        "rules": asdict(rules),
        "keep_duplicates": keep_duplicates,
        "columns": list(columns) if columns else None,
        "shard_cells": shard_cells,
    }
    with partial_folder(output, overwrite, resume, marker=MANIFEST) as folder:
        keep_record(folder / SETTINGS, settings)
        (folder / SCANS).mkdir(exist_ok=True)
        reports = _scan_all(found, folder, input, rules, num_proc, strict)
        usable = [report for report in reports if report["scan"] is not None]
        if not usable:
            raise InputError(f"None of {len(found)} file(s) can be used: {reports[0]['problem']}")
        _mark_duplicates(usable, keep_duplicates)
        genes = _write_genes(folder, usable)
        _write_all(usable, folder, genes, columns or None, shard_cells, num_proc)
        summary = _finish(folder, reports, settings, genes)
    return {"corpus": str(output), **summary, "seconds": time.monotonic() - started}


def _check_columns(sources, columns):
    """Refuse columns that neither obs of a file nor a manifest has, before hours of scanning."""
    absent, opened = set(columns).difference(["dataset"], *(source.columns for source in sources)), False
    for source in sources:
        # what is wrong with a file is told when it is scanned
        with contextlib.suppress(InputError):
            if absent:
                with opened_cells(source.path, layer=source.layer, check=False) as adata:
                    absent, opened = absent.difference(adata.obs.columns), True
    if absent and opened:
        raise InputError(
            f"No file has a column {', '.join(sorted(absent))} in obs. Check the spelling (columns, --column; "
            "doublet_key, --doublet-key)."
        )


def _results(function, jobs, title, num_proc, strict):
    """Results of the calls with `jobs`, in order and in one process or several; unless strict, errors among them."""
    with tqdm(total=len(jobs), desc=title, unit=" files", disable=None) as bar:

        def finished(result):
            try:
                return result()
            except InputError as problem:
                if strict:
                    raise
                return problem
            finally:
                bar.update()

        if min(num_proc, len(jobs)) == 1:
            return [finished(partial(function, *job)) for job in jobs]
        # spawned, not forked: arrow and hdf5 have threads of their own
        pool = ProcessPoolExecutor(
            min(num_proc, len(jobs)), multiprocessing.get_context("spawn"), initializer=end_with_parent
        )
        try:
            futures = [pool.submit(function, *job) for job in jobs]
            return [finished(future.result) for future in futures]
        except BrokenProcessPool:
            raise InputError(
                "A worker process was killed, perhaps because memory ran out. Continue with fewer processes "
                "(num_proc=1, resume=True; or --num-proc 1 --resume): what is finished is kept."
            ) from None
        except BaseException:
            for process in list(pool._processes.values()):
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _scan_all(sources, folder, input, rules, num_proc, strict):
    jobs = [(source, input, rules, folder / SCANS / f"{i:05d}.npz") for i, source in enumerate(sources)]
    reports = []
    for source, scan in zip(sources, _results(scan_file, jobs, "reading", num_proc, strict)):
        problem = str(scan) if isinstance(scan, InputError) else None
        if problem:
            logger.warning("%s is left out: %s", source.path, problem)
        reports.append({"source": source, "problem": problem, "scan": None if problem else scan})
    return reports


def _mark_duplicates(reports, keep_duplicates):
    """Rows of every file to be written: what the rules keep, less the cells that were seen before."""
    rows = [np.flatnonzero(report["scan"].keep) for report in reports]
    hashes = np.concatenate([report["scan"].hashes[kept] for report, kept in zip(reports, rows)])
    fresh = ~pd.Series(hashes).duplicated().to_numpy()
    parts = np.split(fresh, np.cumsum([len(kept) for kept in rows])[:-1])
    for report, kept, is_fresh in zip(reports, rows, parts):
        report["duplicates"] = int((~is_fresh).sum())
        report["rows"] = kept if keep_duplicates else kept[is_fresh]
        if report["duplicates"]:
            what = "are kept" if keep_duplicates else "are left out"
            logger.warning("%s: %d duplicate cell(s) %s.", report["source"].path, report["duplicates"], what)


def _write_genes(folder, reports):
    """All genes of all files, in order of appearance; each has one modality."""
    modality = {}
    for report in reports:
        facts = report["scan"].facts
        for gene, kind in zip(facts["genes"], facts["modalities"]):
            modality.setdefault(gene, kind)
    builds = {report["scan"].facts["genome_build"] for report in reports} - {None}
    if len(builds) > 1:
        raise InputError(
            f"The files use different genome builds ({', '.join(sorted(builds))}). Lift all peaks over to one of them."
        )
    if not modality:
        raise InputError("No gene is expressed in enough cells of any file; lower min_cells (--min-cells).")
    write_gene_panel(
        folder / GENES, list(modality), list(modality.values()) if any(modality.values()) else None
    )
    return list(modality)


def _write_all(reports, folder, genes, columns, shard_cells, num_proc):
    schema = corpus_schema(
        [report["scan"] for report in reports], [report["source"] for report in reports], columns
    )
    jobs = [
        (report["source"], report["rows"], report["scan"].facts, genes, schema, folder, number, shard_cells)
        for number, report in enumerate(reports)
    ]
    # strict, for all could be read a moment ago: better to stop than to leave out what duplicates were judged by
    for report, shards in zip(reports, _results(write_file, jobs, "writing", num_proc, strict=True)):
        report["shards"] = shards
    info = DatasetInfo(features=Features.from_arrow_schema(schema))
    info.write_to_directory(str(folder))


def _finish(folder, reports, settings, genes):
    """Write the manifest and what `datasets` wants to see; take away what only the build needed."""
    sources = [_facts(report) for report in reports]
    shards = [shard for source in sources for shard in source["shards"]]
    cells = sum(source["kept"] for source in sources)
    if not cells:
        raise InputError(
            "No cell passes the quality rules, so there is nothing to write. Relax them (min_genes, --min-genes, and "
            "the others)."
        )
    manifest = {
        "format": FORMAT,
        "cells": cells,
        "genes_sha256": checksum(folder / GENES),
        "genome_build": next((source["genome_build"] for source in sources if source["genome_build"]), None),
        "settings": settings,
        "sources": sources,
    }
    state = {
        "_data_files": [{"filename": shard["file"]} for shard in shards],
        "_fingerprint": "0",
        "_split": None,
    }
    state |= {"_format_columns": None, "_format_type": None}
    state |= {"_format_kwargs": {}, "_output_all_columns": False}
    (folder / "state.json").write_text(json.dumps(state))
    report = pd.DataFrame(sources).drop(columns=["shards", "whole", "columns"])
    report.to_csv(folder / "report.csv", index=False)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    # with what processes left that were killed while they wrote
    for path in [*folder.glob("cells-*.json"), *folder.glob(f".*{PARTIAL}"), folder / SETTINGS]:
        path.unlink()
    shutil.rmtree(folder / SCANS)
    skipped = [source["path"] for source in sources if source["problem"] is not None]
    return {
        "cells": cells,
        "genes": len(genes),
        "values": sum(shard["values"] for shard in shards),
        "files": len(sources),
        "files_skipped": len(skipped),
        "skipped_files": skipped,
        "duplicates": sum(source["duplicates"] for source in sources),
        "shards": len(shards),
    }


def _facts(report):
    """What corpus.json says of one file."""
    source, scan = report["source"], report["scan"]
    facts = {"path": str(source.path), "layer": source.layer, "columns": source.columns}
    facts["problem"] = report["problem"]
    # under its name in the file -> of a `Scan`
    names = {"kind": "kind", "whole": "covers_all_genes", "genome_build": "genome_build", "cells": "cells"}
    if scan is None:
        return {**facts, **dict.fromkeys(names), "duplicates": 0, "kept": 0, "shards": []}
    rules = {name: scan.facts["rules"][name] for name in ("few_genes", "mitochondrial", "doublets")}
    found = {name: scan.facts[fact] for name, fact in names.items()}
    return {
        **facts, **found, **rules,
        "duplicates": report["duplicates"], "kept": len(report["rows"]), "shards": report["shards"],
    }  # fmt: skip
