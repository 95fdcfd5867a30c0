"""What makes a CPU faster and has to be asked for: compiled blocks, and oneDNN's products."""

import functools
import os

from .compiled_layer_scbert import use_compiled_layers
from .cpu_matmul_scbert import use_onednn

SWITCHES = {"SCBERT_COMPILED": use_compiled_layers, "SCBERT_ONEDNN": use_onednn}


def request_cpu_speed(compiled: bool = False, onednn: bool = False) -> None:
    """
    Ask for compiled blocks and oneDNN's products, here and in processes that are started from here.

    Parameters
    ----------
    compiled
        See `use_compiled_layers`.
    onednn
        See `use_onednn`.

    Examples
    --------
    >>> request_cpu_speed(compiled=False, onednn=False)
    """
    wanted = {"SCBERT_COMPILED": compiled, "SCBERT_ONEDNN": onednn}
    os.environ.update({name: "1" for name, asked in wanted.items() if asked})
    apply_requested_cpu_speed()


@functools.cache
def apply_requested_cpu_speed() -> None:
    """Do once in a process what ``SCBERT_COMPILED`` and ``SCBERT_ONEDNN`` of the environment ask for."""
    for name, use in SWITCHES.items():
        if os.environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            use()
