"""Growing regularisation: the pace against the official one, the penalty by autograd, who is chosen and when."""

import copy

import pytest
import torch
from torch.nn import functional as F
from trained_cuts import BARE, INNER, SHAPE, STREAM, advance, attached, batch, finished, net, resumed, same_bytes, sgd

import secateur as sc
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, SettingsError
from secateur.methods.channels.greg import GregSettings, Pace

EXAMPLE = torch.zeros(2, *SHAPE)
SHORT = {"every": 2, "delta": 0.1, "ceiling": 0.3}
PICKS = SHORT | {"variant": "greg-2", "delta_pick": 0.02, "ceiling_pick": 0.04}


def filters(model, power=1):
    """Site -> mean |w| of the filters that make every unit."""
    stem, conv1, conv2, bare = (
        model.get_submodule(name).weight.detach().abs() ** power for name in ("stem", "conv1", "conv2", "bare")
    )
    both = torch.cat([stem.flatten(1), conv2.flatten(1)], 1)
    return {STREAM: both.mean(1), INNER: conv1.flatten(1).mean(1), BARE: bare.flatten(1).mean(1)}


def lowest(scores, share):
    """Site -> keep-mask without the floor(share * n) lowest."""
    found = {}
    for name, score in scores.items():
        found[name] = torch.ones(len(score), dtype=torch.bool)
        found[name][score.argsort(stable=True)[: int(share * len(score))]] = False
    return found


# --- the pace -----------------------------------------------------------------------------------------


def official(steps, every, delta, tau, delta_pick=None, tau_pick=None, recover=-1e-4):
    """Penalties (chosen, kept) in force at every step, as the official loop accumulates them."""
    chosen = kept = 0.0
    picked, done, found = delta_pick is None, False, []
    for step in range(steps):
        if step % every == 0 and not done:
            if not picked:
                chosen, kept = chosen + delta_pick, kept + delta_pick
                picked = chosen >= tau_pick - 1e-12
            else:
                chosen, kept = chosen + delta, 0.0 if delta_pick is None else recover
                done = chosen >= tau - 1e-12
        found.append((chosen, kept))
    return found


def test_greg_1_grows_as_the_official_code_does():
    pace = Pace.of(GregSettings(every=3, delta=0.05, ceiling=0.25), 40)
    assert pace.picks == 0
    assert [pace.on_chosen(pace.update(step)) for step in range(40)] == pytest.approx(
        [chosen for chosen, _ in official(40, 3, 0.05, 0.25)]
    )


def test_greg_2_grows_for_all_and_then_for_the_chosen():
    settings = GregSettings(variant="greg-2", every=2, delta=0.05, ceiling=0.3, delta_pick=0.02, ceiling_pick=0.1)
    model, _, run = attached("greg", steps=40, **settings.model_dump(exclude={"steps"}))
    (part,) = run.parts
    found = []
    for step in range(40):
        run.step = step
        run.after_backward()
        run._edited = False
        rates = part.rates(part.pace.update(step))[INNER]
        mask = part.masks.get(INNER)
        found.append((float(rates.max()), float(rates[mask].max() if mask is not None else rates.max())))
    flat = [number for pair in found for number in pair]
    expected = [number for pair in official(40, 2, 0.05, 0.3, 0.02, 0.1) for number in pair]
    assert flat == pytest.approx(expected)
    assert model is run.model


@pytest.mark.parametrize(
    ("steps", "every", "delta"), [(90_000, 5, 1e-4), (1_000_000, 10, 1e-4), (300, 10, 1 / 22), (6, 10, 1.0)]
)
def test_the_official_growth_unless_training_is_too_short(steps, every, delta):
    assert Pace.of(GregSettings(every=every), steps).delta == pytest.approx(delta)


def test_a_default_pace_picks_and_ends_in_its_shares_of_the_training():
    pace = Pace.of(GregSettings(variant="greg-2"), 400)
    assert pace.picks == 10
    assert pace.on_all(10) == pytest.approx(0.01)
    assert pace.on_chosen(pace.update(299)) == 1.0
    assert pace.on_chosen(pace.update(280)) < 1.0
    long = Pace.of(GregSettings(variant="greg-2", every=5), 90_000)
    assert (long.picks, long.delta_pick, long.delta) == (1000, 1e-5, 1e-4)


@pytest.mark.parametrize("settings", [{"delta": 1e-4}, {"variant": "greg-2", "delta_pick": 1e-5}])
def test_a_training_too_short_for_a_given_pace_is_refused(settings):
    with pytest.raises(SettingsError, match=r"reaches its ceiling of 1 at step \d+, and training has 100 steps"):
        attached("greg", steps=100, **settings)


def test_a_training_just_long_enough_passes():
    settings = GregSettings(every=2, delta=0.1, ceiling=0.3)
    assert Pace.of(settings, 5).on_chosen(3) == pytest.approx(0.3)
    with pytest.raises(SettingsError, match="at step 5"):
        Pace.of(settings, 4)


# --- the penalty --------------------------------------------------------------------------------------


