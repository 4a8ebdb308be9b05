"""From an observation to a pose with its uncertainty, one frame at a time and over time."""

from xview_loc.estimation.localizer import Localizer
from xview_loc.estimation.observation import LocalizationError, Observation, PoseEstimate

__all__ = ["LocalizationError", "Localizer", "Observation", "PoseEstimate"]
