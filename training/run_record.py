"""What a partial folder was begun with, so that a resumed run is the same run."""

import json
from pathlib import Path
from typing import Any

from ..tokenization import InputError
from .finetune_arguments import comparable
from .finetune_data import FinetuneData

RECORD = "run.json"


def write_run_record(folder: Path, settings: dict[str, Any], data: FinetuneData) -> None:
    """Note settings and a checksum of the cells in the partial folder."""
    record = {"settings": comparable(settings), "cells": data.fingerprint()}
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")


def check_run_record(folder: Path, settings: dict[str, Any], data: FinetuneData) -> None:
    """
    Refuse to resume with other settings or cells than the run was begun with.

    Raises
    ------
    InputError
        Naming what differs. Nothing is said where the folder has no readable record: the run starts anew.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        before = record["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    now = comparable(settings)
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        name = changed[0]
        raise InputError(
            f"{folder} was begun with other settings ({', '.join(changed)}; {name} was "
            f"{before.get(name)!r} and is {now.get(name)!r} now). Resume with the same ones, or leave "
            f"--resume out to start anew."
        )
    if record.get("cells") != data.fingerprint():
        source = settings.get("reference", settings.get("corpus"))
        raise InputError(
            f"{folder} was begun with other cells or labels than {source} holds now. Leave --resume out to start "
            f"anew."
        )
