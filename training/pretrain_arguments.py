"""Settings of a pretraining run; recipes in recipes/pretrain/."""

# HfArg makes a dataclass field, with a text of help
# ruff: noqa: RUF009

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..tokenization import InputError
from .schedules import cosine_restart_rate
from .settings import (
    RECIPES,
    RunDataArguments,
    RunKind,
    RunModelArguments,
    RunTrainingArguments,
    read_json,
)

RESTARTS = {"first_cycle", "cycle_growth", "warmup", "min_rate", "decay"}


@dataclass
class PretrainDataArguments(RunDataArguments):
    """Which cells are learnt from, and how they are masked."""

    corpus: str = HfArg(default=None, help="A corpus of scbert build-corpus, a file, or a folder of files.")
    validation_fraction: float = HfArg(default=0.05, help="Share of the cells not learnt from.")
    mlm_probability: float = HfArg(default=0.15, help="Share of a cell's expressed genes asked for.")
    replace_probability: float = HfArg(default=0.9, help="Probability that a gene asked for is hidden.")
    thinning: float = HfArg(
        default=0.0,
        help="Largest share of a training cell's counts taken away at random, anew at every visit.",
    )
    streaming: bool = HfArg(
        default=False, help="Read neighbouring cells together, in bounded memory: for files too large for it."
    )
    force: bool = HfArg(default=False, help="Take files with few genes of the panel too.")
    min_genes: int | None = HfArg(
        default=None, help="Expressed genes a training cell needs (200, or 0 for small panels)."
    )

    def __post_init__(self):
        self.require("corpus")
        if not 0 < self.validation_fraction < 1:
            raise InputError(
                f"validation_fraction must be above 0 and below 1; found {self.validation_fraction}."
            )
        if not 0 < self.mlm_probability <= 1 or not 0 <= self.replace_probability <= 1:
            raise InputError(
                "mlm_probability and replace_probability must be probabilities, the first above 0."
            )
        if not 0 <= self.thinning < 1:
            raise InputError(f"thinning must be 0 or more and below 1; found {self.thinning}.")


@dataclass
class PretrainModelArguments(RunModelArguments):
    """What the gene table starts from."""

    gene_vectors: str | None = HfArg(
        default=None, help="Gene vectors (gene2vec) for the gene table, by symbol."
    )
    gene_vectors_std: float | None = HfArg(
        default=None,
        help="Standard deviation to bring the gene vectors to (their own if left out). gene2vec's, some "
        "0.2, drowns expression embeddings that start at 0.02.",
    )
    n_cell_axes: int = HfArg(
        default=0,
        help="Number of linear axes of cells, found in the corpus without labels, that the gene table and with "
        'it the cell token start from (0: none). For a new model of pooling "cell".',
    )

    def __post_init__(self):
        super().__post_init__()
        if self.n_cell_axes < 0:
            raise InputError(f"n_cell_axes must be 0 or more; found {self.n_cell_axes}.")
        if self.n_cell_axes and (self.base or self.gene_vectors):
            raise InputError(
                "The gene table has one start: axes of cells (n_cell_axes), gene vectors, or a base. Leave two out."
            )


@dataclass
class PretrainTrainingArguments(RunTrainingArguments):
    """`transformers.TrainingArguments` with the defaults of masked expression modelling, and the restarts."""

    logging_steps: float = 10
    # a process killed while it writes one checkpoint can go back to the other
    save_total_limit: int = 2
    packing: bool = HfArg(
        default=False,
        help="Train on the cells of a batch one after another in a row, in place of padding them.",
    )
    cosine_restarts: dict | str = HfArg(
        default_factory=dict,
        help="JSON: first_cycle, cycle_growth, warmup, min_rate, decay of cosine annealing with warm-up "
        "restarts, in epochs; takes the place of lr_scheduler_type. {} for the latter.",
    )

    def __post_init__(self):
        self.cosine_restarts = read_json(self.cosine_restarts)
        unknown = set(self.cosine_restarts) - RESTARTS
        if unknown:
            raise InputError(f"cosine_restarts has no setting {', '.join(sorted(unknown))}.")
        # cycles that cannot be are refused before any cell is read
        cosine_restart_rate(0, **self.cosine_restarts)
        super().__post_init__()


PRETRAIN = RunKind(
    name="pretrain",
    argument_types=(PretrainDataArguments, PretrainModelArguments, PretrainTrainingArguments),
    recipes=RECIPES / "pretrain",
    # without a base: a size that a CPU trains; with one, how the paper trains its own
    default_recipe="small",
    default_with_base="scbert",
)
