"""Names of our encoders in timm, and their registration as soon as timm is there; imports neither timm nor torch."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

PATCHES = (8, 14, 16, 32)
MODELS = "foundation.timm_models"


def name(size: str, patch: int) -> str:
    """The architecture of a size of the family: `sar_vit_base_patch16_224`. 224 pixels are its default, not a limit."""
    return f"sar_vit_{size}_patch{patch}_224"


def register() -> None:
    """Register the family with timm: now if timm has been imported, else after its first import."""
    if "timm" in sys.modules:
        importlib.import_module(MODELS)
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())


class _AfterTimm(MetaPathFinder):
    """Finds timm as others do, and has the family registered behind its import; leaves after that.

    It stays when timm is only looked for, as many libraries do before they import it.
    """

    def __init__(self) -> None:
        self.asking = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm" or getattr(self.asking, "others", False):
            return None
        self.asking.others = True
        try:
            spec = find_spec(fullname)
        finally:
            self.asking.others = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, self)
        return spec


class _Registering(Loader):
    """A loader that does what the one of timm does, then registers."""

    def __init__(self, loader: Loader, finder: _AfterTimm) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # resources and reload know the real one
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        importlib.import_module(MODELS)