def test_greg_1_pulls_the_chosen_filters_and_nothing_else():
    """Against autograd on loss + r / 2 ||w||^2 of the filters of smallest norm at the start."""
    model, optimizer, run = attached("greg", 0.5, **SHORT)
    other = copy.deepcopy(model).train()
    own, keep = sgd(other), lowest(filters(other), 0.5)
    assert all(torch.equal(run.parts[0].masks[name], mask) for name, mask in keep.items())
    advance(model, optimizer, 0, 5)
    for step in range(5):
        x, y = batch(step)
        own.zero_grad()
        layers = {STREAM: (other.stem, other.conv2), INNER: (other.conv1,), BARE: (other.bare,)}
        faded = sum(layer.weight[~keep[name]].square().sum() for name, many in layers.items() for layer in many)
        (F.cross_entropy(other(x), y) + min(0.3, (step // 2 + 1) * 0.1) / 2 * faded).backward()
        own.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(value.float(), other.state_dict()[name].float(), atol=1e-5), name


def test_everything_that_goes_with_a_channel_fades_if_asked():
    model, _, run = attached("greg", members="all", **SHORT)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.after_backward()
    gone = ~run.parts[0].masks[INNER]
    assert torch.allclose(model.norm1.weight.grad, 0.1 * model.norm1.weight.detach() * gone)
    assert model.conv2.weight.grad[:, gone].abs().min() > 0
    assert not model.head.bias.grad.any()


def test_greg_2_penalises_all_alike_before_it_chooses():
    model, _, run = attached("greg", steps=12, **PICKS)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.after_backward()
    for layer in (model.stem, model.conv1, model.conv2, model.bare):
        assert torch.allclose(layer.weight.grad, 0.02 * layer.weight.detach())
    assert not run.parts[0].masks


# --- the choice ---------------------------------------------------------------------------------------


def test_greg_1_cuts_what_it_chose_at_the_start():
    start = filters(net())
    plan, model, run = finished("greg", 0.5, **SHORT)
    for name, mask in lowest(start, 0.5).items():
        assert torch.equal(plan.masks[name], mask), name
        assert torch.allclose(plan.scores[name], filters(model)[name] / filters(model)[name].mean(), atol=1e-5)
    assert [(entry["what"], entry["step"]) for entry in run.log] == [("choose", 0), ("cut", 6)]


def test_greg_2_chooses_by_the_weights_of_its_moment():
    model, optimizer, run = attached("greg", 0.5, steps=12, **PICKS)
    advance(model, optimizer, 0, 2)
    (part,) = run.parts
    assert not part.masks
    with torch.no_grad():  # others are the smallest by now
        model.conv1.weight[6:].mul_(1e-3)
    expected = lowest(filters(model), 0.5)
    advance(model, optimizer, 2, 3)
    assert all(torch.equal(part.masks[name], mask) for name, mask in expected.items())
    assert expected[INNER].tolist() == [True] * 6 + [False] * 6
    with torch.no_grad():  # what becomes of them later does not matter
        model.conv1.weight.copy_(torch.rand_like(model.conv1.weight))
    advance(model, optimizer, 3, 12)
    assert torch.equal(run.finish().masks[INNER], expected[INNER])


def test_chosen_filters_fade():
    plan, model, run = finished("greg", 0.5, steps=60, every=1, delta=1.0, ceiling=10.0)
    sizes = filters(model)[INNER]
    assert sizes[~plan.masks[INNER]].max() < 0.1 * sizes[plan.masks[INNER]].min()
    assert run.log[-1]["density"] == 0.5
    cut = sc.apply_(model, plan, example=EXAMPLE)
    assert cut.conv1.weight.shape == (6, 4, 3, 3)


def test_streams_stay_whole_if_asked():
    plan, _, _ = finished("greg", coupled=False, **SHORT)
    assert set(plan.sites) == {INNER, BARE}


def test_a_budget_of_the_whole_model_is_met_by_the_choice():
    _, _, run = attached("greg", None, budget=Budget(0.5, Quantity.FLOPS), model=wide(), **SHORT)
    (part,) = run.parts
    counts = {name: int(mask.sum()) for name, mask in part.masks.items()}
    share = part.work.structure.flops(counts) / part.work.structure.flops({})
    assert 0.49 <= share <= 0.5


def wide():
    from secateur.zoo.vision import digits_resnet

    torch.manual_seed(0)
    return digits_resnet()


# --- resuming and refusing ----------------------------------------------------------------------------


@pytest.mark.parametrize("at", [1, 3, 5])
@pytest.mark.parametrize("settings", [SHORT, PICKS], ids=["greg-1", "greg-2"])
def test_a_resumed_run_is_the_straight_one_bit_for_bit(settings, at):
    straight, model, _ = finished("greg", steps=12, **settings)
    again, other = resumed("greg", at, steps=12, **settings)
    assert same_bytes(model, other)
    assert again.document() == straight.document()
    assert all(torch.equal(again.masks[name], mask) for name, mask in straight.masks.items())


def test_an_early_end_is_refused():
    model, optimizer, run = attached("greg", **SHORT)
    advance(model, optimizer, 0, 5)
    with pytest.raises(BudgetError, match="5 of 6 steps"):
        run.finish()


def test_a_budget_out_of_reach_is_refused_before_the_training():
    with pytest.raises(BudgetError, match="out of reach"):
        attached("greg", None, budget=Budget(0.01, Quantity.FLOPS), **SHORT)
