import re

import pytest
import torch

from secateur import zoo
from secateur.core.errors import DataError
from secateur.data.dataset import DataKind
from secateur.data.skills import unbalanced
from secateur.zoo.text import corpus, held_out_text, random_windows, tokens, training_text


def rows(tensor):
    return [tuple(row) for row in tensor.flatten(1).tolist()]


def test_digits_split_is_complete_stratified_and_scaled():
    from sklearn.datasets import load_digits

    splits = zoo.load_data("zoo:digits")
    train, test = splits.calibration, splits.evaluation
    assert (train.inputs.shape, test.inputs.shape) == ((1347, 1, 8, 8), (450, 1, 8, 8))
    assert train.kind is DataKind.IMAGE
    assert train.inputs.dtype == torch.float32
    assert train.targets.dtype == torch.int64
    both = rows(torch.cat([train.inputs, test.inputs]))
    original = [tuple(image / 16) for image in load_digits().data]
    assert sorted(both) == sorted(original)  # nothing lost, nothing twice, pixel / 16
    shares = torch.bincount(test.targets).double() / torch.bincount(torch.cat([train.targets, test.targets]))
    assert (shares - 450 / 1797).abs().max() < 0.01


def test_digits_keep_their_labels():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    label = {tuple(image / 16): target for image, target in zip(bunch.data, bunch.target, strict=True)}
    test = zoo.load_data("digits").evaluation
    assert [label[row] for row in rows(test.inputs)] == test.targets.tolist()


def test_drawn_digits_depend_on_the_seed_and_evaluation_does_not():
    first, again, other = (zoo.load_data("digits", seed=seed, samples=32) for seed in (0, 0, 1))
    assert len(first.calibration) == 32
    assert first.calibration.digest == again.calibration.digest != other.calibration.digest
    assert first.evaluation.digest == other.evaluation.digest


def test_text_is_ascii_and_split_at_nine_tenths():
    text = corpus()
    assert text.isascii()
    assert training_text() + held_out_text() == text
    assert len(training_text()) == len(text) * 9 // 10
    assert "\n\n" in text


def test_evaluation_windows_are_the_start_of_the_held_out_text():
    data = zoo.load_data("pydoc").evaluation
    assert data.inputs.shape == (160, 96)
    assert data.kind is DataKind.TEXT
    assert bytes(data.inputs.flatten().tolist()).decode() == held_out_text()[: 160 * 96]


def test_calibration_windows_come_from_the_training_text():
    first, again, other = (zoo.load_data("zoo:pydoc", seed=seed) for seed in (0, 0, 1))
    assert first.calibration.inputs.shape == (64, 96)
    assert all(bytes(row).decode() in training_text() for row in first.calibration.inputs.tolist())
    assert first.calibration.digest == again.calibration.digest != other.calibration.digest


def test_skill_windows_are_lines_of_all_kinds_and_evaluation_is_fixed():
    first, again, other = (zoo.load_data("skills", seed=seed) for seed in (0, 0, 1))
    assert first.calibration.digest == again.calibration.digest != other.calibration.digest
    assert first.evaluation.digest == other.evaluation.digest
    assert (first.calibration.inputs.shape, first.evaluation.inputs.shape) == ((64, 96), (160, 96))
    lines = [line for row in first.evaluation.inputs.tolist() for line in bytes(row).decode().split("\n")[:-1]]
    arithmetic, brackets, copies, sentences = (
        [line for line in lines if re.match(pattern, line)]
        for pattern in (r"\d", r"[(\[{]", r"([a-z]+)>\1$", r"\w+ \w+ the")
    )
    assert len(arithmetic) + len(brackets) + len(copies) + len(sentences) == len(lines)
    assert len(arithmetic) / len(lines) == pytest.approx(0.4, abs=0.1)
    assert len(brackets) / len(lines) == pytest.approx(0.25, abs=0.1)
    assert not any(unbalanced(line) for line in brackets)
    assert zoo.load_data("skills", samples=3, length=20).calibration.inputs.shape == (3, 20)
    with pytest.raises(DataError, match="got length=1"):
        zoo.load_data("skills", length=1)


def test_samples_and_length_are_obeyed():
    splits = zoo.load_data("pydoc", samples=5, length=300)
    assert splits.calibration.inputs.shape == (5, 300)
    assert splits.evaluation.inputs.shape == (len(held_out_text()) // 300, 300)


def test_random_windows_reach_both_ends():
    windows = random_windows(torch.arange(6), 200, 5, torch.Generator().manual_seed(0))
    assert sorted(set(rows(windows))) == [(0, 1, 2, 3, 4), (1, 2, 3, 4, 5)]


def test_tokens_are_codes():
    assert tokens("A\n~").tolist() == [65, 10, 126]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "pydoc", "length": 10**6}, r"2 to \d+ tokens, got length=1000000"),
        ({"name": "pydoc", "length": 1}, r"got length=1"),
        ({"name": "digits", "length": 96}, "leave it out"),
        ({"name": "digits", "samples": 0}, "at least 1 calibration sample, got 0"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        zoo.load_data(**arguments)
