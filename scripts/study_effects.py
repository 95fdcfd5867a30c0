"""
What studies of the same types differ in, for a pretrained model's folder: the directions that the recipe damps.

    python scripts/study_effects.py CELLS    # of scbert-mini, with a part of its card
    python scripts/study_effects.py CELLS --model DIR/pretrained --without report    # for evidence.py --half report

CELLS is the folder of the .h5ad files. Studies and common names of types are those of both annotators; of each type
with enough cells in a study, the mean of log1p CP10k.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from annotator_parts import LABEL
from blood_cells import BY_MARKERS, COHORTS, read_by_markers, read_cohort
from evidence_studies import NOT_IN_EFFECTS
from make_mini import CARDS, write_card, write_checksums
from scbert.data.read import log_normalize
from scbert.trained_model.model_folder import load_tokenizer
from scbert.training.initial_model import EFFECTS
from scbert.training.principal_axes import mean_squared_norm
from tissue_cells import LEARNT, read_study

# directions that are kept, and cells of a type in a study that have a mean worth comparing
DIRECTIONS, FEWEST_CELLS = 20, 20
BLOOD = dict.fromkeys(COHORTS, read_cohort) | dict.fromkeys(BY_MARKERS, read_by_markers)


def means_of(cells: anndata.AnnData, panel: list[str]) -> pd.DataFrame:
    """Mean of each type of enough cells [types, panel], in units of the cells' scatter, NaN for unmeasured genes."""
    values, genes = log_normalize(cells)
    means = {
        name: np.asarray(values[of_type].mean(axis=0)).ravel()
        for name, of_type in cells.obs.groupby(LABEL, observed=True).indices.items()
        if len(of_type) >= FEWEST_CELLS
    }
    table = pd.DataFrame(means, index=pd.Index(genes)).T / mean_squared_norm(values) ** 0.5
    return table.reindex(columns=panel)


def means_of_studies(folder: Path, panel: list[str], left_out: Sequence[str] = ()) -> pd.DataFrame:
    """`means_of` every study of blood and of tissue, [study and type, panel], under both annotators' names of types."""
    readers = {"blood": BLOOD, "tissue": dict.fromkeys(LEARNT, read_study)}
    found = {}
    for names, of_names in readers.items():
        for study in sorted(of_names.keys() - set(left_out)):
            means = means_of(of_names[study](folder, study), panel)
            print(study, *means.index, sep=", ", file=sys.stderr)
            found |= {(study, f"{names}: {name}"): row for name, row in means.iterrows()}
    return pd.DataFrame(found).T.rename_axis(["study", "type"])


def write_effects(means: pd.DataFrame, model: Path) -> int:
    """Put the directions in which studies differ into a model's folder, and tell how many they are."""
    types, partial = means.index.get_level_values("type"), model / f"{EFFECTS}.partial"
    effects = batch_effects(means.to_numpy(), types)
    save_file({"effects": torch.from_numpy(effects).bfloat16().contiguous()}, partial)
    os.replace(partial, model / EFFECTS)
    return len(effects)


def model_without(studies: Sequence[str], cells: Path, work: Path) -> Path:
    """
    scbert-mini as it would be if it knew nothing of what these studies differ in; it is made in the work folder.

    Its axes may have been found in their cells: this is for references so large that no axes are used.
    """
    model = work / "_".join(["mini_without", *studies])
    if not model.exists():
        table, shipped = work / "study_means.parquet", CARDS / "scbert-mini"
        if not table.exists():
            means_of_studies(cells, load_tokenizer(shipped).gene_panel).to_parquet(table)
        partial = shutil.copytree(shipped, work / "mini.partial", dirs_exist_ok=True)
        write_effects(
            pd.read_parquet(table).drop(index=list(studies), level="study", errors="ignore"), partial
        )
        partial.rename(model)
    return model


def batch_effects(means: np.ndarray, types: Sequence[str]) -> np.ndarray:
    """
    Directions in which the means of a type differ between batches, with their scatter as length, [n, genes].

    Parameters
    ----------
    means
        Of a type in a batch each, [means, genes]; NaN for genes that a batch has not measured.
    types
        Of each.

    Examples
    --------
    >>> means = np.array([[1.0, 5.0], [3.0, 5.0], [7.0, 2.0]])
    >>> np.abs(batch_effects(means, ["B cell", "B cell", "T cell"])).round(3).tolist()
    [[1.414, 0.0]]
    """
    groups = pd.DataFrame(means).groupby(np.asarray(types))
    sizes = groups[0].transform("size").to_numpy()
    seen = sizes > 1
    if not seen.any():
        return np.zeros((0, means.shape[1]))
    differences = (means - groups.transform("mean").to_numpy())[seen]
    # a mean of n lies closer to each of them than the true one
    differences *= (sizes / (sizes - 1).clip(1))[seen, None] ** 0.5 / seen.sum() ** 0.5
    _, lengths, directions = np.linalg.svd(np.nan_to_num(differences), full_matrices=False)
    kept = lengths[:DIRECTIONS] > 1e-6 * lengths[0]
    return (lengths[:DIRECTIONS, None] * directions[:DIRECTIONS])[kept]


def section(n_directions: int) -> str:
    """A part of the card."""
    blood, tissue = ", ".join(BLOOD), ", ".join(LEARNT)
    return "\n".join([
        "## What studies differ in",
        "",
        f"`{EFFECTS}` holds {n_directions} directions in which the mean expression of a cell type differs between "
        "studies, each as long as its scatter, in units of the scatter of cells. `scbert finetune` damps them, so that "
        "a model does not lean on what is a study's own. For these, unlike the gene table, labels were used: of blood "
        f"({blood}) and of tissue ({tissue}), by the common names of types that the annotators have for them (their "
        f"`labels.csv` and `markers.csv`); types with {FEWEST_CELLS} cells or more in a study "
        "(`python scripts/study_effects.py`).",
        "",
    ])  # fmt: skip


def main() -> None:
    """Write the file into the model's folder; of a released one, its card and checksums too."""
    parser = argparse.ArgumentParser(prog="study_effects", description=__doc__.strip().partition("\n")[0])
    parser.add_argument("cells", type=Path)
    parser.add_argument("--model", type=Path, default=CARDS / "scbert-mini")
    parser.add_argument(
        "--without", choices=NOT_IN_EFFECTS, help="Half of the evidence's studies to leave out."
    )
    options = parser.parse_args()
    panel = load_tokenizer(options.model).gene_panel
    means = means_of_studies(options.cells, panel, NOT_IN_EFFECTS.get(options.without, ()))
    n_directions = write_effects(means, options.model)
    if options.model.parent == CARDS:
        (options.model / "card_4_effects.md").write_text(section(n_directions))
        write_checksums(options.model)
        write_card(options.model)


if __name__ == "__main__":
    main()
