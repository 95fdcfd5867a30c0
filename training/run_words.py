"""What a run found, in words: a few lines for the terminal, warnings where they matter."""

import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# a lead of logistic regression that is no accident of a few cells
LEAD = 0.005
# below this share of assigned cells, the model says little
FEW_ASSIGNED = 0.5
ESTIMATE_WORDS = {
    "cross_validation": "Cross-validation",
    "test": "On the test cells",
    "validation": "On the validation cells (which chose the best epoch: not a test)",
}


def log_summary(summary: dict[str, Any], output: str | Path) -> None:
    """Log what was learnt, how good it is beside logistic regression, and what to do next."""
    logger.info(_learnt(summary))
    taught = (summary["solved_head"] or {}).get("unlabelled")
    if taught is not None:
        logger.info(_unlabelled(taught))
    estimate = summary["estimate"]
    if estimate is None:
        logger.warning("Every type has a single cell: how good the model is cannot be said.")
    else:
        logger.info(_scores(summary, estimate))
        logger.info(_assigned(summary, estimate))
        for warning in warnings(summary, estimate):
            logger.warning(warning)
    logger.info("Next: scbert annotate QUERY.h5ad --model %s --output annotated.h5ad", output)


def _learnt(summary: dict[str, Any]) -> str:
    cells, report = summary["cells"], summary["data"]
    n_cells = cells["train"] + cells["validation"]
    seconds = sum(summary["seconds"].values()) + summary["baseline"].get("seconds", 0)
    left_out = {
        "without a label": report["unlabelled"],
        "with too few genes": report["min_genes"]["left_out"],
    }
    more = ", ".join(f"{n:,} {why}" for why, n in left_out.items() if n)
    return (
        f"Learnt {len(summary['classes'])} types from {n_cells:,} cells and {report['genes']['panel']:,} genes in "
        f"{seconds:.0f} s" + (f" (left out: {more})." if more else ".")
    )


def _unlabelled(taught: dict[str, Any]) -> str:
    others = f"{taught['cells']:,} cells without labels"
    if not taught["kept"]:
        why = "held-out labelled cells were better off without it"
        if taught["gain"] is None:
            why = f"ways to use them agree on {taught['agreement']:.0%} only, and no type has a second cell to judge by"
        return f"What {others} taught was left out: {why}."
    text = f"Learnt from {others} as well"
    if taught["gain"] is None:
        text += "; with one cell a type, whether that helps cannot be measured here"
    else:
        sure = taught["gain"] > 2 * taught["error"]
        text += f": on held-out labelled cells that {'is better' if sure else 'makes no clear difference'}"
    if taught["neighbours"] == "own":
        text += (
            f". The two kinds of cells can be told apart (AUC {taught['told_apart']:.2f}: another protocol or other "
            "types), so each was averaged with its own kind only: look at the result with care"
        )
    return f"{text}."


def _scores(summary: dict[str, Any], estimate: str) -> str:
    def told(accuracy: float, macro_f1: float) -> str:
        return f"{accuracy:.1%} right (macro-F1 {macro_f1:.3f})"

    ours = told(summary[f"{estimate}_accuracy"], summary[f"{estimate}_macro_f1"])
    text = f"{ESTIMATE_WORDS[estimate]}, {summary[estimate]['cells']:,} cells: {ours}"
    if f"baseline_{estimate}_accuracy" in summary:
        theirs = told(summary[f"baseline_{estimate}_accuracy"], summary[f"baseline_{estimate}_macro_f1"])
        text += f"; logistic regression on the same cells: {theirs}"
    return text + "."


def _assigned(summary: dict[str, Any], estimate: str) -> str:
    assigned = summary[estimate]["assigned"]
    text = f"{assigned['share']:.1%} of the cells would be assigned a type"
    if assigned["accuracy"] is not None:
        text += f", {assigned['accuracy']:.1%} of these the right one"
    return f"{text}; the others come out unassigned."


def warnings(summary: dict[str, Any], estimate: str) -> list[str]:
    """What a reader must not overlook."""
    found, small = [], summary["data"]["small_classes"]
    lead = summary.get(f"baseline_{estimate}_macro_f1", 0) - summary[f"{estimate}_macro_f1"]
    if lead > LEAD:
        found.append(f"Logistic regression does better on these cells, by {lead:.3f} of macro-F1.")
    if summary[estimate]["assigned"]["share"] < FEW_ASSIGNED:
        found.append(
            "Most held-out cells would come out unassigned: the types are hard to tell apart, or have few cells. "
            "annotate takes a lower threshold (--threshold)."
        )
    if small:
        names = ", ".join(f"{name} ({n})" for name, n in list(small.items())[:10])
        found.append(f"Types of one or two cells, of which little is learnt and nothing measured: {names}.")
    return found


def log_pretraining(summary: dict[str, Any], output: str | Path) -> None:
    """Log what was learnt without labels, how good it is beside knowing averages alone, and what to do next."""
    training = summary["training"]
    logger.info(
        f"Learnt from {summary['cells']['train']:,} cells and {summary['genes']:,} genes in {summary['seconds']:.0f} s "
        f"({training['steps']:,} steps, {training['epochs']:.3g} passes over the cells)."
    )
    found, of_gene, of_cell = (
        summary[f"{whose}masked_accuracy"] for whose in ("", "baseline_", "cell_baseline_")
    )
    logger.info(
        f"Of {summary['masked_tokens']:,} hidden values, in cells that were not learnt from, {found:.1%} were guessed "
        f"right; always saying a gene's commonest value is right for {of_gene:.1%}, a cell's for {of_cell:.1%}."
    )
    if "cell_loss" in summary:
        gain = summary["baseline_cell_loss"] - summary["cell_loss"]
        logger.info(f"From its vector a whole cell is told {gain:.3f} nats better than by the mean cell.")
    if found <= max(of_gene, of_cell) + LEAD:
        logger.warning(
            "The model guesses no better than that: it has learnt averages at most. Let it learn for longer (epochs, "
            "--epochs), or from more cells."
        )
    logger.info("Next: scbert finetune REF.h5ad --label-key KEY --base %s --output my_model", output)
