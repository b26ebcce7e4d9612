"""GBLM-Pruner: the score by hand and by a plain-PyTorch oracle, its ablations, balance, and every trap."""

import copy
from dataclasses import replace

import pytest
import torch
from method_models import inputs, linear, lowest_per_row, stacked, tiny_gpt2, wanda_scores
from torch import nn
from torch.nn import functional as F

from secateur import api
from secateur.core.budget import Budget
from secateur.core.errors import DataError, SettingsError
from secateur.core.journal import Journal
from secateur.core.method import Batch, Task
from secateur.data.running import evaluating
from secateur.methods.llm.gblm import GBLMSettings, plan


def text(count=6, length=12, seed=0):
    return torch.randint(0, 40, (count, length), generator=torch.Generator().manual_seed(seed))


def gradient_tables(model, ids, names, p=1, alpha=100.0):
    """Name -> ||alpha g||_p over sequences in the parameter's own shape, float64, by whole-model autograd."""
    tables = {name: torch.zeros((), dtype=torch.float64) for name in names}
    for one in ids.split(1):
        logits = model(one).logits
        loss = F.cross_entropy(logits[0, :-1], one[0, 1:])
        for name, g in zip(names, torch.autograd.grad(loss, [model.get_parameter(n) for n in names]), strict=True):
            tables[name] = tables[name] + (alpha * g.double()).abs() ** p
    return {name: value ** (1 / p) for name, value in tables.items()}


def oracle(model, ids, sparsity, combine, **table):
    """Masks in the parameter's own shape: block by block, `combine(|W|, norm of inputs, gradient table)`."""
    model = copy.deepcopy(model).eval()
    blocks = model.transformer.h
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = {(i, part): f"transformer.h.{i}.{part}.weight" for i in range(len(blocks)) for part in parts}
    tables = gradient_tables(model, ids, list(names.values()), **table)
    masks = {}
    for index, block in enumerate(blocks):
        heard, hooks = {}, []
        for part in parts:

            def hear(module, args, part=part, heard=heard):
                heard[part] = args[0]

            hooks.append(block.get_submodule(part).register_forward_pre_hook(hear))
        with torch.no_grad():
            model(ids)
            for hook in hooks:
                hook.remove()
            for part in parts:
                name, layer = names[index, part], block.get_submodule(part)
                norm = (heard[part].double().flatten(0, 1).square().sum(0) / len(ids)).sqrt()
                W, G = layer.weight.t().abs().double(), tables[name].t()
                keep = torch.from_numpy(
                    lowest_per_row(combine(W, norm, G).numpy(), int(layer.weight.shape[0] * sparsity))
                ).t()
                masks[name] = keep.contiguous()
                layer.weight.mul_(keep)
    return masks


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def both(W, norm, G):
    return W * norm + W * G


@pytest.mark.parametrize("p", [1, 2])
def test_masks_are_the_oracle_s(p):
    model, ids = tiny_gpt2(), text()
    found = api.plan(model, "gblm", 0.5, data=ids, p=p)
    assert equal(found.masks, oracle(model, ids, 0.5, both, p=p))
    assert not equal(found.masks, oracle(model, ids, 0.5, both, p=3 - p))
    assert not equal(found.masks, api.plan(model, "wanda", 0.5, data=ids).masks)


