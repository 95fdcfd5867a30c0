"""The scores themselves. Pushed beside the `evaluate` module, so scikit-learn is all it may import."""

from sklearn.metrics import confusion_matrix, precision_recall_fscore_support


def annotation_scores(predictions: list, references: list, labels: list | None = None) -> dict:
    """
    Score predicted cell types [cells] by the true ones [cells], JSON-ready.

    The means run over `labels`, or else the classes among the references; a prediction outside them (such as
    "unassigned") is a miss, not a class. The balanced accuracy leaves out classes without cells.
    """
    classes = sorted(set(references)) if labels is None else labels
    others = sorted((set(references) | set(predictions)) - set(classes))
    precision, recall, f1, support = precision_recall_fscore_support(
        references, predictions, labels=classes, zero_division=0.0
    )
    present = support > 0
    per_class = {
        label: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for label, p, r, f, n in zip(classes, precision, recall, f1, support, strict=True)
    }
    matrix = confusion_matrix(references, predictions, labels=classes + others)
    return {
        "accuracy": float(matrix.trace() / matrix.sum()),
        "macro_f1": float(f1.mean()),
        "balanced_accuracy": float(recall[present].mean()) if present.any() else 0.0,
        "per_class": per_class,
        "confusion": {"labels": classes + others, "matrix": matrix.tolist()},
    }
