"""Labels by the names of the head's classes, and labels that the head does not have."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.core.errors import DataError
from secateur.core.method import Batch
from secateur.data.batches import label_loss, loss_of
from secateur.data.dataset import DataKind, Dataset, Splits
from secateur.io import labels as io_labels
from secateur.io.labels import as_the_head_has_them
from secateur.measure.quality import accuracy


def images(classes=(), labels=(0, 1, 0)):
    return Dataset("photos", DataKind.IMAGE, torch.rand(len(labels), 1, 2, 2), torch.tensor(labels), classes)


def refuse_other_classes(data, model):
    """Wherever the labels are: in what is trained on or in what is measured on."""
    fine = images()
    for splits in (Splits(data, fine), Splits(fine, data)):
        io_labels.refuse_other_classes(splits, model)


def without_weights(model, classes):
    found = nn.Linear(4, 3, device="meta")
    if hasattr(model, "config"):
        found.config = SimpleNamespace(id2label=model.config.id2label, num_labels=classes)
    return found


def head(*names):
    model = nn.Linear(4, len(names))
    model.config = SimpleNamespace(id2label=dict(enumerate(names)))
    return model


@pytest.mark.parametrize("names", [("dog", "cat", "cow"), ("hound, Dog", "Felis, CAT", "cow")])
def test_labels_become_those_of_the_head_s_names(names):
    found = as_the_head_has_them(images(("cat", "dog")), head(*names))
    assert found.targets.tolist() == [1, 0, 1]
    assert found.classes[:1] == (names[0].casefold(),)


# words that several classes of ImageNet share
SHARED = ("crane", "missile", "crane", "projectile, missile", "maillot", "maillot, tank suit", "tabby cat")


@pytest.mark.parametrize(
    ("classes", "model"),
    [
        ((), head("dog", "cat")),  # the data name no classes
        (("cat", "dog"), head("LABEL_0", "LABEL_1", "LABEL_2")),  # nobody named the head's
        (("cat", "dog"), nn.Linear(4, 2)),
        (("n01", "n02"), head("tench", "goldfish")),  # other words for as many classes
        (("plane", "car", "bird"), head("airplane", "automobile", "bird")),
        (SHARED, head(*SHARED)),
    ],
)
def test_labels_without_common_names_stay_as_they_are(classes, model):
    data = images(classes, range(max(len(classes), 2)))
    assert as_the_head_has_them(data, model).targets.tolist() == data.targets.tolist()
    refuse_other_classes(data, nn.Sequential(nn.Flatten(), model))
    refuse_other_classes(data, without_weights(model, len(SHARED)))


def test_a_name_goes_before_a_synonym():
    data = as_the_head_has_them(images(("tabby_cat", "Missile", "maillot"), (0, 1, 2)), head(*SHARED))
    assert data.targets.tolist() == [6, 1, 4]


@pytest.mark.parametrize(
    ("classes", "missing"), [(("cat", "van"), "van"), (("n01", "n02"), "n01"), (("cat", "van", "cow"), "van")]
)
def test_classes_that_are_not_the_head_s_are_refused_by_name(classes, missing):
    with pytest.raises(DataError, match=f"'photos' has the class '{missing}', which is none of the 3 of the model's"):
        refuse_other_classes(images(classes), head("dog", "cat", "cow"))


def test_without_weights_the_head_s_size_is_what_the_model_says():
    refuse_other_classes(images(labels=(0, 2)), without_weights(head("LABEL_0", "LABEL_1", "LABEL_2"), 3))
    with pytest.raises(DataError, match=r"labels from 0 to 3, but the model gives \[1, 3\], 3 classes"):
        refuse_other_classes(images(labels=(0, 3)), without_weights(head("LABEL_0", "LABEL_1", "LABEL_2"), 3))
    refuse_other_classes(images(labels=(0, 3)), nn.Linear(4, 3, device="meta"))  # nothing is known of it


@pytest.mark.parametrize("shape", ["mapping", "map"])
def test_outputs_with_losses_of_their_own_are_left_to_these(shape):
    class Other(nn.Module):
        def forward(self, x):
            return {"a": x.flatten(1)} if shape == "mapping" else x[:, :, None].expand(-1, 2, 2, -1, -1).flatten(3)

    refuse_other_classes(images(labels=(0, 9)), Other())


@pytest.mark.parametrize(("labels", "said"), [((0, 3), "labels from 0 to 3"), ((-1, 2), "labels from -1 to 2")])
def test_a_label_without_a_logit_is_one_sentence_for_every_loss(labels, said):
    target, logits = torch.tensor(labels), torch.randn(2, 3)
    said += r", but the model gives \[.*\], 3 classes; give data with the classes of its head"
    for failing in (
        lambda: loss_of(logits, Batch((torch.ones(2),), target=target)),
        lambda: label_loss(logits, target, smoothing=0.1),
        lambda: label_loss(logits[:, :, None, None].expand(2, 3, 4, 4), target[:, None, None].expand(2, 4, 4)),
        lambda: accuracy(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), images(labels=labels)),
        lambda: refuse_other_classes(images(labels=labels), nn.Sequential(nn.Flatten(), nn.Linear(4, 3))),
    ):
        with pytest.raises(DataError, match=said):
            failing()


def test_losses_are_torch_s_own():
    torch.manual_seed(0)
    logits, target = torch.randn(5, 3), torch.tensor([0, 2, -100, 1, 1])  # -100 is left out, as by torch
    torch.testing.assert_close(label_loss(logits, target), F.cross_entropy(logits, target))
    torch.testing.assert_close(label_loss(logits, target, 0.2), F.cross_entropy(logits, target, label_smoothing=0.2))
    shares = torch.rand(5, 3).softmax(1)
    torch.testing.assert_close(label_loss(logits, shares), F.cross_entropy(logits, shares))


def test_labels_that_no_class_stands_for_are_no_wrong_answers():
    with pytest.raises(DataError, match="labels from -100 to 1"):
        accuracy(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), images(labels=(-100, 1)))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8])
def test_class_indices_of_any_integer_type(dtype):
    logits, target = torch.randn(2, 3), torch.tensor([2, 0], dtype=dtype)
    torch.testing.assert_close(label_loss(logits, target), F.cross_entropy(logits, target.long()))
    if dtype is torch.uint8:
        with pytest.raises(DataError, match="labels from 0 to 156"):
            label_loss(logits, torch.tensor([156, 0], dtype=dtype))


@pytest.mark.parametrize(
    "target", [torch.rand(2), torch.ones(2, 1, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64),
               torch.ones(2, dtype=torch.bool), torch.ones(3, dtype=torch.int64)]
)  # fmt: skip
def test_targets_of_another_form_are_one_sentence(target):
    with pytest.raises(
        DataError, match=r"the data's targets are .* the loss needs class indices \[2\], or shares of all"
    ):
        label_loss(torch.randn(2, 3), target)
