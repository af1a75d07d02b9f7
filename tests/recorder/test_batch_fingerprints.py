"""Batches are told apart by a sample of their values."""

from __future__ import annotations

import pytest
import torch

from trainlint.recorder.dataloaders import fingerprint


@pytest.mark.parametrize("size", [32, 64, 100, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_images_with_an_empty_border(size: int, dtype: torch.dtype) -> None:
    def batch(seed: int) -> torch.Tensor:
        images = torch.zeros(size, 1, 28, 28)
        images[:, :, 4:24, 4:24] = torch.rand(size, 1, 20, 20, generator=torch.Generator().manual_seed(seed)) * 255
        return images.to(dtype)

    assert fingerprint(batch(0)) == fingerprint(batch(0)) is not None
    assert fingerprint(batch(0)) != fingerprint(batch(1))


def test_one_value_proves_nothing() -> None:
    assert fingerprint(torch.ones(8, 16)) is None
    assert fingerprint(torch.zeros(64, 10_000)) is None
    assert fingerprint(torch.tensor([3])) is not None
