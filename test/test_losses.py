"""Training losses: their minima, and the authors' conventions."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from published import REFERENCE, reference_inputs, reference_model

from xview_loc.models import create_model
from xview_loc.models.ccvpe import CCVPE, CONFIGS
from xview_loc.training.losses import (
    CCVPELoss,
    DistillationLoss,
    bin_weights,
    cross_entropy,
    gaussian_label,
    info_nce,
    loss_for,
    orientation_error,
)


def test_label_is_a_gaussian_at_the_position() -> None:
    label = gaussian_label(torch.tensor([[10.0, 20.0], [3.5, 7.0]]), 32, 2.0)
    assert float(label[0, 10, 20]) == 1.0 and int(label[0].argmax()) == 10 * 32 + 20
    assert float(label[0, 12, 20]) == pytest.approx(math.exp(-0.5))
    assert float(label[1, 3, 7]) == float(label[1, 4, 7]) == pytest.approx(math.exp(-0.5 * 0.25**2))


@pytest.mark.parametrize(
    ("degrees", "weights"),
    [
        (0.0, {0: 1.0}),
        (18.0, {19: 1.0}),  # the published convention: heading 18 degrees of 20 bins is bin 19
        (27.0, {19: 0.5, 18: 0.5}),
        (-4.5, {0: 0.75, 1: 0.25}),
        (351.0, {0: 0.5, 1: 0.5}),
    ],
)
def test_headings_are_shared_by_the_two_nearest_bins(degrees: float, weights: dict[int, float]) -> None:
    got = bin_weights(torch.tensor([math.radians(degrees)], dtype=torch.float64), 20)[0]
    want = torch.zeros(20, dtype=torch.float64)
    for index, weight in weights.items():
        want[index] = weight
    torch.testing.assert_close(got, want)


def test_bins_agree_with_the_model() -> None:
    """The best bin of a turned panorama is the loss's positive one."""
    model = create_model("ccvpe-small")
    torch.manual_seed(0)
    size = model.spec.aerial_size
    ground, aerial = torch.randn(1, 3, *model.spec.ground_size), torch.randn(1, 3, size, size)
    with torch.inference_mode():
        features = model.encode_aerial(aerial)
        straight = model.match(ground, features).levels[0]
        column = ground.shape[3] // model.spec.bins
        # Content moves to the right by one bin, so the heading turns left.
        turned = model.match(ground.roll(column, 3), features).levels[0]
    heading = 2 * math.pi / model.spec.bins
    index = int(bin_weights(torch.tensor([heading]), model.spec.bins).argmax())
    torch.testing.assert_close(turned[:, index], straight[:, 0], atol=0.02, rtol=0.0)


@pytest.mark.parametrize("name", ["ccvpe-small", "ccvpe-kitti"])
def test_a_known_heading_is_one_bin_for_model_and_loss(name: str) -> None:
    """North on north-up tiles; to the right on tiles turned to the heading."""
    with torch.device("meta"):
        model = CCVPE(CONFIGS[name])
    heading = torch.tensor([model.spec.nominal_heading])
    assert model.prior_bins(0.0).tolist() == [int(bin_weights(heading, model.spec.bins).argmax())]
    around = model.prior_bins(50.0)
    assert len(around) == 5 and int(around[2]) == int(model.prior_bins(0.0)[0])


def test_info_nce_counts_the_positive_cells() -> None:
    label = gaussian_label(torch.tensor([[8.0, 8.0]]), 16, 0.4)
    scores = torch.zeros(1, 3, 16, 16)
    one_hot = torch.tensor([[0.0, 1.0, 0.0]])
    # Equal scores: the share of one cell among all cells of all bins.
    assert float(info_nce(scores, label, one_hot)) == pytest.approx(math.log(3 * 256))
    scores[0, 1, 8, 8] = 1.0
    better = float(info_nce(scores, label, one_hot))
    scores[0, 1, 8, 8], scores[0, 2, 8, 8] = 0.0, 1.0
    wrong_bin = float(info_nce(scores, label, one_hot))
    assert better < math.log(3 * 256) < wrong_bin


