"""The ImageNet weights that the models' authors start training from."""

from __future__ import annotations

from pathlib import Path

from xview_loc.models.base import CrossViewModel
from xview_loc.models.ccvpe import CCVPE
from xview_loc.models.checkpoint import CheckpointError, read_checkpoint, read_torch
from xview_loc.models.ggcvt import GGCVT


def load_pretrained(model: CrossViewModel, path: Path) -> list[str]:
    """Load ImageNet weights into both backbones of a model; return the file's keys that it does not use.

    ``path`` holds the state dict of an EfficientNet-B0 for CCVPE (keys such as ``_conv_stem.weight``), of a
    VGG-16 for GGCVT (torchvision's keys, such as ``features.0.weight``), those of a DataParallel included.
    Code in the file is never run.
    Raises CheckpointError if it cannot be read or does not fit the backbones.
    """
    weights = read_torch(path, read_checkpoint(path))
    state = {key.removeprefix("module."): value for key, value in weights.items()}
    what, backbones, own_key = _backbones(model)
    missing = [key for key in own_key if key not in state and not key.endswith("num_batches_tracked")]
    if missing:
        raise CheckpointError(
            f"{path} is no {what}, which {model.spec.name} starts from: {len(missing)} weights missing "
            f"(first: {missing[0]})"
        )
    wanted = model.state_dict()
    loaded = {}
    for key in own_key.keys() & state.keys():
        for backbone in backbones:
            own = f"{backbone}.{own_key[key]}"
            if state[key].shape != wanted[own].shape:
                shapes = f"{tuple(state[key].shape)}, not {tuple(wanted[own].shape)}"
                raise CheckpointError(
                    f"{path} does not fit {model.spec.name}, whose {what} is of another size: {key} has "
                    f"shape {shapes}"
                )
            loaded[own] = state[key]
    model.load_state_dict(loaded, strict=False)
    return [key for key in state if key not in own_key]


def _backbones(model: CrossViewModel) -> tuple[str, tuple[str, str], dict[str, str]]:
    """Return the backbones' architecture and names in the model, and their keys by those of the file."""
    if isinstance(model, CCVPE):
        keys = {key: key for key in model.grd_efficientnet.state_dict()}
        return "EfficientNet-B0", ("grd_efficientnet", "sat_efficientnet"), keys
    assert isinstance(model, GGCVT)
    keys = {key.replace("conv", "features."): key for key in model.GrdEnc.state_dict()}
    return "VGG-16", ("GrdEnc", "SatFeatureNet"), keys
