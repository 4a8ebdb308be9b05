"""CCVPE: parity with published and recorded outputs, and behaviour on the small model.

``python test/test_ccvpe.py`` records test/data/ccvpe_expected.npz again; do so only with a model that agrees
with the published outputs.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hashed_models import hash_weights, hashed_model, inputs, uniform
from published import REFERENCE, published_name, reference_inputs, reference_model

from xview_loc.models import MODEL_NAMES, create_model
from xview_loc.models.ccvpe import CCVPE, CONFIGS, AerialFeatures

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "test" / "data" / "ccvpe_expected.npz"
TOLERANCE = 1e-4
ONE_VIGOR = ("ccvpe-vigor", None)
# ccvpe-rig-small is ccvpe-small with other weights.
NAMES = [name for name in MODEL_NAMES if name.startswith("ccvpe-") and name != "ccvpe-rig-small"]
RECORDED_RUNS = [
    # ccvpe-pinhole-small is none of the published code's models.
    *((name, None) for name in NAMES if name != "ccvpe-pinhole-small"),
    ("ccvpe-vigor", 0.0),
    ("ccvpe-vigor", 72.0),
    ("ccvpe-small", 0.0),
]


def outputs(model: CCVPE, ground: torch.Tensor, aerial: torch.Tensor, prior: float | None) -> dict:
    with torch.inference_mode():
        maps = model.match(ground, model.encode_aerial(aerial), prior, orientation=True)
    levels = {f"match{k}": level for k, level in enumerate(maps.levels, start=1)}
    return {**levels, "logits": maps.logits, "orientation": maps.orientation}


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


# Parity with the published code.


def reference_runs() -> list[Path]:
    """Sorted, so that runs of one model follow each other."""
    return sorted(REFERENCE.glob("expected_ccvpe-*.npz"), key=lambda p: (reference_run(p)[0], p.name))


def reference_run(path: Path) -> tuple[str, float | None]:
    name, _, prior = path.stem.removeprefix("expected_").partition("-prior")
    return name, float(prior) if prior else None


@pytest.mark.slow
@pytest.mark.parametrize("path", reference_runs() or [None], ids=lambda p: p.stem if p else "absent")
def test_agrees_with_the_published_code(path: Path | None) -> None:
    if path is None:
        pytest.skip(f"no published outputs in {REFERENCE}")
    name, prior = reference_run(path)
    expected = np.load(path)
    seed = int(expected["seed"])
    model = reference_model(name, seed)
    assert isinstance(model, CCVPE)
    ground, aerial = reference_inputs(name, seed)

    ours = outputs(model, ground, aerial, prior)

    errors = {}
    for key, value in ours.items():
        indices, values = expected[f"{key}_index"], expected[key]
        if key == "match1" and prior is not None:  # recorded with all bins
            every = np.empty(values.size, np.float32)
            every[indices] = values
            kept = model.prior_bins(prior).numpy()
            values = every.reshape(expected["match1_shape"])[:, kept].ravel()
            indices = np.arange(values.size)
        elif f"{key}_shape" in expected:
            assert value.shape == tuple(expected[f"{key}_shape"])
        errors[key] = relative_error(value.numpy().ravel()[indices], values)
    print(path.stem, {key: f"{error:.1e}" for key, error in errors.items()})
    assert max(errors.values()) <= TOLERANCE
    assert int(ours["logits"].argmax()) == int(expected["argmax"])
    assert float(ours["logits"].norm()) == pytest.approx(float(expected["logits_norm"]), rel=TOLERANCE)
    assert float(ours["logits"].flatten().softmax(0).max()) == pytest.approx(
        float(expected["heat_peak"]), rel=TOLERANCE
    )


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("-small")])
def test_state_dict_has_the_published_keys_and_shapes(name: str) -> None:
    path = REFERENCE / f"state_{published_name(name)}.json"
    if not path.exists():
        pytest.skip(f"no published key list {path}")
    with torch.device("meta"):
        state = create_model(name).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == json.loads(path.read_text())


# Parity with what this model computed when it agreed with the published code.


def run_key(name: str, prior: float | None) -> str:
    return name if prior is None else f"{name}-prior{prior:g}"


@pytest.mark.parametrize(
    ("name", "prior"),
    [
        # Full-size models once; their variants and priors are those of the small one.
        pytest.param(*run, marks=pytest.mark.slow if "vigor" in run[0] and run != ONE_VIGOR else ())
        for run in sorted(RECORDED_RUNS, key=str)
    ],
)
def test_agrees_with_the_recorded_outputs(name: str, prior: float | None) -> None:
    recorded = np.load(RECORDED)
    model = hashed_model(name)
    ours = outputs(model, *inputs(model), prior)

    bins = model.spec.bins if prior is None else 2 * int(prior * model.spec.bins / 360) + 1
    size = model.spec.aerial_size
    finest = size // 2
    levels = [value for key, value in ours.items() if key.startswith("match")]
    sides = [finest >> k for k in reversed(range(len(levels)))]
    assert [tuple(level.shape) for level in levels] == [(1, bins, side, side) for side in sides]
    assert sides[0] == (10 if name.endswith("-small") else 8)
    assert ours["logits"].shape == (1, size, size)
    assert ours["orientation"].shape == (1, 2, size, size)
    for key, value in ours.items():
        theirs = recorded[f"{run_key(name, prior)}/{key}"]
        assert relative_error(sample(value), theirs) <= TOLERANCE, key
    assert int(ours["logits"].argmax()) == int(recorded[f"{run_key(name, prior)}/argmax"])


def sample(value: torch.Tensor) -> np.ndarray:
    """Return 256 values, evenly spaced in the whole tensor."""
    flat = value.numpy().ravel()
    return flat[np.linspace(0, flat.size - 1, 256).astype(int)]


def record() -> None:
    arrays: dict[str, np.ndarray] = {}
    for name, prior in sorted(RECORDED_RUNS, key=str):
        model = hashed_model(name)
        ours = outputs(model, *inputs(model), prior)
        for key, value in ours.items():
            arrays[f"{run_key(name, prior)}/{key}"] = sample(value)
        best = ours["logits"].flatten().topk(2)
        # A near tie would make the arg-max depend on the processor's rounding.
        margin = float(best.values[0] - best.values[1]) / float(ours["logits"].std())
        print(run_key(name, prior), f"arg-max margin {margin:.1e} of the logits' deviation")
        arrays[f"{run_key(name, prior)}/argmax"] = best.indices[0].numpy()
    RECORDED.parent.mkdir(exist_ok=True)
    np.savez_compressed(RECORDED, **arrays)
    print(RECORDED, RECORDED.stat().st_size, "bytes")


# Behaviour, on the small model of the same class.


@pytest.fixture
def small() -> CCVPE:
    return hashed_model("ccvpe-small")


@torch.inference_mode()
def test_batches_agree_with_single_images_and_broadcast(small: CCVPE) -> None:
    ground, aerial = inputs(small)
    grounds = torch.cat([ground, ground.roll(100, 3), ground.flip(2)])
    aerials = torch.cat([aerial, aerial.flip(2), aerial.flip(3)])

    def check(batch_g: torch.Tensor, batch_a: torch.Tensor) -> None:
        together = small.match(batch_g, small.encode_aerial(batch_a), 45, orientation=True)
        for i in range(3):
            one = small.match(
                batch_g[min(i, len(batch_g) - 1)][None],
                small.encode_aerial(batch_a[min(i, len(batch_a) - 1)][None]),
                45,
                orientation=True,
            )
            torch.testing.assert_close(together.logits[i], one.logits[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(together.orientation[i], one.orientation[0], rtol=1e-3, atol=1e-3)
            for many, single in zip(together.levels, one.levels, strict=True):
                torch.testing.assert_close(many[i], single[0], rtol=1e-4, atol=1e-4)

    check(grounds, aerials)
    check(grounds, aerials[:1])
    check(grounds[:1], aerials)


@torch.inference_mode()
def test_known_heading_scores_the_bins_of_the_prior(small: CCVPE) -> None:
    ground, aerial = inputs(small)
    features = small.encode_aerial(aerial)
    every = small.match(ground, features).levels[0]
    known = small.match(ground, features, 0).levels[0]
    near = small.match(ground, features, 50).levels[0]
    torch.testing.assert_close(known, every[:, :1])
    torch.testing.assert_close(near, every[:, [14, 15, 0, 1, 2]])
    # Wide enough for all bins: each once, from bin 0.
    torch.testing.assert_close(small.match(ground, features, 180).levels[0], every)


@torch.inference_mode()
def test_turning_the_panorama_turns_the_bins(small: CCVPE) -> None:
    ground, aerial = inputs(small)
    features = small.encode_aerial(aerial)
    step = ground.shape[3] // small.spec.bins
    before = small.match(ground, features)
    # A vehicle turned counter-clockwise by one bin sees everything one bin further right; bins count down.
    after = small.match(ground.roll(step, 3), features)
    for level, (a, b) in enumerate(zip(before.levels, after.levels, strict=True)):
        torch.testing.assert_close(b, a.roll(-1, 1), rtol=1e-3, atol=1e-4, msg=f"level {level}")
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_scores_are_cosines_of_the_turned_descriptor() -> None:
    # The pinhole model compares only a window of the channels, which wraps around.
    with torch.device("meta"):
        model = CCVPE(CONFIGS["ccvpe-kitti"])
    x = F.normalize(torch.from_numpy(uniform("x", (2, 512, 4, 4))), dim=1)
    descriptor = F.normalize(torch.from_numpy(uniform("d", (2, 256))), dim=1)
    scores = model._scores(1, x, descriptor, model.prior_bins(None))
    for bin_index in range(16):
        window = x.roll(-64 * bin_index, 1)[:, :256]
        cosine = F.cosine_similarity(window, descriptor[:, :, None, None], dim=1)
        torch.testing.assert_close(scores[:, bin_index], cosine)


@torch.inference_mode()
def test_orientation_is_a_unit_field_and_only_on_request(small: CCVPE) -> None:
    ground, aerial = inputs(small)
    features = small.encode_aerial(aerial)
    without = small.match(ground, features, 0)
    asked = small.match(ground, features, 0, orientation=True)
    assert without.orientation is None
    assert asked.orientation is not None
    torch.testing.assert_close(asked.orientation.norm(dim=1), torch.ones(1, 160, 160))
    torch.testing.assert_close(asked.logits, without.logits, rtol=0, atol=0)


@pytest.mark.parametrize(("padding", "prior"), [("reflect", 0.0), ("reflect", None), ("zeros", 0.0)])
def test_precomputing_a_tile_changes_nothing(
    padding: Literal["reflect", "zeros"], prior: float | None
) -> None:
    model = CCVPE(replace(CONFIGS["ccvpe-small"], padding=padding))
    model = hash_weights(model).eval()
    ground, aerial = inputs(model)
    with torch.inference_mode():
        features = model.encode_aerial(aerial)
        plain = model.match(ground, features, prior, orientation=True)
        ours = model.match(ground, model.precompute(features, orientation=True), prior, orientation=True)
        # The orientation decoder's share is not precomputed.
        half = model.match(ground, model.precompute(features), prior, orientation=True)
    assert int(ours.logits.argmax()) == int(plain.logits.argmax())
    for maps in (ours, half):
        assert relative_error(maps.logits.numpy(), plain.logits.numpy()) < 1e-5
        assert relative_error(maps.orientation.numpy(), plain.orientation.numpy()) < 1e-5
        for a, b in zip(maps.levels, plain.levels, strict=True):
            assert relative_error(a.numpy(), b.numpy()) < 1e-5


def test_precomputed_features_follow_the_weights_and_fit_any_batch() -> None:
    model = hashed_model("ccvpe-small").eval()
    ground, aerial = inputs(model)
    grounds = torch.cat([ground, ground.flip(3)])
    with torch.inference_mode():
        features = model.encode_aerial(aerial)
        first = model.match(grounds, model.precompute(features), 0.0).logits
        assert relative_error(first.numpy(), model.match(grounds, features, 0.0).logits.numpy()) < 1e-5
    with torch.no_grad():
        model.deconv2.weight += 0.1
    with torch.inference_mode():
        second = model.match(grounds, model.precompute(features), 0.0).logits
        assert relative_error(second.numpy(), model.match(grounds, features, 0.0).logits.numpy()) < 1e-5
    assert relative_error(second.numpy(), first.numpy()) > 1e-3


def test_every_weight_receives_a_gradient() -> None:
    model = create_model("ccvpe-small").train()
    assert isinstance(model, CCVPE)
    ground, aerial = inputs(model)
    grounds = torch.cat([ground, ground.roll(200, 3)])
    maps = model.match(grounds, model.encode_aerial(aerial.expand(2, -1, -1, -1)), orientation=True)
    assert maps.orientation is not None
    loss = F.cross_entropy(maps.logits.flatten(1), torch.tensor([5, 20000]))
    loss = loss + sum(level.logsumexp((1, 2, 3)).mean() for level in maps.levels)
    (loss + maps.orientation[:, 0].mean()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    assert model.grd_efficientnet._conv_stem.weight.grad.abs().max() > 0
    assert model.sat_efficientnet._conv_stem.weight.grad.abs().max() > 0


def test_gradients_stay_finite_where_features_vanish(small: CCVPE) -> None:
    ground, aerial = inputs(small)
    with torch.no_grad():
        features = small.encode_aerial(aerial)
        skips = tuple(torch.zeros_like(skip) for skip in features.skips)
    zero = torch.zeros_like(features.descriptors, requires_grad=True)
    maps = small.match(ground, AerialFeatures(zero, skips))
    maps.logits.sum().backward()
    assert maps.logits.isfinite().all()
    assert zero.grad is not None and zero.grad.isfinite().all()


@torch.inference_mode()
def test_half_precision_stays_close(small: CCVPE) -> None:
    ground, aerial = inputs(small)
    full = small.match(ground, small.encode_aerial(aerial))
    with torch.autocast("cpu", torch.bfloat16):
        half = small.match(ground, small.encode_aerial(aerial))
    assert relative_error(half.levels[0].float().numpy(), full.levels[0].numpy()) < 0.1
    assert relative_error(half.logits.float().numpy(), full.logits.numpy()) < 0.1


def test_small_model_is_small(small: CCVPE) -> None:
    assert sum(value.numel() for value in small.state_dict().values()) <= 1_500_000


def test_unusable_arguments_are_named(small: CCVPE) -> None:
    ground, aerial = inputs(small)
    with pytest.raises(ValueError, match=r"aerial images must have shape \(batch, 3, 160, 160\)"):
        small.encode_aerial(aerial[..., :128])
    with torch.no_grad():
        features = small.encode_aerial(aerial)
    with pytest.raises(ValueError, match=r"ground images must have shape \(batch, 3, 64, 256\)"):
        small.match(ground[..., :128], features)
    for prior in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="heading prior"):
            small.match(ground, features, prior)
    with pytest.raises(ValueError, match="ccvpe-small"):
        create_model("ccvpe-large")


if __name__ == "__main__":
    record()


@pytest.mark.parametrize("name", ["ccvpe-small", "ccvpe-pinhole-small"])
def test_half_precision_on_a_kept_tile(name: str) -> None:
    """As a node with precision bfloat16 runs it."""
    torch.manual_seed(0)
    model = create_model(name).to(torch.bfloat16)
    spec = model.spec
    ground = torch.rand(1, 3, *spec.ground_size, dtype=torch.bfloat16)
    aerial = torch.rand(1, 3, spec.aerial_size, spec.aerial_size, dtype=torch.bfloat16)
    with torch.inference_mode():
        maps = model.match(ground, model.precompute(model.encode_aerial(aerial)), spec.matching_prior(0.0))
    assert maps.logits.dtype == torch.bfloat16 and bool(maps.logits.isfinite().all())
