"""Keep a broken torchvision from breaking imports that never needed it.

mosaicml-streaming requires torchvision, and next to a CPU build of torch pip installs PyPI's CUDA
build, which cannot be imported ("operator torchvision::nms does not exist"). That breaks ``import
streaming`` (only ``streaming.vision`` uses it) and the model classes of transformers (which look
whether torchvision is installed, not whether it works). ``dualtrain/__init__`` calls
:func:`prepare_imports`, which costs nothing by itself: it waits for the first import of either
package, and only then tries torchvision.

To be removed when mosaicml-streaming no longer requires torchvision, or imports
``streaming.vision`` lazily.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_USERS_OF_TORCHVISION = frozenset({"streaming", "transformers"})
_STUBBED = "streaming.vision"
# What a torchvision that does not fit its torch was seen to raise: missing operators, missing
# libraries, names of a half-initialised package.
_IMPORT_FAILURES = (ImportError, OSError, RuntimeError, AttributeError)


def prepare_imports() -> None:
    """Make later imports of ``streaming`` and ``transformers`` survive a broken torchvision."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


def hide_broken_torchvision() -> bool:
    """Import torchvision; if that fails, make the whole process see it as not installed.

    Returns:
        Whether torchvision works.
    """
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"] is not None
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except _IMPORT_FAILURES:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        # None, and not a stub: find_spec and import both take it for "not installed", whereas
        # transformers would believe in a stub and import from it.
        sys.modules["torchvision"] = None  # type: ignore[assignment]
        return False
    return True


class _Watcher(MetaPathFinder):
    """Look at torchvision just before the first package that would be hurt by it is imported."""

    def __init__(self) -> None:
        self._works: bool | None = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in _USERS_OF_TORCHVISION and self._works is None:
            self._works = hide_broken_torchvision()
        if fullname == _STUBBED and self._works is False:
            return ModuleSpec(fullname, _EmptyPackage(), is_package=True)
        return None  # the ordinary finders take over


class _EmptyPackage(Loader):
    """Stand in for ``streaming.vision``, whose submodules all import torchvision."""

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = "Left empty by dualtrain.common.compat: torchvision cannot be imported."
