"""Say which extra to install when an optional library is missing."""

import importlib
from types import ModuleType


def require(module: str, extra: str = "evaluate") -> ModuleType:
    """
    Import an optional library, or say how to get it.

    Parameters
    ----------
    module
        Dotted name of the module to import, for example ``"matplotlib.pyplot"``.
    extra
        The extra of this distribution that brings it.

    Raises
    ------
    ImportError
        With the command that installs the extra, when the library itself is absent. An error *inside* an
        installed library is passed on as it is.

    Examples
    --------
    >>> require("json").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        library = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != library:
            raise
        message = f"{library} is needed here and is not installed: pip install 'scbert-transformers[{extra}]'"
        raise ImportError(message) from error
