"""Training from ImageNet weights in the layouts of their usual files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from typer.testing import CliRunner

from xview_loc.cli.commands import app
from xview_loc.cli.console import UsageError
from xview_loc.models import create_model
from xview_loc.models.checkpoint import CheckpointError
from xview_loc.models.efficientnet import EfficientNet
from xview_loc.models.pretrained import load_pretrained
from xview_loc.models.vgg import Encoder

# VGG-16's convolutions: number in torchvision's ``features``, output channels; the last three blocks are not
# GGCVT's.
VGG16 = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, 17: 512, 19: 512, 21: 512}


def vgg16() -> dict[str, Tensor]:
    """Return random weights with torchvision's names and shapes, the fully connected layers made small."""
    state, channels = {}, 3
    for number, out in VGG16.items():
        state[f"features.{number}.weight"] = torch.randn(out, channels, 3, 3) / (9 * channels) ** 0.5
        state[f"features.{number}.bias"] = torch.randn(out)
        channels = out
    return state | {"classifier.6.weight": torch.randn(10, 4), "classifier.6.bias": torch.randn(10)}


@torch.inference_mode()
def test_both_backbones_of_ccvpe_start_from_one_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    published = EfficientNet()
    for name, value in published.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 1.0)
    torch.save(published.state_dict(), tmp_path / "efficientnet-b0.pth")
    model = create_model("ccvpe-kitti").eval()
    assert load_pretrained(model, tmp_path / "efficientnet-b0.pth") == []
    image = torch.rand(1, 3, 64, 64)
    expected, _ = published.eval()(image)
    for backbone in (model.grd_efficientnet, model.sat_efficientnet):
        torch.testing.assert_close(backbone(image)[0], expected)


@torch.inference_mode()
def test_both_encoders_of_ggcvt_start_from_the_first_blocks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = vgg16()
    parallel = {f"module.{key}": value for key, value in state.items()}
    torch.save({"state_dict": parallel}, tmp_path / "vgg16.pth", _use_new_zipfile_serialization=False)
    model = create_model("ggcvt-vigor")
    unused = load_pretrained(model, tmp_path / "vgg16.pth")
    assert unused == [key for key in state if "features" not in key or int(key.split(".")[1]) > 14]
    image = torch.rand(1, 3, 32, 32)
    x, numbers = image, [0, 2, None, 5, 7, None, 10, 12, 14]
    for number in numbers:
        if number is None:
            x = F.max_pool2d(x, 2)
        else:
            x = F.conv2d(x, state[f"features.{number}.weight"], state[f"features.{number}.bias"], padding=1)
            # Rectified after pooling, which is the same; the last features are not.
            x = x if number == 14 else F.relu(x)
    expected = F.max_pool2d(x, 2)
    for encoder in (model.GrdEnc, model.SatFeatureNet):
        torch.testing.assert_close(Encoder.forward(encoder, image)[0], expected)


def test_wrong_files_are_named_in_one_line(tmp_path: Path) -> None:
    def fails(error: type[Exception], message: str, *words: str) -> None:
        data = "simulated:source:0:2"
        command = ["train", "--data", data, "--validation", data, "--out", str(tmp_path / "run"), *words]
        with pytest.raises(error, match=message) as caught:
            CliRunner().invoke(app, command, catch_exceptions=False)
        assert "\n" not in str(caught.value)

    vgg, net, broken = (tmp_path / name for name in ("vgg16.pth", "efficientnet.pth", "broken.pth"))
    torch.save(vgg16(), vgg)
    torch.save(EfficientNet().state_dict(), net)
    broken.write_bytes(net.read_bytes()[:1000])
    init = ("--init", str(vgg))
    fails(CheckpointError, "vgg16.pth is no EfficientNet-B0.*first: _conv", "--model", "ccvpe-small", *init)
    fails(CheckpointError, "vgg16.pth does not fit ggcvt-small.* features", "--model", "ggcvt-small", *init)
    fails(CheckpointError, "does not fit ccvpe-small", "--model", "ccvpe-small", "--init", str(net))
    fails(CheckpointError, "broken.pth is damaged", "--model", "ccvpe-small", "--init", str(broken))
    fails(CheckpointError, "nothing.pth does not exist", "--init", str(tmp_path / "nothing.pth"))
    fails(UsageError, "leave it out with --start", "--start", str(net), "--init", str(net))
