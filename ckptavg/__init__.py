"""Average the checkpoints of a finished training run, and refresh their BatchNorm statistics.

This is Stochastic Weight Averaging (Izmailov et al. 2018, arXiv 1803.05407) after the training.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ckptavg.average import average as average
    from ckptavg.average import average_many as average_many
    from ckptavg.batchnorm.files import refresh_checkpoint as refresh_checkpoint
    from ckptavg.batchnorm.options import RefreshOptions as RefreshOptions
    from ckptavg.batchnorm.refresh import refresh_norm as refresh_norm
    from ckptavg.convert import convert as convert
    from ckptavg.distributed import Ranks as Ranks
    from ckptavg.errors import CkptAvgError as CkptAvgError
    from ckptavg.evaluation.evaluate import evaluate as evaluate
    from ckptavg.evaluation.soup import soup as soup
    from ckptavg.evaluation.sweep import sweep as sweep
    from ckptavg.select.rules import Selection as Selection
    from ckptavg.verify import verify as verify

__version__ = "0.1.0"
__all__ = [
    "CkptAvgError",
    "Ranks",
    "RefreshOptions",
    "Selection",
    "__version__",
    "average",
    "average_many",
    "convert",
    "evaluate",
    "refresh_checkpoint",
    "refresh_norm",
    "soup",
    "sweep",
    "verify",
]

_MODULES = {
    "average": "ckptavg.average",
    "average_many": "ckptavg.average",
    "convert": "ckptavg.convert",
    "evaluate": "ckptavg.evaluation.evaluate",
    "refresh_checkpoint": "ckptavg.batchnorm.files",
    "refresh_norm": "ckptavg.batchnorm.refresh",
    "soup": "ckptavg.evaluation.soup",
    "sweep": "ckptavg.evaluation.sweep",
    "verify": "ckptavg.verify",
    "Ranks": "ckptavg.distributed",
    "RefreshOptions": "ckptavg.batchnorm.options",
    "Selection": "ckptavg.select.rules",
    "CkptAvgError": "ckptavg.errors",
}


def __getattr__(name: str) -> object:
    """Import a public object when it is first used: `ckptavg --help` needs no numpy."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415

    try:
        return getattr(import_module(_MODULES[name]), name)
    except Exception as error:
        from ckptavg.errors import problem_of_torch  # noqa: PLC0415

        problem = problem_of_torch(error)
        if problem is None:
            raise
        # An AttributeError, so that `hasattr` and `help` work.
        raise AttributeError(f"ckptavg.{name} runs a model, and {problem}") from error


def __dir__() -> list[str]:
    """The public names, also those that are not imported yet."""
    return __all__


class _Package(ModuleType):
    """Makes `ckptavg.average` the function, not the module of that name; `verify` likewise."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
