"""Settings of a fine-tuning run; recipes in recipes/."""

# HfArg makes a dataclass field, with a text of help
# ruff: noqa: RUF009

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..tokenization import InputError
from .settings import RECIPES, RunDataArguments, RunKind, RunModelArguments, RunTrainingArguments

CHOICES = {
    "class_balance": ("none", "weights", "oversample"),
    "cache_frozen": ("auto", "memory", "disk", "off"),
}


@dataclass
class FinetuneDataArguments(RunDataArguments):
    """Which labelled cells are learnt, and which test."""

    reference: str = HfArg(default=None, help="Labelled cells: .h5ad, .h5mu, .zarr, 10x .h5 or folder.")
    label_key: str = HfArg(default=None, help="Column of obs that holds the cell types.")
    test: str | None = HfArg(default=None, help="Labelled cells to test on, in a file of their own.")
    test_key: str | None = HfArg(
        default=None, help="Column of obs that says train, validation or test for each cell."
    )
    test_fraction: float = HfArg(
        default=0.2, help="Share of the labelled cells to test on, and not to learn from."
    )
    validation_fraction: float = HfArg(
        default=0.1, help="Share of the labelled cells that choose the best epoch."
    )
    unlabelled: list[str] | None = HfArg(
        default=None, help="Files of cells without labels, such as those to annotate, to learn from as well."
    )
    top_genes: int | None = HfArg(
        default=None,
        help="Without a base or a panel file: only the N most variable genes of the cells learnt (0: all).",
    )
    ontology: str | None = HfArg(
        default=None,
        help="Table of the labels' Cell Ontology terms, of map-labels: .csv with label, term_id.",
    )
    label_tree: str | None = HfArg(
        default=None, help="Table of the types above the labels, to back off to: .csv with label, parent."
    )
    coarse_key: str | None = HfArg(default=None, help="Column of obs with coarser types, to back off to.")
    min_genes: int = HfArg(
        default=0, help="Expressed genes a training cell needs; a class without such cells keeps all it has."
    )

    def __post_init__(self):
        self.require("reference", "label_key")
        if self.test and self.test_key:
            raise InputError("Test cells come from a file (test) or by a column (test_key), not from both.")
        if self.label_tree and self.coarse_key:
            raise InputError(
                "Types to back off to come from a table (label_tree) or a column (coarse_key), not both."
            )
        for name in ("test_fraction", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be from 0 to below 1; found {getattr(self, name)}.")
        if self.test_fraction + self.validation_fraction >= 1:
            raise InputError("test_fraction and validation_fraction leave no cells to train on.")


@dataclass
class FinetuneModelArguments(RunModelArguments):
    """What of a base is trained."""

    train_all: bool | None = HfArg(
        default=None,
        help="Train every weight. Default: yes from random weights; with a base only the final norm, "
        "the block before the last and the head.",
    )
    frozen_layers: int = HfArg(
        default=0, help="First layers of a base to keep as they are when every other weight is trained."
    )
    freeze_encoder: bool = HfArg(
        default=False,
        help="Train the final norm and the head of a base alone; its states are computed once a cell.",
    )


@dataclass
class FinetuneTrainingArguments(RunTrainingArguments):
    """`transformers.TrainingArguments` with the defaults of cell-type annotation, and a few settings more."""

    logging_strategy: str = "epoch"
    # the best, and the last two: a process killed while it writes one can go back to the other
    save_total_limit: int = 3
    load_best_model_at_end: bool = True
    metric_for_best_model: str = "macro_f1"
    greater_is_better: bool = True
    early_stopping_patience: int = HfArg(
        default=10, help="Epochs without a better validation macro-F1 before the end; 0: never."
    )
    class_balance: str = HfArg(
        default="none",
        help="none, weights (loss weighted by inverse class size) or oversample (rare classes).",
    )
    solved_head: bool = HfArg(
        default=False,
        help="The head is no result of steps but of penalised logistic regression on the encoder's states, with "
        "all labelled cells; nothing else is trained.",
    )
    cell_axes: str = HfArg(
        default="",
        help="Pretrained model that knows what studies differ in, which a solved head is kept from leaning on, "
        "and axes of cells, to go by where the median type has few cells: scbert-mini, which ships, a folder "
        "or a name on the Hub; empty: none.",
    )
    cache_frozen: str = HfArg(
        default="auto", help="Where frozen layers' outputs are kept: auto, memory, disk or off."
    )

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} must be one of {', '.join(choices)}; found {getattr(self, name)!r}."
                )
        super().__post_init__()


FINETUNE = RunKind(
    name="finetune",
    argument_types=(FinetuneDataArguments, FinetuneModelArguments, FinetuneTrainingArguments),
    recipes=RECIPES,
    default_recipe="default",
    # with a base, what the paper does with its pretrained weights
    default_with_base="scbert",
    renamed=dict.fromkeys(("small", "demo", "pbmc", "pbmc3k", "scbert-strong", "mini"), "default"),
)
