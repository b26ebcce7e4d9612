from dataclasses import replace

import pytest
import torch
from torch import nn

from secateur import zoo
from secateur.core.errors import SettingsError
from secateur.zoo.catalogue import Recipe
from secateur.zoo.grading import quality
from secateur.zoo.training import image_batches, make_optimizer, rate_at, shifted, text_batches


def test_rate_rises_and_falls_as_computed_by_hand():
    recipe = Recipe("sgd", steps=12, batch=1, rate=1.0, warmup=4, floor=0.2)
    assert [rate_at(step, recipe) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate_at(4, recipe) == pytest.approx(1.0)
    assert rate_at(8, recipe) == pytest.approx(0.6)  # half-way: the mean of peak and floor
    assert rate_at(12, recipe) == pytest.approx(0.2)


def test_shift_moves_whole_images():
    image = torch.zeros(200, 1, 5, 5)
    image[:, 0, 2, 2] = 1
    moved = shifted(image, 1, torch.Generator().manual_seed(0))
    spots = moved[:, 0].flatten(1).argmax(1)
    assert (moved.sum((1, 2, 3)) == 1).all()
    assert set(spots.tolist()) == {row * 5 + column for row in (1, 2, 3) for column in (1, 2, 3)}


def test_shift_of_nothing_changes_nothing():
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(shifted(images, 0, torch.Generator()), images)


def test_an_epoch_shows_every_image_once():
    recipe = replace(zoo.get("digits-mlp").recipe, batch=449)  # 1347 = 3 * 449
    batches = image_batches(recipe, 0)
    epoch = torch.cat([next(batches).args[0] for _ in range(3)]).flatten(1)
    train = zoo.load_data("digits").calibration.inputs.flatten(1)
    assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, train.tolist()))


def test_text_batches_have_the_recipe_s_shape():
    batch = next(text_batches(zoo.get("pydoc-llama").recipe, 0))
    assert batch.args[0].shape == (12, 96)
    assert batch.target is None


def test_unknown_optimizer_is_refused():
    with pytest.raises(SettingsError, match="not with 'lion'"):
        make_optimizer(nn.Linear(1, 1), Recipe("lion", 1, 1, 0.1))


def test_perplexity_of_a_uniform_model_is_the_vocabulary():
    class Uniform(nn.Module):
        def forward(self, ids):
            return torch.zeros(*ids.shape, 128)

    measured = quality(Uniform(), zoo.load_data("pydoc").evaluation)
    assert measured["perplexity"] == pytest.approx(128, rel=1e-5)


def test_accuracy_of_a_constant_model_is_the_class_share():
    class Three(nn.Module):
        def forward(self, images):
            return torch.eye(10)[3].expand(len(images), 10)

    data = zoo.load_data("digits").evaluation
    assert quality(Three(), data)["accuracy"] == pytest.approx(int((data.targets == 3).sum()) / 450)
