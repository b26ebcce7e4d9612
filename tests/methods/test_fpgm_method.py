"""FPGM: scores by hand, the norm's share, copies, what all filters share, released and intended behaviour."""

from __future__ import annotations

from math import floor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import secateur as sc
from secateur import zoo
from secateur.core.errors import NumericsError, SettingsError
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.measure import flops
from secateur.methods.channels.fpgm import FpgmSettings, score

IMAGES = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """A stem and a block on one stream of 10 channels, 8 channels inside of the block."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 10, 3, padding=1)
        self.up, self.norm = nn.Conv2d(10, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.head = nn.Conv2d(8, 10, 1), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.down(F.relu(self.norm(self.up(x)))))
        return self.head(x.mean((2, 3)))


def net(seed: int = 0) -> Residual:
    torch.manual_seed(seed)
    return Residual().eval()


def plan(model: nn.Module, sparsity: float = 0.5, method: str = "fpgm", **more: object) -> Plan:
    """With everything that could blur a count switched off, and raw scores."""
    plain = {"multiple": 1, "normalise": "none", "keep_scores": True, "example": IMAGES} | more
    return sc.plan(model, method, sparsity, **plain)


def sums(weight: Tensor, rows: list[int] | None = None) -> Tensor:
    """Of Euclidean distances between filters, one pair after the other in double precision."""
    x = weight.detach().double().flatten(1)
    x = x if rows is None else x[rows]
    return torch.stack([sum((a - b).square().sum().sqrt() for b in x) for a in x])


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected.double(), rtol=1e-5, atol=1e-6)


def gone(made: Plan, name: str) -> list[int]:
    return (~made.masks[name]).nonzero().flatten().tolist()


def lowest(values: Tensor, count: int) -> list[int]:
    return sorted(torch.argsort(values, stable=True)[:count].tolist())


def test_filters_with_the_smallest_sum_of_distances_go():
    model = net()
    made = plan(model)
    expected = sums(model.up.weight)
    assert close(made.scores["up:channel"], expected)
    assert gone(made, "up:channel") == lowest(expected, 4)


@pytest.mark.parametrize(("combine", "how"), [("mean", torch.mean), ("sum", torch.sum), ("max", torch.amax)])
def test_layers_on_one_stream_have_distances_of_their_own_which_are_combined(combine, how):
    model = net()
    parts = torch.stack([sums(model.stem.weight), sums(model.down.weight)])
    assert close(plan(model, combine=combine).scores["stem:channel"], how(parts, 0))


def test_all_members_are_the_readers_as_well():
    model = net()
    readers = model.down.weight.transpose(0, 1)
    expected = (sums(model.up.weight) + sums(readers)) / 2
    assert close(plan(model, members="all").scores["up:channel"], expected)


def test_a_head_is_the_vector_of_all_its_rows():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4, head_dim=4
    )
    model = LlamaForCausalLM(config).eval()
    made = plan(model, kinds="head", example=torch.arange(8)[None])
    part = model.model.layers[0].self_attn
    rows = [one.weight.view(4, 4, 16) for one in (part.q_proj, part.k_proj, part.v_proj)]
    expected = torch.stack([sums(one) for one in rows]).mean(0)
    assert close(made.scores["model.layers.0.self_attn:head"], expected)


@pytest.mark.parametrize("distance", ["l1", "cos"])
def test_other_distances_are_what_their_names_say(distance):
    model = net()
    x = model.up.weight.detach().double().flatten(1)
    if distance == "l1":
        expected = torch.stack([(one - x).abs().sum() for one in x])
    else:
        expected = torch.stack([(1 - F.cosine_similarity(one[None], x)).sum() for one in x])
    assert close(plan(model, distance=distance).scores["up:channel"], expected)


@pytest.mark.parametrize("distance", ["l1", "cos"])
def test_released_they_are_euclidean(distance):
    released = plan(net(), distance=distance, reference=True, norm_share=0.25)
    for name, value in plan(net(), norm_share=0.25).scores.items():
        assert torch.equal(released.scores[name], value)
        assert not torch.equal(plan(net(), distance=distance, norm_share=0.25).scores[name], value)


def test_what_all_filters_share_does_not_count():
    """The norm criterion needs small filters; the geometric median moves with all of them."""
    model, moved = net(), net()
    with torch.no_grad():
        moved.up.weight += torch.randn(1, 10, 3, 3)
    assert torch.equal(plan(moved).masks["up:channel"], plan(model).masks["up:channel"])
    norm = {"method": "channel_norm", "members": "producers"}
    assert not torch.equal(plan(moved, **norm).masks["up:channel"], plan(model, **norm).masks["up:channel"])


@pytest.mark.parametrize(("share", "sparsity"), [(0.25, 0.5), (0.25, 0.75), (0.5, 0.25), (0.13, 0.5)])
def test_the_mixture_takes_small_norms_first_then_distances_among_the_rest(share, sparsity):
    model = net()
    with torch.no_grad():
        model.up.weight[2] *= 5  # the norm and the distance criterion must not agree by nature
    made = plan(model, sparsity, norm_share=share)
    norms, small = model.up.weight.detach().flatten(1).norm(dim=1), floor(share * 8)
    by_norm, count = lowest(norms, small), floor(sparsity * 8)
    rest = [i for i in range(8) if i not in by_norm]
    if count <= small:
        expected = lowest(norms, count)
    else:
        by_distance = lowest(sums(model.up.weight, rest), count - small)
        expected = sorted([*by_norm, *(rest[i] for i in by_distance)])
    assert gone(made, "up:channel") == expected
    assert close(made.scores["up:channel"][rest], sums(model.up.weight, rest))
    assert (made.scores["up:channel"][by_norm] < 0).all()


def test_a_tenth_of_ten_is_one():
    """Rounded as in the released code, int(10 * (1 - 0.9)), it would be none."""
    scores = plan(net(), norm_share=0.1).scores["stem:channel"]
    assert int((scores < 0).sum()) == 1


def test_the_share_is_counted_without_rounding_errors():
    """0.29 * 100 is 28.999999999999996."""
    rows = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    assert int((score([rows], FpgmSettings(norm_share=0.29)) < 0).sum()) == 29


def test_in_one_step_copies_go_together_in_several_one_stays():
    model = net()
    with torch.no_grad():
        weight = model.up.weight
        weight /= weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        weight[[1, 4, 6]], weight[[0, 7]] = weight[1].clone(), weight[0].clone()
    share = {"sparsity": 3 / 8 + 1e-6, "exclude": ("stem", "head")}
    assert gone(plan(model, **share), "up:channel") == [1, 4, 6]
    stepwise = set(gone(plan(model, steps=3, **share), "up:channel"))
    assert len(stepwise & {1, 4, 6}) == 2
    assert len(stepwise & {0, 7}) == 1


def test_nothing_but_weights_is_needed_and_budgets_in_flops_are_met():
    model, images = zoo.load_model("digits-resnet"), Batch((torch.rand(2, 1, 8, 8),))
    dense = flops(model, images)
    made = sc.plan(model, "fpgm", budget=sc.Budget(0.5, "flops"), example=images.args[0], multiple=1)
    assert made.provenance[0].data == {}
    assert flops(sc.apply_(model, made), images) == pytest.approx(dense / 2, rel=0.02)


def test_bad_input_is_refused():
    with pytest.raises(SettingsError, match="norm_share"):
        plan(net(), norm_share=1.0)
    with pytest.raises(SettingsError, match="distance"):
        plan(net(), distance="l3")
    model = net()
    with torch.no_grad():
        model.up.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match="NaN"):
        plan(model)