def test_info_nce_pools_the_label_to_the_level() -> None:
    label = gaussian_label(torch.tensor([[5.0, 13.0]]), 16, 0.3)
    scores = torch.full((1, 1, 4, 4), -1.0)
    scores[0, 0, 1, 3] = 1.0
    assert float(info_nce(scores, label, torch.ones(1, 1))) < 1e-3


def test_cross_entropy_is_least_for_the_label() -> None:
    label = gaussian_label(torch.tensor([[6.0, 9.0]]), 16, 1.5)
    entropy = -(label / label.sum() * (label / label.sum()).log()).nansum()
    torch.testing.assert_close(cross_entropy(label.log(), label), entropy, rtol=1e-4, atol=1e-4)
    assert float(cross_entropy(torch.zeros(1, 16, 16), label)) == pytest.approx(math.log(256))


def test_orientation_is_compared_at_the_position() -> None:
    label = gaussian_label(torch.tensor([[4.0, 4.0]]), 16, 0.3)
    angle = torch.tensor([0.7])
    field = torch.zeros(1, 2, 16, 16)
    field[0, :, 4, 4] = torch.tensor([math.cos(0.7), math.sin(0.7)])
    assert float(orientation_error(field, angle, label)) < 0.02
    assert float(orientation_error(-field, angle, label)) == pytest.approx(4.0, abs=0.1)


@pytest.mark.parametrize("prior", [None, 0.0])
def test_a_step_lowers_the_loss(prior: float | None) -> None:
    torch.manual_seed(1)
    small = CONFIGS["ccvpe-small"]
    model = CCVPE(replace(small, spec=replace(small.spec, aerial_size=80))).train()
    loss = CCVPELoss(sigma=2.0)
    size = model.spec.aerial_size
    batch = {
        "ground": torch.randn(2, 3, *model.spec.ground_size),
        "aerial": torch.randn(2, 3, size, size),
        "position": torch.tensor([[40.0, 50.0], [60.0, 30.0]]),
        "heading": torch.tensor([0.02, -0.01]),
    }
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    values = []
    for _ in range(3):
        value = loss(model, batch, prior)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] and math.isfinite(values[-1])


def test_every_model_has_its_authors_loss() -> None:
    assert loss_for(create_model("ccvpe-small")).to_json() == {
        "name": "ccvpe",
        "sigma": 4.0,
        "level_weight": 1e4,
        "orientation_weight": 10.0,
    }
    assert loss_for(create_model("ggcvt-small")).to_json() == {"name": "ggcvt"}


@pytest.mark.slow
@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the published values are not beside the repository")
@pytest.mark.parametrize(
    ("what", "name"), [("student", "ccvpe-vigor-reflect"), ("supervised", "ccvpe-vigor")], ids=str
)
def test_a_training_step_is_the_published_one(what: str, name: str) -> None:
    """Loss and gradients, without drop-connect."""
    expected = np.load(REFERENCE / f"training_{what}-{name}.npz")
    model = copy.deepcopy(reference_model(name, 11)).train()
    for module in model.modules():
        if hasattr(module, "drop_connect_rate"):
            module.drop_connect_rate = 0.0
    grounds, aerials = zip(*(reference_inputs(name, 11 + i) for i in range(2)), strict=True)
    batch = {"ground": torch.cat(grounds), "aerial": torch.cat(aerials)}
    batch |= {key: torch.from_numpy(expected[key]) for key in ("position", "heading")}
    loss = DistillationLoss(2) if what == "student" else CCVPELoss()
    value = loss(model, batch, None)
    value.backward()
    assert value.item() == pytest.approx(float(expected["loss"]), rel=1e-4)
    norms = {key: float(p.grad.norm()) for key, p in model.named_parameters() if p.grad is not None}
    theirs = dict(zip(expected["names"].tolist(), expected["grad_norms"].tolist(), strict=True))
    # Biases before a batch normalisation have no gradient but rounding errors: up to 1e-6 of the largest one.
    rounding = 1e-6 * max(theirs.values())
    assert {key for key, norm in norms.items() if norm} == set(theirs)
    assert {key: norms[key] for key in theirs} == pytest.approx(theirs, rel=1e-3, abs=rounding)
    if what == "supervised":  # its terms, in evaluation of the same forward pass
        features = model.encode_aerial(batch["aerial"])
        maps = model.match(batch["ground"], features, None, orientation=True)
        label = gaussian_label(batch["position"], 512, 4.0)
        bins = bin_weights(batch["heading"], 20)
        terms = [info_nce(scores, label, bins).item() for scores in maps.levels]
        assert terms == pytest.approx(expected["info_nce"].tolist(), rel=1e-4)
        assert cross_entropy(maps.logits, label).item() == pytest.approx(expected["cross_entropy"], rel=1e-4)
        error = orientation_error(maps.orientation, batch["heading"], label).item()
        assert error == pytest.approx(float(expected["orientation"]), rel=1e-4)


