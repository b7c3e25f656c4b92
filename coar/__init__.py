"""Component attribution: which parts of a network made a prediction, and how to change that for good."""

import sys
from typing import Any

import lazy_loader

from coar.renamed import OldModules, refuse_name

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
sys.meta_path.append(OldModules)


def __getattr__(name: str) -> Any:
    refuse_name(name)
    return _attribute(name)