ABLATIONS = {
    "gradient": ({"mode": "gradient"}, lambda W, norm, G: W * G),
    "inverse": ({"inverse": True}, lambda W, norm, G: W * norm / (G + 1e-8)),
    "inverse gradient": ({"mode": "gradient", "inverse": True}, lambda W, norm, G: W / (G + 1e-8)),
    "alpha": ({"alpha": 3.0}, lambda W, norm, G: W * norm + W * G * 0.03),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_are_the_oracle_s(name):
    settings, combine = ABLATIONS[name]
    model, ids = tiny_gpt2(), text()
    found = api.plan(model, "gblm", 0.5, data=ids, **settings)
    assert equal(found.masks, oracle(model, ids, 0.5, combine))
    assert not equal(found.masks, oracle(model, ids, 0.5, both))


def test_gradients_are_the_dense_model_s_activations_are_not():
    """In the second block the tables do not feel what was pruned in the first, the inputs do."""
    model, ids = tiny_gpt2(), text()
    light, heavy = (api.plan(model, "gblm", s, data=ids, keep_scores=True, mode="gradient").scores for s in (0.1, 0.9))
    assert all(torch.equal(light[name], heavy[name]) for name in light)
    light, heavy = (api.plan(model, "gblm", s, data=ids, keep_scores=True).scores for s in (0.1, 0.9))
    assert not torch.allclose(light["transformer.h.1.mlp.c_fc.weight"], heavy["transformer.h.1.mlp.c_fc.weight"])


def opposite():
    """One layer and two samples whose gradients are g and -g, with inputs of norm 1."""
    x = torch.tensor([[0.6, 0.8], [0.6, 0.8]])
    return linear(torch.zeros(2, 2)), Batch((x,), target=torch.tensor([0, 1]))


def with_weight(W):
    """A layer that always answers as if its weight were zero, so that gradients are known by hand."""

    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = linear(W)

        def forward(self, x):
            out = self.fc(x)
            return out - out.detach()

    return Silent()


@pytest.mark.parametrize(("p", "size"), [(1, 2.0), (2, 2**0.5)])
def test_opposite_gradients_do_not_cancel(p, size):
    W = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    _, batch = opposite()
    found = api.plan(with_weight(W), "gblm", 0.5, data=[batch], p=p, alpha=10.0, keep_scores=True)
    g = torch.tensor([[0.3, 0.4], [0.3, 0.4]])  # (softmax - one-hot) x is -g and g: softmax is 1/2 for both classes
    norm = torch.tensor([0.6, 0.8])  # mean over two samples
    torch.testing.assert_close(found.scores["fc.weight"], W.abs() * (norm + size * 10 * g))


def test_more_samples_weigh_the_gradient_more_unless_normalised():
    """The activation term is a mean, the gradient term a sum: twice the same data doubles (p=1) its share."""
    model, ids = tiny_gpt2(), text(4)
    name = "transformer.h.0.mlp.c_fc.weight"

    def ratio(data, **settings):
        return api.plan(model, "gblm", 0.5, data=data, **settings).facts[name]["gradient_to_activation"]

    for p, growth in ((1, 2.0), (2, 2**0.5)):
        once, twice = ratio(ids, p=p), ratio(ids.repeat(2, 1), p=p)
        assert twice / once == pytest.approx(growth, rel=1e-4)
        fixed = [ratio(data, p=p, normalise="paper128") for data in (ids, ids.repeat(2, 1))]
        assert fixed[0] == pytest.approx(fixed[1], rel=1e-4)
        assert fixed[0] / once == pytest.approx((128 / 4) ** (1 / p), rel=1e-4)


def test_the_ratio_is_the_median_of_the_two_terms():
    model, ids = tiny_gpt2(), text()
    name = "transformer.h.0.attn.c_attn.weight"
    found = api.plan(model, "gblm", 0.5, data=ids).facts[name]["gradient_to_activation"]
    heard = []
    hook = model.transformer.h[0].attn.c_attn.register_forward_pre_hook(lambda _, args: heard.append(args[0].double()))
    with torch.no_grad():
        model(ids)
    hook.remove()
    norm = (heard[0].flatten(0, 1).square().sum(0) / len(ids)).sqrt()
    table = gradient_tables(model, ids, [name])[name]  # Conv1D: [in, out]
    assert found == pytest.approx(
        (table / norm[:, None]).flatten().sort().values[(table.numel() - 1) // 2].item(), 1e-4
    )


@pytest.mark.parametrize(
    ("alpha", "word", "left"),
    [(1e-4, "below 0.01", {"method": "wanda"}), (1e6, "above 100", {"method": "gblm", "mode": "gradient"})],
)
def test_a_term_that_vanishes_is_said_so(alpha, word, left):
    model, ids = tiny_gpt2(), text()
    assert not api.plan(model, "gblm", 0.5, data=ids).warnings
    found = api.plan(model, "gblm", 0.5, data=ids, alpha=alpha)
    assert sum(word in warning and "8 of 8 layers" in warning for warning in found.warnings) == 1
    assert not api.plan(model, "gblm", 0.5, data=ids, alpha=alpha, mode="gradient").warnings
    alone = api.plan(model, sparsity=0.5, data=ids, **left)  # what is left is the other term's choice
    same = sum(int((found.masks[name] == mask).sum()) for name, mask in alone.masks.items())
    assert same > 0.995 * alone.units()[1]


class Cut(nn.Module):
    """Two layers in a row; the loss does not see the second's work, and the third sees nothing at all."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used, self.cut, self.idle = (nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x):
        x = self.used(x)
        self.cut(x.detach()).detach()
        return x


def test_layers_without_a_gradient_go_by_their_activations_and_without_both_by_magnitude():
    model, x = Cut(), inputs(5, 6)
    batch = Batch((x,), target=torch.arange(5))
    found = api.plan(model, "gblm", 0.5, data=[batch], alpha=1.0)
    warned = {name: [w for w in found.warnings if f"'{name}.weight'" in w] for name in ("used", "cut", "idle")}
    assert not warned["used"]
    assert "by its activations alone" in warned["cut"][0]
    assert "by magnitude" in warned["idle"][0]
    with torch.no_grad():
        entering = model.used(x)
    expected = lowest_per_row(wanda_scores(model.cut.weight, entering), 3)
    assert (found.masks["cut.weight"].numpy() == expected).all()
    expected = lowest_per_row(model.idle.weight.detach().abs().double().numpy(), 3)
    assert (found.masks["idle.weight"].numpy() == expected).all()
    assert "cut.weight" not in found.facts


@pytest.mark.parametrize("percent", [20, 50, 73])
def test_every_row_loses_exactly_its_share(percent):
    model, ids = tiny_gpt2(), text()
    found = api.plan(model, "gblm", percent / 100, data=ids)
    for mask in found.masks.values():
        assert ((~mask).sum(0) == mask.shape[0] * percent // 100).all()  # Conv1D: columns are the rows


@pytest.mark.parametrize(("pattern", "kept"), [("2:4", 2), ("1:4", 1), ("4:8", 4)])
def test_patterns_name_what_is_kept(pattern, kept):
    found = api.plan(tiny_gpt2(), "gblm", pattern=pattern, data=text())
    for mask in found.masks.values():
        assert (mask.t().reshape(mask.shape[1], -1, int(pattern[-1])).sum(-1) == kept).all()


def test_the_variant_gives_rows_their_own_sparsity():
    model = stacked(blocks=1, width=48, inner=80)
    batch = Batch((inputs(6, 48),), target=torch.arange(6))
    mask = api.plan(model, "gblm", 0.5, data=[batch], variant=True).masks["layers.0.up.weight"]
    assert abs((~mask).float().mean().item() - 0.5) < 2e-3
    assert (~mask).sum(1).min() < (~mask).sum(1).max()


def test_gradients_of_the_first_samples_only():
    model, ids = tiny_gpt2(), text()
    few = api.plan(model, "gblm", 0.5, data=ids, samples=2, mode="gradient", keep_scores=True).scores
    alone = api.plan(model, "gblm", 0.5, data=ids[:2], mode="gradient", keep_scores=True).scores
    every = api.plan(model, "gblm", 0.5, data=ids, mode="gradient", keep_scores=True).scores
    assert all(torch.equal(few[name], alone[name]) for name in few)
    assert not any(torch.equal(few[name], every[name]) for name in few)


@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 2, 2]])
def test_batches_do_not_matter(sizes):
    model, ids = tiny_gpt2(), text()
    found = api.plan(model, "gblm", 0.5, data=list(ids.split(sizes)))
    assert equal(found.masks, api.plan(model, "gblm", 0.5, data=list(ids.split(1))).masks)


def test_the_model_is_left_as_it_was():
    model, ids = tiny_gpt2().train(), text()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    before, flags = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    api.plan(model, "gblm", 0.5, data=ids)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert model.training


def test_dropout_plays_no_part():
    model, ids = tiny_gpt2().train(), text()
    assert equal(api.plan(model, "gblm", 0.5, data=ids).masks, api.plan(model.eval(), "gblm", 0.5, data=ids).masks)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("death", [3, 5, 7, 8, 9])
def test_a_killed_run_goes_on_and_decides_the_same(death, tmp_path):
    """Killed on the gradient walk's way there (1 probe, 3 samples) and back (3), and in the pruning walk (1 and 1)."""
    model, ids = tiny_gpt2(), text(3)
    batches, settings = [Batch((ids,))], GBLMSettings()
    calls = 0

    def die(module, args, output):
        nonlocal calls
        calls += 1
        if calls == death:
            raise Killed

    def decided(journal):
        with evaluating(model):
            return plan(Task(model, Budget(0.5), batches=batches, journal=journal), settings)

    whole = decided(Journal())
    hook = model.transformer.h[1].mlp.register_forward_hook(die)
    with pytest.raises(Killed):
        decided(Journal(tmp_path))
    hook.remove()
    again = decided(Journal(tmp_path))
    assert equal({name: again.masks[name] for name in again.masks}, {name: whole.masks[name] for name in whole.masks})
    assert again.facts == whole.facts
    assert again.warnings == whole.warnings


def test_bad_settings_and_data():
    for settings in ({"p": 3}, {"alpha": 0}, {"mode": "wanda"}, {"normalise": "maybe"}):
        with pytest.raises(SettingsError, match=next(iter(settings))):
            api.plan(tiny_gpt2(), "gblm", 0.5, data=text(), **settings)
    with pytest.raises(DataError, match="calibration data"):
        api.plan(tiny_gpt2(), "gblm", 0.5)
    with pytest.raises(DataError, match="no labels"):
        api.plan(stacked(), "gblm", 0.5, data=inputs(4, 5, 12))


def test_image_models_take_their_labels():
    model = stacked()
    x, y = inputs(6, 12), torch.arange(6)
    found = api.plan(model, "gblm", 0.5, data=[Batch((x,), target=y)], mode="gradient", keep_scores=True, alpha=1.0)
    other = api.plan(
        model, "gblm", 0.5, data=[replace(Batch((x,)), target=y.flip(0))], mode="gradient", keep_scores=True
    )
    weight = model.layers[1].down.weight
    table = torch.zeros_like(weight)
    for one, label in zip(x.split(1), y.split(1), strict=True):
        table += torch.autograd.grad(F.cross_entropy(model(one), label), weight)[0].abs()
    torch.testing.assert_close(found.scores["layers.1.down.weight"], (weight * table).abs().detach())
    assert not torch.equal(other.scores["layers.1.down.weight"], found.scores["layers.1.down.weight"])
