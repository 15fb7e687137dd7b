"""Augmentation: each change alone does what its name says."""

from __future__ import annotations

import pytest
import torch

from emrrg_cli.models.augment import augmented
from emrrg_cli.recipe.common import AugmentSettings

SIZE = 32


def _square(n: int = 1) -> torch.Tensor:
    images = torch.full((n, SIZE, SIZE), 20, dtype=torch.uint8)
    images[:, 12:20, 12:20] = 220
    return images


def _draw(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Every amount at a share of its most, -1 to 1."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, (value + 1) / 2))


def test_without_settings_images_are_unchanged() -> None:
    state = torch.get_rng_state()
    images = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(augmented(images, AugmentSettings()), images.float())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shift_moves_the_image_and_fills_with_black(monkeypatch: pytest.MonkeyPatch) -> None:
    _draw(monkeypatch, 1.0)
    moved = augmented(_square(), AugmentSettings(shift=0.25))[0]
    assert torch.allclose(moved[: SIZE - 8, : SIZE - 8], _square()[0].float()[8:, 8:], atol=1e-3)
    assert moved[-7:].abs().max() < 1e-3


def test_a_turn_by_a_right_angle_is_that_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    _draw(monkeypatch, 1.0)
    image = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)
    image[0, 4:8, 10:30] = 200
    once = augmented(image, AugmentSettings(rotate=45.0))
    _draw(monkeypatch, -1.0)
    back = augmented(image, AugmentSettings(rotate=45.0))
    assert not torch.allclose(once, back, atol=50)
    assert once.sum() == pytest.approx(float(image.sum()), rel=0.2)  # turned, not scaled
    # The two turns mirror each other where the image does.
    cross = torch.zeros(1, SIZE, SIZE, dtype=torch.uint8)
    cross[0, 4:28, 14:18] = 200
    left = augmented(cross, AugmentSettings(rotate=30.0))
    _draw(monkeypatch, 1.0)
    assert torch.allclose(augmented(cross, AugmentSettings(rotate=30.0)), left.flip(2), atol=1.0)


@pytest.mark.parametrize(("value", "side"), [(1.0, 12), (-1.0, 4)])
def test_scale_enlarges_and_shrinks(monkeypatch: pytest.MonkeyPatch, value: float, side: int) -> None:
    _draw(monkeypatch, value)
    scaled = augmented(_square(), AugmentSettings(scale=0.5))[0]
    assert int((scaled[SIZE // 2] > 120).sum()) == side


def test_brightness_and_contrast_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    _draw(monkeypatch, 1.0)
    image = _square().float()
    assert torch.allclose(augmented(_square(), AugmentSettings(brightness=0.1)), (image + 25.5).clamp(0, 255))
    middle = image.mean()
    expected = ((image - middle) * 1.2 + middle).clamp(0, 255)
    assert torch.allclose(augmented(_square(), AugmentSettings(contrast=0.2)), expected, atol=1e-3)


def test_each_image_gets_its_own_changes() -> None:
    torch.manual_seed(3)
    settings = AugmentSettings(rotate=5, shift=0.05, scale=0.1, brightness=0.1, contrast=0.1)
    first = augmented(_square(4), settings)
    assert all(not torch.equal(first[0], other) for other in first[1:])
    assert 0 <= float(first.min()) <= float(first.max()) <= 255
    torch.manual_seed(3)
    assert torch.equal(augmented(_square(4), settings), first)


def test_bf16_autocast_changes_no_position() -> None:
    images = torch.randint(0, 256, (2, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    settings = AugmentSettings(rotate=5, shift=0.05, scale=0.1)
    torch.manual_seed(3)
    expected = augmented(images, settings)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augmented(images, settings), expected)
