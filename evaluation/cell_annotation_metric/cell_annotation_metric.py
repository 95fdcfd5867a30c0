"""Cell-type annotation scores as an `evaluate` module: `evaluate.load("<this folder>")`."""

import datasets
import evaluate

from .annotation_scores import annotation_scores

_DESCRIPTION = """
Scores of cell-type annotation: accuracy, macro-F1 and balanced accuracy, and on request the scores of every class
and the confusion matrix. The means run over the classes of `labels`, or else those among the references: a
prediction that is no class of theirs, such as "unassigned", counts as a miss, not as a class.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: predicted cell types, one string per cell.
    references: true cell types, one string per cell.
    labels: the classes that the means run over; default: those that occur among the references, sorted.
    details: also return `per_class` and `confusion`.
Returns:
    accuracy, macro_f1, balanced_accuracy and, with `details`,
    per_class ({label: {precision, recall, f1, support}}) and confusion ({labels, matrix}; rows: references).
Examples:
    >>> metric = evaluate.load("evaluation/cell_annotation_metric")
    >>> metric.compute(predictions=["B", "T", "T", "unassigned"], references=["B", "B", "T", "T"])["accuracy"]
    0.5
"""

_CITATION = """
@article{yang2022scbert,
  title={scBERT as a large-scale pretrained deep language model for cell type annotation
         of single-cell RNA-seq data},
  author={Yang, Fan and others},
  journal={Nature Machine Intelligence}, volume={4}, pages={852--866}, year={2022}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CellAnnotationMetric(evaluate.Metric):
    """Accuracy, macro-F1 and balanced accuracy of predicted cell types."""

    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        )
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=features,
            reference_urls=["https://doi.org/10.1038/s42256-022-00534-z"],
        )

    def _compute(self, predictions, references, labels=None, details=False):
        scores = annotation_scores(predictions, references, labels)
        if details:
            return scores
        return {name: scores[name] for name in ("accuracy", "macro_f1", "balanced_accuracy")}
