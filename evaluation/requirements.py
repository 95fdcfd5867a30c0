"""Say which extra to install when an optional library is missing."""

import importlib
from types import ModuleType

from ..extras import MissingLibrary, how_to_install


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
    MissingLibrary
        An ImportError with the command that installs the extra, when the library itself is absent. An error *inside* an
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
        message = f"{library} is needed here and is not installed: {how_to_install(library, extra)}"
        raise MissingLibrary(message) from error
