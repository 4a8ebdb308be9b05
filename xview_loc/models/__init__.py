"""Cross-view localisation models behind one interface (:mod:`xview_loc.models.base`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from xview_loc.models import ccvpe, ggcvt
from xview_loc.models.base import CrossViewModel

_CONSTRUCTORS: dict[str, Callable[[], CrossViewModel]] = {
    **{name: partial(ccvpe.CCVPE, config) for name, config in ccvpe.CONFIGS.items()},
    **{name: partial(ggcvt.GGCVT, config) for name, config in ggcvt.CONFIGS.items()},
}
MODEL_NAMES = tuple(_CONSTRUCTORS)


def create_model(name: str) -> CrossViewModel:
    """Create a model by name, with random weights and in evaluation mode. Raises ValueError."""
    if name not in _CONSTRUCTORS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODEL_NAMES)}")
    return _CONSTRUCTORS[name]().eval()
