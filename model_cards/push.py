"""Send a model folder to the Hugging Face Hub: private unless said otherwise, and never more than the model."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .. import modeling_scbert
from ..tokenization import InputError
from ..trained_model.model_folder import (
    check_model_folder,
    find_model,
    load_model,
    load_tokenizer,
    load_weights,
    quiet_transformers,
    save_model,
)
from ..training.initial_model import EFFECTS
from .card import GENERATED, METRICS, build_card, public_metrics

logger = logging.getLogger(__name__)

# a model, its tokenizer, its code, its figures; optimiser states, checkpoints and data stay at home
PATTERNS = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "gene_panel.txt",
    "gene_levels.txt",
    EFFECTS,
    "tokenizer_config.json",
    "added_tokens.json",
    "*_scbert.py",
    "confusion.png",
    "learning_curve.png",
)
CODE = ("configuration_scbert.py", "modeling_scbert.py", "tokenization_scbert.py", "pipeline_scbert.py")
WAITS = (2.0, 5.0, 15.0)
TOKEN = re.compile(r"hf_[A-Za-z0-9]{4,}|(?<=[Bb]earer )\S+")
# the Hub's own error is a fault of the connection's library and of the system at once; their kinds are the same
# two, whichever library this version of the client talks through
CONNECTION_FAULTS = HfHubHTTPError.__bases__

T = TypeVar("T")


def push(
    folder: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    licence: str = "apache-2.0",
    message: str = "Upload model",
    api: HfApi | None = None,
) -> dict[str, Any]:
    """
    Send weights, tokenizer, code, figures and a model card to the Hub.

    Parameters
    ----------
    folder
        A complete model folder, or the name of a model that ships; it is loaded first, and left as it is.
    repo_id
        ``NAME`` or ``OWNER/NAME``; made if it does not exist.
    public
        Show it to everybody; private otherwise.
    licence
        Licence of the weights, for the card.
    message
        Title of the commit.
    api
        Client of the Hub; logged in by ``hf auth login`` or the variable HF_TOKEN.

    Returns
    -------
    dict
        ``url``, ``private``, ``files``.

    Raises
    ------
    InputError
        When folder, name or rights do not fit.
    OSError
        When the Hub cannot be reached, after three more attempts.

    Examples
    --------
    >>> push("my_model", "me/pbmc")["private"]  # doctest: +SKIP
    True
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is no name for the Hub: {error}") from error
    folder = find_model(folder)
    load_model(folder, "any", device="cpu", dtype="float32")
    if not all((folder / name).is_file() for name in CODE):
        # such as the models that ship: without its code a model would work for nobody who lacks this package
        with tempfile.TemporaryDirectory() as parent:
            whole = shutil.copytree(folder, Path(parent) / folder.resolve().name)
            _add_code(whole)
            return push(whole, repo_id, public=public, licence=licence, message=message, api=api)
    api = api or HfApi()
    with quiet_transformers():
        url = _retried(
            lambda: api.create_repo(repo_id, private=not public, exist_ok=True, repo_type="model"), repo_id
        )
        full_name = getattr(url, "repo_id", repo_id)
        _check_visibility(api, full_name, public)
        operations = _operations(folder, full_name, licence)
        commit = _retried(
            lambda: api.create_commit(full_name, operations, commit_message=message, repo_type="model"),
            full_name,
        )
    address = str(getattr(commit, "repo_url", url))
    logger.info(
        f"Pushed {len(operations)} files to {address}, which {'everybody' if public else 'only its owner'} can see.\n"
        f"Next: scbert annotate QUERY.h5ad --model {full_name} --output annotated.h5ad"
    )
    files = [operation.path_in_repo for operation in operations]
    return {"url": address, "private": not public, "files": files}


def _add_code(folder: Path) -> None:
    """Save model and tokenizer again, which writes the code they need beside them."""
    model_class = getattr(modeling_scbert, check_model_folder(folder)["architectures"][0])
    save_model(load_weights(model_class, folder), load_tokenizer(folder), folder)


def _check_visibility(api: HfApi, repo_id: str, public: bool) -> None:
    """Refuse to send what was meant to be private to a repository that everybody can read."""
    if not public and _retried(lambda: api.repo_info(repo_id, repo_type="model"), repo_id).private is False:
        raise InputError(
            f"{repo_id} exists already and is public. Say --public to push there all the same, make it private on "
            "the Hub first, or choose another name."
        )


def _operations(folder: Path, repo_id: str, licence: str) -> list[CommitOperationAdd]:
    """What is sent: the model's files, its public figures and its card."""
    files = sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if path.is_file()})
    sent: dict[str, str | bytes] = {path.name: str(path) for path in files}
    metrics = folder / METRICS
    if metrics.is_file():
        cleaned = public_metrics(json.loads(metrics.read_text(encoding="utf-8")))
        sent[METRICS] = json.dumps(cleaned, indent=2, ensure_ascii=False).encode()
    sent["README.md"] = _card_text(folder, repo_id, licence).encode()
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in sent.items()]


def _card_text(folder: Path, repo_id: str, licence: str) -> str:
    """The card somebody wrote by hand, or a generated one."""
    written = folder / "README.md"
    if written.is_file():
        text = written.read_text(encoding="utf-8")
        if GENERATED not in text:
            return text
    return str(build_card(folder, repo_id, licence))


def _retried(action: Callable[[], T], repo_id: str) -> T:
    """Do it, again after a while where the network or the Hub failed, and say in plain words what went wrong."""
    for wait in (*WAITS, None):
        try:
            return action()
        except OfflineModeIsEnabled as error:
            raise InputError(
                "The variable HF_HUB_OFFLINE forbids to reach the Hub; unset it to push."
            ) from error
        except LocalTokenNotFoundError as error:
            raise InputError(_NO_RIGHTS.format(name=repo_id, seen="no token was found")) from error
        except CONNECTION_FAULTS as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status in (401, 403) or isinstance(error, RepositoryNotFoundError):
                raise InputError(_NO_RIGHTS.format(name=repo_id, seen=_short(error).rstrip("."))) from None
            if status is not None and status < 500 and status not in (408, 429):
                raise InputError(f"The Hub refused the upload to {repo_id}: {_short(error)}") from None
            if wait is None:
                raise OSError(
                    f"The Hub could not be reached after {len(WAITS) + 1} attempts: {_short(error)} Nothing "
                    "incomplete was published (a push is one commit). Check the connection and push again."
                ) from None
            logger.warning(
                "The Hub could not be reached (%s); trying again in %g s.", _short(error).rstrip("."), wait
            )
            time.sleep(wait)
    raise AssertionError("unreachable")


_NO_RIGHTS = (
    "The Hub does not let you write to {name} ({seen}). Log in with `hf auth login`, or set HF_TOKEN, with a token "
    "that may write there."
)


def _short(error: BaseException) -> str:
    """First line of an error, with nothing in it that could be a token."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    token = get_token()
    if token:
        text = text.replace(token, "***")
    return TOKEN.sub("***", text).rstrip(".") + "."
