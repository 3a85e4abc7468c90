"""sana15.model.autoencoder: ranges, shapes, errors, and a round trip through a folder."""

import pytest
import torch
from helpers import rand

from sana15.model.autoencoder import MINI_SIZES, Autoencoder


@pytest.fixture(scope="module")
def mini():
    torch.manual_seed(0)
    return Autoencoder.build(MINI_SIZES | {"scaling_factor": 0.5}).eval()


@torch.no_grad()
def test_shapes_and_scaling(mini):
    pictures = rand(0, 2, 3, 64, 48).float().clamp(-1, 1)
    latents = mini.encode(pictures)
    assert mini.factor == 8
    assert latents.shape == (2, mini.channels, 8, 6)
    torch.testing.assert_close(latents, mini.model.encode(pictures).latent * 0.5)
    assert mini.decode(latents).shape == pictures.shape
    torch.testing.assert_close(mini(pictures), mini.model(pictures).sample)


def test_save_and_load(mini, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no autoencoder"):
        Autoencoder.load(tmp_path)
    mini.model.save_pretrained(tmp_path)
    loaded = Autoencoder.load(tmp_path)
    pictures = rand(1, 1, 3, 16, 16).float()
    with torch.no_grad():
        assert torch.equal(loaded(pictures), mini(pictures))


@pytest.mark.parametrize("shape", [(1, 3, 60, 64), (1, 1, 64, 64), (3, 64, 64)], ids=str)
def test_bad_pictures(mini, shape):
    with pytest.raises(ValueError, match="pictures must be"):
        mini.encode(torch.zeros(shape))


def test_bad_latents(mini):
    with pytest.raises(ValueError, match="latents must be"):
        mini.decode(torch.zeros(1, 4, 8, 8))
