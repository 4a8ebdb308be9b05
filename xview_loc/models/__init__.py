"""Cross-view localisation models behind one interface (:mod:`xview_loc.models.base`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from xview_loc.models.specs import SPECS

if TYPE_CHECKING:
    from xview_loc.models.base import CrossViewModel


# Imported when a model is made: what needs no more than its spec need not load torch.
def _ccvpe(name: str) -> CrossViewModel:
    from xview_loc.models.ccvpe import CCVPE, CONFIGS

    return CCVPE(CONFIGS[name])


def _ggcvt(name: str) -> CrossViewModel:
    from xview_loc.models.ggcvt import CONFIGS, GGCVT

    return GGCVT(CONFIGS[name])


_CONSTRUCTORS: dict[str, Callable[[], CrossViewModel]] = {
    name: partial(_ccvpe if name.startswith("ccvpe-") else _ggcvt, name) for name in SPECS
}
MODEL_NAMES = tuple(SPECS)


def create_model(name: str) -> CrossViewModel:
    """Create a model by name, with random weights and in evaluation mode. Raises ValueError."""
    if name not in _CONSTRUCTORS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODEL_NAMES)}")
    return _CONSTRUCTORS[name]().eval()
