"""Processes that work for another one, and do not outlive it."""

import multiprocessing
import os
import threading


def end_with_parent():
    """End this process when the one that started it is gone.

    A process that is killed cannot end its workers: they would go on beside a run that takes up its work, or wait for
    work for ever.
    """
    threading.Thread(target=_wait_for_the_end, daemon=True).start()


def _wait_for_the_end():
    multiprocessing.parent_process().join()
    # what is half written stands under a temporary name
    os._exit(1)
