"""Images: exact numbers, which rows are read, how they are divided, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from data_samples import colour, encoded, grey
from hypothesis import given
from hypothesis import strategies as st

from secateur.core.errors import DataError, MissingExtraError, SecateurError
from secateur.data.dataset import DataKind
from secateur.data.images import Encoded, ImageOptions, ImageSource, image_splits, load_images, scale


@dataclass
class Shelf:
    """Images in a list, and a record of the rows that were asked for."""

    images: list[bytes]
    labels: list[object] | None = None
    asked: list[int] = field(default_factory=list)

    def read(self, rows: Sequence[int]) -> Iterator[Encoded]:
        assert list(rows) == sorted(rows)
        for row in rows:
            self.asked.append(row)
            yield Encoded(f"image {row}", self.images[row], row % 3 if self.labels is None else self.labels[row])

    def source(self, classes: tuple[str, ...] = ("a", "b", "c")) -> ImageSource:
        return ImageSource("shelf", len(self.images), classes, self.read)


def load(images: list[bytes], options: ImageOptions | None = None, labels: list[object] | None = None) -> torch.Tensor:
    source = Shelf(images, labels).source()
    return load_images(source, torch.arange(len(images)), options or ImageOptions()).inputs


def test_colour_pixels_become_channels_first_in_zero_to_one() -> None:
    images = load([colour(0), colour(255, 4, 4)])
    assert images.shape == (2, 3, 4, 4)
    assert images.dtype == torch.float32
    assert images.is_contiguous()
    assert images[0, :, 0, 0].tolist() == pytest.approx([0, 1, 7 / 255])
    assert images[1, :, 3, 3].tolist() == pytest.approx([1, 0, 7 / 255])


def test_rows_and_columns_are_not_swapped() -> None:
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert torch.equal(load([encoded(pixels)])[0, 0] * 255, torch.arange(6.0).view(2, 3))


def test_mean_and_std_per_channel_and_for_all() -> None:
    options = ImageOptions(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 2.0))
    assert load([colour(255)], options)[0, :, 0, 0].tolist() == pytest.approx([1, -1, 7 / 510])
    assert load([grey(51)], ImageOptions(mean=(0.1,), std=(0.5,)))[0, 0, 0, 0].item() == pytest.approx(0.2)
    with pytest.raises(DataError, match=r"mean has 2 values but the images have 3 channel"):
        load([colour(255)], ImageOptions(mean=(0.5, 0.5)))


def test_scale_keeps_the_pixels_it_was_given() -> None:
    pixels = torch.full((1, 2, 2, 1), 51, dtype=torch.uint8)
    scale(pixels, ImageOptions(mean=(0.5,)))
    assert pixels.unique().tolist() == [51]


def test_channels_by_option() -> None:
    assert load([grey(51)], ImageOptions(channels=3))[0, :, 0, 0].tolist() == pytest.approx([0.2] * 3)
    red = load([colour(255)], ImageOptions(channels=1))
    assert red.shape == (1, 1, 4, 4)
    assert red[0, 0, 0, 0].item() == pytest.approx((0.299 * 255 + 0.114 * 7) / 255, abs=1 / 255)


def test_a_grey_image_among_colour_ones_is_repeated_but_colour_is_never_lost_unasked() -> None:
    assert load([colour(9), grey(51)])[1, :, 0, 0].tolist() == pytest.approx([0.2] * 3)
    with pytest.raises(DataError, match="image 1 is in colour, the images before it are grey"):
        load([grey(51), colour(9)])
    assert load([grey(51), colour(9)], ImageOptions(channels=1)).shape == (2, 1, 4, 4)


def test_other_sizes_name_the_first_offender_unless_resized() -> None:
    images = [grey(1), grey(2), grey(3, 5, 6), grey(4, 7, 7)]
    with pytest.raises(DataError, match=r"image 2 has 5x6 pixels, the images before it 4x4; .*\?size=4"):
        load(images)
    assert load(images, ImageOptions(size=3)).shape == (4, 1, 3, 3)


def test_resize_is_bilinear() -> None:
    step = np.zeros((2, 2), dtype=np.uint8)
    step[:, 1] = 200
    resized = load([encoded(step)], ImageOptions(size=4))[0, 0] * 255
    # centres of the four pixels lie at -0.25, 0.25, 0.75, 1.25 between the two: weights 0, 1/4, 3/4, 1
    assert torch.allclose(resized, torch.tensor([0.0, 50, 150, 200]).expand(4, 4), atol=1)


def test_sixteen_bit_images_are_refused() -> None:
    deep = encoded(np.full((4, 4), 40_000, dtype=np.uint16))
    with pytest.raises(DataError, match="image 0 has more than 8 bits per channel"):
        load([deep])


def test_damaged_images_are_named() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    with pytest.raises(DataError, match="image 1 is not a readable image"):
        load([encoded(noise), encoded(noise, "JPEG")[:200]])
    with pytest.raises(DataError, match=r"image 0 is not a readable image: of no format that Pillow knows$"):
        load([b"no image"])


@given(st.sampled_from(["PNG", "JPEG"]), st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1))
def test_whatever_the_damage_the_error_is_ours(kind: str, damage: list[tuple[int, int]]) -> None:
    content = bytearray(encoded(np.arange(192, dtype=np.uint8).reshape(8, 8, 3), kind))
    for place, value in damage:
        content[place % len(content)] = value
    try:
        images = load([bytes(content)])
    except SecateurError:
        return
    assert images.isfinite().all()


@pytest.mark.parametrize("label", [3, -1, "cat", None, 1.5, True])
def test_labels_that_are_no_class_are_refused(label: object) -> None:
    with pytest.raises(DataError, match=r"image 1 has the label .*class indices"):
        load([grey(1), grey(2)], labels=[0, label])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"size": 0}, "size must be 1 pixel or more"),
        ({"channels": 2}, "1 or 3 channels"),
        ({"std": (0.0,)}, "std of images must be above 0"),
        ({"std": (float("nan"),)}, "std of images must be above 0"),
        ({"mean": (float("inf"),)}, "mean of images must be finite"),
    ],
)
def test_senseless_options_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageOptions(**wrong)  # type: ignore[arg-type]


def test_images_come_in_the_order_asked_for() -> None:
    shelf = Shelf([grey(10 * i) for i in range(8)])
    rows = torch.tensor([5, 0, 7, 2])
    dataset = load_images(shelf.source(), rows, ImageOptions())
    assert (dataset.inputs[:, 0, 0, 0] * 255).round().tolist() == [50, 0, 70, 20]
    assert dataset.targets is not None
    assert dataset.targets.tolist() == [2, 0, 1, 2]
    assert shelf.asked == [0, 2, 5, 7]
    assert dataset.kind is DataKind.IMAGE
    assert dataset.classes == ("a", "b", "c")


def values(dataset: object) -> list[int]:
    return [round(value * 255) for value in dataset.inputs[:, 0, 0, 0].tolist()]  # type: ignore[attr-defined]


def test_a_single_source_is_divided_four_to_one_the_same_for_every_seed() -> None:
    images = [grey(i) for i in range(100)]
    first, second = (image_splits(Shelf(images).source(), None, ImageOptions(), seed) for seed in (0, 1))
    assert len(first.calibration) == 80
    assert sorted(values(first.calibration) + values(first.evaluation)) == list(range(100))
    assert values(first.evaluation) == values(second.evaluation)
    assert values(first.evaluation) != list(range(80, 100))
    assert values(first.calibration) != values(second.calibration)
    assert values(first.calibration) != sorted(values(first.calibration))
    again = image_splits(Shelf(images).source(), None, ImageOptions(), 1)
    assert again.calibration.digest == second.calibration.digest


def test_only_the_drawn_images_are_read() -> None:
    shelf = Shelf([grey(i) for i in range(200)])
    splits = image_splits(shelf.source(), None, ImageOptions(), 0, limit=20)
    assert (len(splits.calibration), len(splits.evaluation)) == (16, 4)
    assert len(shelf.asked) == len(set(shelf.asked)) == 20
    shelf.asked.clear()
    image_splits(shelf.source(), None, ImageOptions(), 0, samples=3, limit=20)
    assert len(shelf.asked) == 7


def test_two_sources_give_one_split_each() -> None:
    train, test = Shelf([grey(i) for i in range(50)]), Shelf([grey(100 + i) for i in range(30)])
    splits = image_splits(train.source(), test.source(), ImageOptions(), 0, samples=10)
    assert len(splits.calibration) == len(train.asked) == 10
    assert values(splits.evaluation) == list(range(100, 130))
    limited = [image_splits(train.source(), test.source(), ImageOptions(), seed, limit=8) for seed in (0, 1)]
    assert [len(part.calibration) for part in limited] == [8, 8]
    assert values(limited[0].evaluation) == values(limited[1].evaluation) != list(range(100, 108))
    assert set(values(limited[0].evaluation)) <= set(range(100, 130))


def test_two_sources_must_agree() -> None:
    train = Shelf([grey(1)] * 3).source()
    with pytest.raises(DataError, match="image 0 has 5x5 pixels, the images before it 4x4"):
        image_splits(train, Shelf([grey(1, 5, 5)] * 3).source(), ImageOptions(), 0)
    with pytest.raises(DataError, match="image 0 is in colour"):
        image_splits(train, Shelf([colour(1)] * 3).source(), ImageOptions(), 0)
    with pytest.raises(DataError, match="do not name the same classes"):
        image_splits(train, Shelf([grey(1)] * 3).source(("c", "b", "a")), ImageOptions(), 0)


def test_grey_evaluation_images_follow_colour_calibration_images() -> None:
    splits = image_splits(Shelf([colour(1)] * 3).source(), Shelf([grey(51)] * 3).source(), ImageOptions(), 0)
    assert splits.evaluation.inputs.shape == (3, 3, 4, 4)


def test_too_few_images_to_divide() -> None:
    with pytest.raises(DataError, match=r"'shelf' gives 1 image"):
        image_splits(Shelf([grey(1)]).source(), None, ImageOptions(), 0)
    with pytest.raises(DataError, match=r"'shelf' gives 1 image"):
        image_splits(Shelf([grey(1)] * 9).source(), None, ImageOptions(), 0, limit=1)
    with pytest.raises(DataError, match="'shelf' holds no images"):
        image_splits(Shelf([]).source(), Shelf([grey(1)]).source(), ImageOptions(), 0)
    smallest = image_splits(Shelf([grey(1), grey(2)]).source(), None, ImageOptions(), 0)
    assert sorted(values(smallest.calibration) + values(smallest.evaluation)) == [1, 2]


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"reading images needs the package 'pillow': .*secateur\[data\]"):
        load([b""])
