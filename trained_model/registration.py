"""Makes ``AutoModel``, ``AutoTokenizer`` and ``pipeline`` know scBERT, when they are first imported.

Registering needs our classes, and those need torch: done in ``scbert/__init__.py`` it would make ``import
scbert`` (and ``scbert --help``) take four seconds. So each registration waits for the module of transformers
that it writes into: where that is imported already it happens at once, otherwise right after that import.
Whoever can call ``AutoModel.from_pretrained`` has imported it.

On the way, transformers reads its own 2,500 files once, and not twice: half a second of a short command.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from inspect import unwrap
from types import ModuleType


def _register_config(ours: ModuleType) -> None:
    from transformers import AutoConfig

    AutoConfig.register("scbert", ours.ScBertConfig, exist_ok=True)


def _register_models(ours: ModuleType) -> None:
    from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

    config = ours.ScBertConfig
    AutoModel.register(config, ours.ScBertModel, exist_ok=True)
    AutoModelForMaskedLM.register(config, ours.ScBertForMaskedExpression, exist_ok=True)
    AutoModelForSequenceClassification.register(config, ours.ScBertForCellClassification, exist_ok=True)


def _register_tokenizer(ours: ModuleType) -> None:
    from transformers import AutoTokenizer

    from ..modeling_scbert import ScBertConfig

    AutoTokenizer.register(ScBertConfig, ours.ScBertTokenizer, exist_ok=True)


def _register_pipelines(ours: ModuleType) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification
    from transformers.pipelines import PIPELINE_REGISTRY

    annotation, embedding = ours.CellTypeAnnotationPipeline, ours.CellEmbeddingPipeline
    PIPELINE_REGISTRY.register_pipeline(
        "cell-type-annotation", annotation, pt_model=AutoModelForSequenceClassification
    )
    PIPELINE_REGISTRY.register_pipeline("cell-embedding", embedding, pt_model=AutoModel)


# module of transformers -> (our module that holds the classes, what to do once both are imported)
_REGISTRATIONS: dict[str, tuple[str, Callable[[ModuleType], None]]] = {
    "transformers.models.auto.configuration_auto": ("..modeling_scbert", _register_config),
    "transformers.models.auto.modeling_auto": ("..modeling_scbert", _register_models),
    "transformers.models.auto.tokenization_auto": ("..tokenization", _register_tokenizer),
    "transformers.pipelines": ("..modeling_scbert.pipeline_scbert", _register_pipelines),
}


def _list_folders_once(import_utils: ModuleType) -> None:
    """Let transformers remember what it read in a folder of its models.

    It asks for all 550 of them twice, for its package and for its models, and remembers 128 (5.23).
    """
    read = getattr(import_utils, "create_import_structure_from_path", None)
    if read is not None:
        import_utils.create_import_structure_from_path = lru_cache(maxsize=None)(unwrap(read))


class _AfterImport(MetaPathFinder):
    """Lets the other finders find transformers' and our modules, and registers after their import.

    Not within: modules of transformers and of ours import each other, so the classes are fetched only when
    the outermost of these imports has ended and nothing is half imported.
    """

    def __init__(self) -> None:
        self.pending = dict(_REGISTRATIONS)
        self.nesting = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in ("transformers", "scbert"):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    self.watch(spec.loader)
                return spec
        return None

    def watch(self, loader: Loader) -> None:
        """Have a loader register after it has run its module, where that was the outermost import."""
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            # put back first: pickle, inspect and importlib.resources must meet the loader as it was
            vars(loader).pop("exec_module", None)
            self.nesting.depth = getattr(self.nesting, "depth", 0) + 1
            try:
                execute(module)
            finally:
                self.nesting.depth -= 1
            if module.__name__ == "transformers.utils.import_utils":
                _list_folders_once(module)
            if self.nesting.depth == 0:
                self.register()

        loader.exec_module = exec_module

    def register(self) -> None:
        for theirs in list(self.pending):
            if theirs in sys.modules and theirs in self.pending:
                ours, action = self.pending.pop(theirs)
                action(importlib.import_module(ours, __package__))
        if not self.pending and self in sys.meta_path:
            sys.meta_path.remove(self)


def install() -> None:
    """Register with what transformers has imported already, and watch for the rest."""
    finder = _AfterImport()
    sys.meta_path.insert(0, finder)
    finder.register()
