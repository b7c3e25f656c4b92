"""Component attribution: which parts of a network made a prediction, and how to change that for good."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
