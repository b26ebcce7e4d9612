import pytest
import stack_models
import torch
from torch import nn
from torch.nn import functional as F

from secateur.core.errors import DataError, NumericsError
from secateur.core.method import Batch
from secateur.core.progress import Silent
from secateur.stats.gradients import weight_gradients


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def images(count):
    torch.manual_seed(1)
    return torch.randn(count, 4), torch.randint(0, 3, (count,))


def by_autograd(model, loss, names):
    return dict(zip(names, torch.autograd.grad(loss, [model.get_parameter(name) for name in names]), strict=True))


@pytest.mark.parametrize("sizes", [[7], [3, 4], [6, 1], [1] * 7])
def test_the_gradient_of_the_mean_over_all_samples(sizes):
    model, (x, y) = classifier(), images(7)
    names = ["2.weight", "0.weight"]
    batches = [Batch((a,), target=b) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]
    found = weight_gradients(model, batches, names, Silent())
    expected = by_autograd(model, F.cross_entropy(model(x), y), names)
    assert list(found) == names
    for name in names:
        assert torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_against_finite_differences():
    model, (x, y) = classifier().double(), images(6)
    x = x.double()
    found = weight_gradients(model, [Batch((x,), target=y)], ["0.weight"], Silent())["0.weight"]
    weight, step = model[0].weight.data, 1e-5
    for row, column in ((0, 0), (2, 3), (4, 1)):
        losses = []
        for sign in (1, -1):
            weight[row, column] += sign * step
            losses.append(F.cross_entropy(model(x), y).item())
            weight[row, column] -= sign * step
        # the loss is computed in float32, as for any model
        assert found[row, column].item() == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("sizes", [[5], [2, 3]])
def test_language_models_predict_the_next_token(sizes):
    model, ids = stack_models.build("llama"), stack_models.tokens(5)
    names = ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
    found = weight_gradients(model, [Batch((part,)) for part in ids.split(sizes)], names, Silent())
    expected = by_autograd(model, model(ids, labels=ids).loss, names)
    for name in names:
        assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-7)


def test_a_tied_weight_gets_the_sum_over_its_uses():
    model, ids = stack_models.llama(tie_word_embeddings=True).eval(), stack_models.tokens(2)
    name = "model.embed_tokens.weight"
    found = weight_gradients(model, [Batch((ids,))], [name], Silent())[name]
    assert torch.allclose(found, by_autograd(model, model(ids, labels=ids).loss, [name])[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fails", [False, True])
def test_flags_and_gradients_are_left_as_they_were(fails):
    model, (x, y) = classifier(), images(4)
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    model[2].weight.grad = torch.full_like(model[2].weight, 3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [Batch((x,), target=y), Batch((x[:, :2] if fails else x,), target=y)]
    with torch.no_grad():  # as inside a plan
        if fails:
            with pytest.raises(RuntimeError):
                weight_gradients(model, batches, ["0.weight", "2.weight"], Silent())
        else:
            found = weight_gradients(model, batches, ["0.weight", "2.weight"], Silent())
            assert found["0.weight"].abs().sum() > 0
            assert not found["0.weight"].requires_grad
        assert not torch.is_grad_enabled()
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    assert [p.grad is None for p in model.parameters()] == [True, True, False, True]
    assert model[2].weight.grad.eq(3).all()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_weight_without_influence_has_gradient_zero():
    model, (x, y) = classifier(), images(4)
    model.idle = nn.Linear(2, 2)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    found = weight_gradients(model, [Batch((x,), target=y)], ["idle.weight", "0.weight"], Silent())
    assert found["idle.weight"].tolist() == [[0, 0], [0, 0]]


def test_gradients_that_are_not_finite_name_the_layer():
    model, (x, y) = classifier(), images(4)
    x[1, 2] = float("nan")
    with pytest.raises(NumericsError, match=r"gradient of layer '0\.weight' is NaN or infinite"):
        weight_gradients(model, [Batch((x,), target=y)], ["0.weight"], Silent())


def test_data_without_labels_is_refused():
    model, (x, _) = classifier(), images(4)
    with pytest.raises(DataError, match="no labels"):
        weight_gradients(model, [Batch((x,))], ["0.weight"], Silent())