def test_drop_connect_drops_residual_blocks_at_the_published_rates() -> None:
    model = create_model("ccvpe-vigor").train()
    torch.manual_seed(0)
    for net in (model.grd_efficientnet, model.sat_efficientnet):
        for number, block in enumerate(net._blocks):
            width = (block._expand_conv if block._expands else block._depthwise_conv).in_channels
            x = torch.rand(1000, width, 2, 2)
            with torch.no_grad():
                out = block(x)
            if out.shape != x.shape:
                continue
            rate = 0.2 * number / 16
            dropped = float((out == x).flatten(1).all(1).float().mean())
            assert abs(dropped - rate) <= 3 * math.sqrt(rate * (1 - rate) / 1000)
            if rate:
                # The kept ones are divided by the rest.
                kept = (out != x).flatten(1).any(1)
                block.drop_connect_rate = 0.0
                with torch.no_grad():
                    plain = block(x)
                torch.testing.assert_close(((out - x) * (1 - rate))[kept], (plain - x)[kept])


def test_uncertain_positions_get_wide_labels() -> None:
    label = gaussian_label(torch.tensor([[16.0, 16.0], [16.0, 16.0]]), 32, torch.tensor([2.0, 8.0]))
    assert float(label[0, 16, 20]) == pytest.approx(math.exp(-0.5 * 2.0**2))
    assert float(label[1, 16, 20]) == pytest.approx(math.exp(-0.5 * 0.5**2))
    torch.manual_seed(0)
    model = create_model("ccvpe-small").eval()
    side, gsd = model.spec.aerial_size, model.spec.gsd
    batch = {
        "ground": torch.randn(2, 3, *model.spec.ground_size),
        "aerial": torch.randn(2, 3, side, side),
        "position": torch.full((2, 2), side / 2.0),
        "heading": torch.zeros(2),
        "meters_per_pixel": torch.full((2,), gsd),
    }
    with torch.no_grad():
        plain = CCVPELoss(2.0)(model, batch, None)
        exact = CCVPELoss(2.0)(model, {**batch, "label_std": torch.full((2,), 0.5 * gsd)}, None)
        wide = CCVPELoss(2.0)(model, {**batch, "label_std": torch.full((2,), 20.0 * gsd)}, None)
        other = CCVPELoss(20.0)(model, batch, None)
        # A known heading has no orientation loss, which alone is weighted by the width.
        same = [
            loss(model, b, 0.0)
            for loss, b in (
                (CCVPELoss(20.0), batch),
                (CCVPELoss(2.0), {**batch, "label_std": torch.full((2,), 20.0 * gsd)}),
            )
        ]
    assert float(exact) == float(plain) != float(wide)
    torch.testing.assert_close(*same)
    # The orientation counts as much as with a narrow label.
    assert abs(float(wide) - float(plain)) < abs(float(other) - float(plain))
