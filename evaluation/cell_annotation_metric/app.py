"""The page of the pushed metric: a Space on the Hub runs this file."""

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load("cell_annotation_metric.py"))
