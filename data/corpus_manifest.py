"""The description of a corpus: corpus.json, its genes, its shards and their checksums."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from ..tokenization import InputError
from ..tokenization.genes_scbert import read_panel_rows

MANIFEST = "corpus.json"
GENES = "genes.txt"
FORMAT = 1


def is_corpus(path):
    """Whether a folder was made by `scbert build-corpus`."""
    return (Path(path) / MANIFEST).is_file()


def read_manifest(folder):
    """The manifest of a corpus, with its genes.

    It holds ``sources`` (per file: report and shards), ``cells``, ``genes`` (names in the order of the gene ids),
    ``modalities``, and what it was built with.
    """
    folder = Path(folder)
    if not is_corpus(folder):
        raise InputError(
            f"{folder} is not a corpus: there is no {MANIFEST} in it. Build one (build_corpus, or scbert build-corpus)."
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{folder / MANIFEST} is damaged ({error}). Build the corpus again.") from error
    if version != FORMAT:
        raise InputError(f"{folder} is a corpus of format {version}; this version reads format {FORMAT}.")
    rows = read_panel_rows(folder / GENES)
    manifest["genes"] = [row[0] for row in rows]
    manifest["modalities"] = [int(row[1]) if len(row) > 1 else 0 for row in rows]
    return manifest


def shards_of(manifest):
    """All shards of a manifest in order, each with the facts of its source."""
    return [shard for source in manifest["sources"] for shard in shards_of_source(source)]


def shards_of_source(source):
    """The shards of one file, each with the facts of that file."""
    facts = {"kind": source["kind"], "covers_all_genes": source["whole"], "source": source["path"]}
    return [{**shard, **facts} for shard in source["shards"]]


def verify_corpus(folder):
    """Read every shard and compare it with its checksum: ``corpus``, ``shards``, ``cells`` and ``bytes``.

    Every file that is missing or differs is named in one `InputError`.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    shards = shards_of(manifest)
    expected = {shard["file"]: shard["sha256"] for shard in shards} | {GENES: manifest["genes_sha256"]}
    bad = []
    for name, wanted in expected.items():
        path = folder / name
        if not path.is_file():
            bad.append(f"{name} is missing")
        elif checksum(path) != wanted:
            bad.append(f"{name} differs from its checksum")
    if bad:
        raise InputError(
            f"{len(bad)} of {len(expected)} file(s) of {folder} are not as they were built: "
            f"{'; '.join(bad[:10])}. Restore an intact copy, or build the corpus again."
        )
    size = sum(shard["bytes"] for shard in shards)
    return {"corpus": str(folder), "shards": len(shards), "cells": manifest["cells"], "bytes": size}


def checksum(path):
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
