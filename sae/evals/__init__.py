"""Measures of a dictionary, one file each, behind one small interface.

`evaluate` runs those named in `EVALS` on anything with encode and decode.
"""

from sae.evals.inputs import activation_contexts
from sae.evals.interface import EvalBatch, EvalRow, EvalSetup, Label, ModelBatch, Undefined
from sae.evals.on_world import evaluate_on_world
from sae.evals.registry import EVALS
from sae.evals.results import EvalResults, read_results, table_rows, write_results
from sae.evals.run import evaluate

__all__ = [
    "EVALS",
    "EvalBatch",
    "EvalResults",
    "EvalRow",
    "EvalSetup",
    "Label",
    "ModelBatch",
    "Undefined",
    "activation_contexts",
    "evaluate",
    "evaluate_on_world",
    "read_results",
    "table_rows",
    "write_results",
]
