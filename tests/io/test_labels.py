"""Labels by the names of the head's classes, and labels that the head does not have."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur.core.errors import DataError
from secateur.core.method import Batch
from secateur.data.batches import label_loss, loss_of
from secateur.data.dataset import DataKind, Dataset
from secateur.io.labels import as_the_head_has_them
from secateur.measure.quality import accuracy, refuse_foreign_classes


def images(classes=(), labels=(0, 1, 0)):
    return Dataset("photos", DataKind.IMAGE, torch.rand(len(labels), 1, 2, 2), torch.tensor(labels), classes)


def head(*names):
    model = nn.Linear(4, len(names))
    model.config = SimpleNamespace(id2label=dict(enumerate(names)))
    return model


@pytest.mark.parametrize("names", [("dog", "cat", "cow"), ("hound, Dog", "Felis, CAT", "cow")])
def test_labels_become_those_of_the_head_s_names(names):
    found = as_the_head_has_them(images(("cat", "dog")), head(*names))
    assert found.targets.tolist() == [1, 0, 1]
    assert found.classes[:1] == (names[0].casefold(),)


@pytest.mark.parametrize(
    ("classes", "model"),
    [
        ((), head("dog", "cat")),  # the data name no classes
        (("cat", "dog"), head("LABEL_0", "LABEL_1", "LABEL_2")),  # nobody named the head's
        (("cat", "dog"), nn.Linear(4, 2)),
        (("n01", "n02"), head("tench", "goldfish")),  # other words for as many classes
    ],
)
def test_labels_without_common_names_stay_as_they_are(classes, model):
    data = images(classes)
    assert as_the_head_has_them(data, model) is data


@pytest.mark.parametrize(("classes", "missing"), [(("cat", "van"), "van"), (("n01", "n02"), "n01")])
def test_classes_that_are_not_the_head_s_are_refused_by_name(classes, missing):
    with pytest.raises(
        DataError, match=f"'photos' has the class '{missing}', which is none of the 3 of the model's head"
    ):
        as_the_head_has_them(images(classes), head("dog", "cat", "cow"))


@pytest.mark.parametrize(("labels", "said"), [((0, 3), "labels from 0 to 3"), ((-1, 2), "labels from -1 to 2")])
def test_a_label_without_a_logit_is_one_sentence_for_every_loss(labels, said):
    target, logits = torch.tensor(labels), torch.randn(2, 3)
    said += r", but the model gives \[.*\], 3 classes; give data with the classes of its head"
    for failing in (
        lambda: loss_of(logits, Batch((torch.ones(2),), target=target)),
        lambda: label_loss(logits, target, smoothing=0.1),
        lambda: label_loss(logits[:, :, None, None].expand(2, 3, 4, 4), target[:, None, None].expand(2, 4, 4)),
        lambda: accuracy(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), images(labels=labels)),
        lambda: refuse_foreign_classes(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), images(labels=labels)),
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
