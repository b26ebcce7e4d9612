"""PSNR against hand computations."""

import math

import pytest
import torch

from secateur.core.errors import DataError
from secateur.measure.psnr import luma, psnr


def test_luma_of_plain_colours():
    colours = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).T.reshape(3, 1, 5)
    expected = [16, 16 + 65.481 + 128.553 + 24.966, 81.481, 144.553, 40.966]
    assert luma(colours).flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_a_known_error():
    target = torch.full((1, 3, 8, 8), 100 / 255)
    output = target.clone()
    output[:, 1] = 110 / 255  # green off by 10 of 255: luma off by 128.553 * 10 / 255
    expected = 20 * math.log10(255 / (128.553 * 10 / 255))
    assert psnr(output, target, 2).tolist() == pytest.approx([expected])


def test_the_border_is_left_out_on_every_side():
    target = torch.full((1, 3, 8, 8), 0.5)
    output = target.clone()
    output[..., :2, :] = output[..., -2:, :] = 1.0
    output[..., :2] = output[..., -2:] = 0.0
    assert psnr(output, target, 2).tolist() == [math.inf]
    assert psnr(output, target, 1)[0] < 30


def test_values_are_cut_off_and_rounded_to_bytes():
    target = torch.zeros(1, 3, 6, 6)
    assert psnr(target - 5, target, 0).tolist() == [math.inf]
    assert psnr(target + 0.4 / 255, target, 0).tolist() == [math.inf]
    off = 0.4 / 255 * (65.481 + 128.553 + 24.966)
    assert psnr(target + 0.4 / 255, target, 0, rounded=False).tolist() == pytest.approx([20 * math.log10(255 / off)])
    assert psnr(target + 0.6 / 255, target, 0).tolist() == pytest.approx([20 * math.log10(255 / (219 / 255))])


def test_images_are_measured_one_by_one():
    torch.manual_seed(0)
    target, output = torch.rand(3, 3, 9, 9), torch.rand(3, 3, 9, 9)
    one_by_one = [psnr(output[i : i + 1], target[i : i + 1], 1).item() for i in range(3)]
    assert psnr(output, target, 1).tolist() == pytest.approx(one_by_one)
    rgb = 10 * math.log10(1 / (output[0] - target[0]).square().mean())
    assert abs(one_by_one[0] - rgb) > 1  # figures on RGB are other figures


@pytest.mark.parametrize(
    ("output", "target", "border", "words"),
    [
        ((1, 3, 8, 8), (1, 3, 8, 9), 0, "cannot be compared"),
        ((1, 3, 8, 8), (1, 3, 8, 8), 4, "leaves nothing"),
        ((1, 1, 8, 8), (1, 1, 8, 8), 0, "3 channels"),
    ],
)
def test_bad_input_is_refused(output, target, border, words):
    with pytest.raises(DataError, match=words):
        psnr(torch.rand(output), torch.rand(target), border)
