import inspect
from collections import Counter, defaultdict
from contextlib import contextmanager

import pytest
import stack_models
import torch
from torch import nn

from secateur.core.budget import Budget
from secateur.core.errors import DataError, ModelError, NumericsError
from secateur.core.method import Batch, Task
from secateur.data.batches import run
from secateur.stats.listeners import SecondMoment
from secateur.stats.walker import BlockWalk
from secateur.structure.sites import weight_layers

FAMILIES = sorted(stack_models.MODELS)


def task_for(model, batches, **more):
    return Task(model, Budget(0.5), batches=batches, **more)


@torch.no_grad()
def heard(model, batches, modules):
    """Name -> inputs per batch of the named modules in plain runs of the whole model."""
    inputs = defaultdict(list)
    handles = []
    for name in modules:

        def hook(module, args, kwargs, name=name):
            inputs[name].append((args[0] if args else next(iter(kwargs.values()))).clone())

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
    for batch in batches:
        run(model, batch)
    for handle in handles:
        handle.remove()
    return inputs


@torch.no_grad()
def block_outputs(model, batches, blocks):
    """Block name -> hidden state after it, per batch, in plain runs of the whole model."""
    outputs = defaultdict(list)

    def hook_for(name):
        def hook(module, args, output):
            outputs[name].append((output[0] if isinstance(output, tuple) else output).clone())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in blocks]
    for batch in batches:
        run(model, batch)
    for handle in handles:
        handle.remove()
    return outputs


def one_shot(layer, inputs, samples):
    """Sum over all tokens of x^2 / samples in float64, from inputs in whatever batches."""
    matrices = [layer.input_matrix(x).double() for x in inputs]
    return torch.cat(matrices).square().sum(0) / samples


@contextmanager
def pruned(model, changes):
    """The model with other weights, by plain assignment."""
    before = {name: model.get_parameter(name).data for name in changes}
    for name, value in changes.items():
        model.get_parameter(name).data = value
    try:
        yield
    finally:
        for name, value in before.items():
            model.get_parameter(name).data = value


def ninety_percent_off(layer):
    """The matrix with nine of ten weights zero, in a pattern that depends on the position."""
    matrix = layer.matrix
    keep = (torch.arange(matrix.numel()) % 10 == 0).view(matrix.shape)
    return matrix * keep


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def traces(model):
    """What a walk could leave behind on modules."""
    return [
        (name, "forward" in vars(module), len(module._forward_pre_hooks), len(module._forward_hooks), module.training)
        for name, module in model.named_modules()
    ]


# --- the right hidden states --------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_states_are_those_of_the_real_model(name):
    model, batches = stack_models.build(name), stack_models.batches_for(name)
    blocks = [block for stack in stack_models.MODELS[name][1] for block in _block_names(model, stack)]
    expected, entered = block_outputs(model, batches, blocks), heard(model, batches, blocks)
    visited = []
    with BlockWalk(task_for(model, batches)) as walk:
        for visit in walk:
            visited.append(visit.name)
            pairs = list(visit.flow())
            assert len(pairs) == len(batches)
            for (before, after), want_before, want_after in zip(
                pairs, entered[visit.name], expected[visit.name], strict=True
            ):
                assert torch.equal(before, want_before)
                assert torch.equal(after, want_after)
    assert visited == blocks


def _block_names(model, stack):
    return [f"{stack}.{index}" for index in range(len(model.get_submodule(stack)))]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "mixtral", "gemma3", "t5"])
def test_hidden_states_are_those_the_model_itself_reports(name):
    model, batches = stack_models.build(name), stack_models.batches_for(name)
    reported = []
    for batch in batches:
        with torch.no_grad():
            output = model(**batch.kwargs, output_hidden_states=True)
        states = (
            [output.encoder_hidden_states, output.decoder_hidden_states] if name == "t5" else [output.hidden_states]
        )
        # the last one has passed the final norm in most families; the one before each block has not
        reported.append([hidden for of_stack in states for hidden in of_stack[:-1]])
    with BlockWalk(task_for(model, batches)) as walk:
        for index, visit in enumerate(walk):
            for number, (before, _) in enumerate(visit.flow()):
                assert torch.equal(before, reported[number][index])
    assert index + 1 == len(reported[0])


def test_the_masks_of_the_two_batches_matter():
    """The exactness above would also hold for a model that ignores its masks; this one does not."""
    model, batches = stack_models.build("llama"), stack_models.batches_for("llama")
    blocks = _block_names(model, "model.layers")
    bare = [Batch(kwargs={"input_ids": batch.kwargs["input_ids"]}) for batch in batches]
    with_masks, without = block_outputs(model, batches, blocks), block_outputs(model, bare, blocks)
    assert not torch.allclose(with_masks[blocks[1]][0], without[blocks[1]][0])
    same_size = [Batch(kwargs={key: value[:2] for key, value in batch.kwargs.items()}) for batch in batches]
    swapped = [
        Batch(kwargs={**batch.kwargs, "attention_mask": other.kwargs["attention_mask"]})
        for batch, other in zip(same_size, reversed(same_size), strict=True)
    ]
    right, wrong = block_outputs(model, same_size, blocks), block_outputs(model, swapped, blocks)
    assert not torch.allclose(right[blocks[1]][1], wrong[blocks[1]][1])
    with BlockWalk(task_for(model, same_size)) as walk:
        for visit in walk:
            assert all(map(torch.equal, visit.outputs(), right[visit.name]))


def test_position_ids_given_by_the_user_reach_the_blocks():
    model, ids = stack_models.build("llama"), stack_models.tokens(2)
    positions = torch.arange(stack_models.LENGTH).expand(2, -1)
    batches = [Batch(kwargs={"input_ids": ids, "position_ids": positions * factor}) for factor in (1, 3)]
    blocks = _block_names(model, "model.layers")
    expected = block_outputs(model, batches, blocks)
    assert not torch.equal(*expected[blocks[0]])
    with BlockWalk(task_for(model, batches)) as walk:
        for visit in walk:
            assert all(map(torch.equal, visit.outputs(), expected[visit.name]))


# --- statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_equal_a_one_shot_float64_computation(name):
    model, batches = stack_models.build(name), stack_models.batches_for(name)
    found = {}
    with BlockWalk(task_for(model, batches)) as walk:
        layers = walk.found.layers
        for visit in walk:
            found |= visit.observe(SecondMoment)
    assert found.keys() == layers.keys()
    inputs = heard(model, batches, [layer.removesuffix(".weight") for layer in layers])
    for layer_name, layer in layers.items():
        expected = one_shot(layer, inputs[layer_name.removesuffix(".weight")], 5)
        assert torch.allclose(found[layer_name].value.double(), expected, rtol=1e-5, atol=1e-7), layer_name
        assert found[layer_name].samples == 5


@pytest.mark.parametrize("sizes", [[5], [1, 4], [4, 1], [1, 1, 1, 1, 1]])
def test_the_batch_size_does_not_matter(sizes):
    model, ids = stack_models.build("llama"), stack_models.tokens(5)

    def statistics(parts):
        with BlockWalk(task_for(model, [Batch((part,)) for part in parts])) as walk:
            return {name: stat for visit in walk for name, stat in visit.observe(SecondMoment).items()}

    whole, split = statistics([ids]), statistics(torch.split(ids, sizes))
    for name, stat in whole.items():
        assert torch.allclose(stat.value, split[name].value, rtol=1e-5)
        assert stat.samples == split[name].samples == 5


def test_layers_that_read_one_tensor_share_one_statistic():
    model, batches = stack_models.build("llama"), stack_models.batches_for("llama")
    with BlockWalk(task_for(model, batches)) as walk:
        for visit in walk:
            stats = visit.observe(SecondMoment)
            groups = defaultdict(set)
            for name, stat in stats.items():
                groups[id(stat)].add(name.split(".")[-2])
            assert sorted(map(sorted, groups.values())) == [
                ["down_proj"],
                ["gate_proj", "up_proj"],
                ["k_proj", "q_proj", "v_proj"],
                ["o_proj"],
            ]
            assert {stat.samples for stat in stats.values()} == {5}


def test_a_layer_that_runs_twice_hears_both():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(self.fc(x))

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(4, 3)
    with BlockWalk(task_for(model, [Batch((x,))])) as walk:
        (stats,) = [visit.observe(SecondMoment) for visit in walk]
    with torch.no_grad():
        both = torch.cat([x, model.fc(x)]).double().square().sum(0)
    assert torch.allclose(stats["fc.weight"].value.double() / both, torch.full((3,), 1 / 8, dtype=torch.float64))


class Reads(nn.Module):
    """Two layers on one tensor object, which may be changed in place between them."""

    def __init__(self, second, change):
        super().__init__()
        self.first, self.second, self.change = nn.Conv2d(2, 2, 3), second, change

    def forward(self, x):
        x = x * 1
        y = self.first(x)
        if self.change:
            x.relu_()
        return y.sum() + self.second(x).sum()


def test_a_tensor_changed_in_place_is_another_input():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 4)
    for change in (False, True):
        model = Reads(nn.Conv2d(2, 2, 3), change)
        for context in (torch.no_grad(), torch.inference_mode()):
            if change and isinstance(context, torch.inference_mode):
                continue  # inference tensors carry no version by which a change could be seen
            with context, BlockWalk(task_for(model, [Batch((x,))])) as walk:
                (stats,) = [visit.observe(SecondMoment) for visit in walk]
            assert (stats["first.weight"] is stats["second.weight"]) == (not change)
    layer = weight_layers(model).layers["second.weight"]
    assert torch.allclose(stats["second.weight"].value.double(), one_shot(layer, [x.relu()], 2), rtol=1e-5)


def test_convolutions_of_other_geometry_do_not_share_and_groups_are_refused():
    x = torch.randn(2, 2, 4, 4)
    with BlockWalk(task_for(Reads(nn.Conv2d(2, 2, 1), False), [Batch((x,))])) as walk:
        (stats,) = [visit.observe(SecondMoment) for visit in walk]
    assert [len(stat.value) for stat in stats.values()] == [18, 2]
    walk = BlockWalk(task_for(Reads(nn.Conv2d(2, 2, 3, groups=2), False), [Batch((x,))]))
    with walk, pytest.raises(ModelError, match=r"'second\.weight' is a grouped convolution"):
        next(iter(walk)).observe(SecondMoment)


def test_sharing_that_changes_from_batch_to_batch_is_refused():
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.a(x) + self.b(x if len(x) == 1 else x + 1)

    with BlockWalk(task_for(Moody(), [Batch((torch.ones(1, 2),)), Batch((torch.ones(2, 2),))])) as walk:
        visit = next(iter(walk))
        with pytest.raises(
            ModelError, match=r"'b\.weight' read the same tensor as 'a\.weight' in one batch and another"
        ):
            visit.observe(SecondMoment)
    # the other way round nothing is shared and both hear everything
    with BlockWalk(task_for(Moody(), [Batch((torch.ones(2, 2),)), Batch((torch.ones(1, 2),))])) as walk:
        stats = next(iter(walk)).observe(SecondMoment)
    assert stats["a.weight"].value.tolist() == pytest.approx([1, 1])
    assert stats["b.weight"].value.tolist() == pytest.approx([3, 3])  # (4 + 4 + 1) / 3


def test_layers_that_never_run_get_an_empty_statistic():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(2, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    with BlockWalk(task_for(Idle(), [Batch((torch.ones(1, 2),))])) as walk:
        stats = next(iter(walk)).observe(SecondMoment)
    assert stats["idle.weight"].samples == 0
    assert stats["idle.weight"].value.tolist() == [0, 0, 0]


def test_only_wanted_layers_are_heard():
    model, batches = stack_models.build("llama"), stack_models.batches_for("llama")
    task = task_for(model, batches, include=("model.layers.1", "model.layers.2"), exclude=("*.mlp",))
    with BlockWalk(task) as walk:
        heard_names = [list(visit.observe(SecondMoment)) for visit in walk]
    projections = [f"self_attn.{letter}_proj.weight" for letter in "qkvo"]
    assert heard_names == [[], *[[f"model.layers.{i}.{name}" for name in projections] for i in (1, 2)]]


# --- the chain of pruned blocks -----------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_later_blocks_see_the_pruned_ones(name):
    model, batches = stack_models.build(name), stack_models.batches_for(name)
    with BlockWalk(task_for(model, batches)) as walk:
        dense = {key: stat.value for visit in walk for key, stat in visit.observe(SecondMoment).items()}
    found, changes, order = {}, {}, []
    with BlockWalk(task_for(model, batches)) as walk:
        layers = walk.found.layers
        for visit in walk:
            found[visit.name] = {key: stat.value for key, stat in visit.observe(SecondMoment).items()}
            changes[visit.name] = {}
            for layer in visit.layers.values():
                matrix = ninety_percent_off(layer)
                changes[visit.name][layer.name] = layer.to_site(matrix)
                visit.replace(layer, matrix)
            order.append(visit.name)
    assert len(order) > 1
    for number, block in enumerate(order):
        before = {key: value for earlier in order[:number] for key, value in changes[earlier].items()}
        with pruned(model, before):  # really pruned, the whole model run
            inputs = heard(model, batches, [key.removesuffix(".weight") for key in found[block]])
        for key, value in found[block].items():
            expected = one_shot(layers[key], inputs[key.removesuffix(".weight")], 5)
            assert torch.allclose(value.double(), expected, rtol=1e-4, atol=1e-7), key
        # the first block of all, and it alone, hears only the dense model
        same = [key for key, value in found[block].items() if torch.allclose(value, dense[key], rtol=1e-2)]
        if number == 0:
            assert all(torch.equal(value, dense[key]) for key, value in found[block].items())
        else:  # a decoder begins with its own embeddings and hears the encoder only after those
            alone = ("decoder.block.0.layer.0.SelfAttention.", "decoder.block.0.layer.1.EncDecAttention.q.")
            assert all(key.startswith(alone) for key in same)


def test_the_decoder_is_fed_by_the_pruned_encoder():
    model, batches = stack_models.build("t5"), stack_models.batches_for("t5")
    cross = "decoder.block.0.layer.1.EncDecAttention.k"
    changes = {}
    with BlockWalk(task_for(model, batches)) as walk:
        for visit in walk:
            if visit.stack.name == "encoder.block":
                for layer in visit.layers.values():
                    changes[layer.name] = layer.to_site(ninety_percent_off(layer))
                    visit.replace(layer, ninety_percent_off(layer))
            elif visit.index == 0:
                stats = visit.observe(SecondMoment)
                assert stats[f"{cross}.weight"] is stats[f"{cross[:-1]}v.weight"]
                layer, found = visit.layers[f"{cross}.weight"], stats[f"{cross}.weight"].value.double()
    dense = one_shot(layer, heard(model, batches, [cross])[cross], 5)
    with pruned(model, changes):
        sparse = one_shot(layer, heard(model, batches, [cross])[cross], 5)
    assert torch.allclose(found, sparse, rtol=1e-5)
    assert not torch.allclose(found, dense, rtol=1e-2)


def test_outputs_follow_a_replacement_made_after_they_were_computed():
    model, batches = stack_models.build("llama"), stack_models.batches_for("llama")
    with BlockWalk(task_for(model, batches)) as walk:
        visit = next(iter(walk))
        for _ in visit.flow():
            pass
        before = visit.outputs()
        layer = visit.layers["model.layers.0.mlp.down_proj.weight"]
        visit.replace(layer, torch.zeros_like(layer.matrix))
        after = visit.outputs()
    assert not any(map(torch.equal, before, after))


@pytest.mark.parametrize("name", FAMILIES)
def test_sweep_is_truly_sequential(name):
    model, batches = stack_models.build(name), stack_models.batches_for(name)
    found, changes, order = {}, {}, []

    def decide(layer, stat):
        order.append(layer.name)
        found[layer.name] = stat.value.clone()
        changes[layer.name] = layer.to_site(ninety_percent_off(layer))
        visit.replace(layer, ninety_percent_off(layer))

    with BlockWalk(task_for(model, batches)) as walk:
        layers = walk.found.layers
        for visit in walk:
            visit.sweep(SecondMoment, decide)
    assert sorted(order) == sorted(layers)
    for number, layer_name in enumerate(order):
        # the model with everything decided before this layer, and nothing else, pruned
        with pruned(model, {earlier: changes[earlier] for earlier in order[:number]}):
            inputs = heard(model, batches, [layer_name.removesuffix(".weight")])
        expected = one_shot(layers[layer_name], inputs[layer_name.removesuffix(".weight")], 5)
        assert torch.allclose(found[layer_name].double(), expected, rtol=1e-4, atol=1e-7), layer_name


def test_sweep_differs_from_observing_where_it_should():
    model, batches = stack_models.build("llama"), stack_models.batches_for("llama")
    with BlockWalk(task_for(model, batches)) as walk:
        dense = {key: stat.value for key, stat in next(iter(walk)).observe(SecondMoment).items()}
    swept = {}

    def decide(layer, stat):
        swept[layer.name.split(".")[-2]] = torch.allclose(stat.value, dense[layer.name], rtol=1e-3)
        visit.replace(layer, ninety_percent_off(layer))

    with BlockWalk(task_for(model, batches)) as walk:
        visit = next(iter(walk))
        visit.sweep(SecondMoment, decide)
    unchanged = {name for name, same in swept.items() if same}
    assert unchanged == {"q_proj", "k_proj", "v_proj"}
    assert len(swept) == 7


def test_sweep_decides_idle_layers_last_and_in_module_order():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            for index in range(8):
                setattr(self, f"idle{index}", nn.Linear(2, 2))
            self.used = nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    order = []
    with BlockWalk(task_for(Idle(), [Batch((torch.ones(1, 2),))])) as walk:
        for visit in walk:
            visit.sweep(SecondMoment, lambda layer, stat: order.append((layer.name, stat.samples)))
    assert order == [("used.weight", 1), *[(f"idle{index}.weight", 0) for index in range(8)]]


# --- cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "timm-like", "mixtral"])
@pytest.mark.parametrize("way", ["observe", "flow", "sweep"])
def test_how_often_blocks_really_run(name, way):
    model, batches = stack_models.build(name), stack_models.batches_for(name)
    stack = stack_models.MODELS[name][1][0]
    runs = Counter()
    # inside the blocks: a stand-in for the whole block does not get here
    for index, block in enumerate(model.get_submodule(stack)):
        norm = next(module for module in block.modules() if "Norm" in type(module).__name__)
        norm.register_forward_hook(lambda module, args, output, index=index: runs.update([index]))
    with BlockWalk(task_for(model, batches)) as walk:
        assert set(runs.values()) == {1}  # the probe
        runs.clear()
        for visit in walk:
            if way == "observe":
                visit.observe(SecondMoment)
            elif way == "flow":
                list(visit.flow())
            else:
                visit.sweep(SecondMoment, lambda layer, stat: None)
    passes = {"observe": [4, 4, 2], "flow": [2, 2, 2], "sweep": [2, 2, 2]}[way]
    assert [runs[index] for index in range(3)] == passes


# --- nothing is left behind ---------------------------------------------------------------------


class Stop(Exception):  # noqa: N818
    pass


def walk_until(model, batches, end):
    """Prune everything to nothing, block by block, up to the given end in the second block."""

    def decide(layer, stat):
        visit.replace(layer, layer.matrix * 0)
        if visit.index == 1:
            raise Stop

    with BlockWalk(task_for(model, batches)) as walk:
        for visit in walk:
            if end == "sweep":
                visit.sweep(SecondMoment, decide)
                continue
            visit.observe(SecondMoment)
            for layer in visit.layers.values():
                visit.replace(layer, layer.matrix * 0)
            flow = visit.flow()
            next(flow)
            if visit.index == 1 and end == "break":
                return
            if visit.index == 1 and end == "raise":
                raise Stop
            list(flow)
    assert end == "done"


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "mixtral", "timm-like", "resnet"])
@pytest.mark.parametrize("end", ["done", "raise", "break", "sweep"])
def test_the_model_is_as_it_was(name, end):
    model, batches = stack_models.build(name), stack_models.batches_for(name)
    before, trace_before = state(model), traces(model)
    storages = [parameter.data_ptr() for parameter in model.parameters()]
    grad_enabled = torch.is_grad_enabled()
    if end in ("raise", "sweep"):
        with pytest.raises(Stop):
            walk_until(model, batches, end)
    else:
        walk_until(model, batches, end)
    after = state(model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [parameter.data_ptr() for parameter in model.parameters()] == storages
    assert traces(model) == trace_before
    assert torch.is_grad_enabled() == grad_enabled


def test_a_forward_that_somebody_set_on_a_block_stays():
    model, batches = stack_models.build("llama"), stack_models.batches_for("llama")
    block = model.model.layers[1]
    real, calls = block.forward, []

    def wrapper(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    block.forward = wrapper
    with BlockWalk(task_for(model, batches)) as walk:
        for visit in walk:
            visit.outputs()
    assert vars(block)["forward"] is wrapper
    assert len(calls) == 3  # the probe and two batches
    assert inspect.ismethod(model.model.layers[0].forward)


def test_training_flags_and_gradients_survive():
    model, batches = stack_models.build("llama"), stack_models.batches_for("llama")
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
        parameter.grad = torch.full_like(parameter, 3.0) if index % 2 == 0 else None
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with BlockWalk(task_for(model, batches)) as walk:
        for visit in walk:
            assert not any(stat.value.requires_grad for stat in visit.observe(SecondMoment).values())
            for layer in visit.layers.values():
                visit.replace(layer, layer.matrix / 2)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        assert parameter.grad is None if not flag else parameter.grad.eq(3).all()


# --- a model without a stack --------------------------------------------------------------------


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def test_a_model_without_blocks_is_one_block():
    model, x = mlp(), torch.randn(5, 4)
    with BlockWalk(task_for(model, [Batch((x[:3],)), Batch((x[3:],))])) as walk:
        visits = list(walk)
        (visit,) = visits
        stats = visit.observe(SecondMoment)
    assert (visit.name, visit.stack.name, visit.module) == ("", "", model)
    assert list(stats) == ["0.weight", "2.weight"]
    assert torch.allclose(stats["0.weight"].value, x.square().mean(0), rtol=1e-5)
    hidden = model[:2](x).detach()
    assert torch.allclose(stats["2.weight"].value, hidden.square().mean(0), rtol=1e-5)


def test_blocks_that_do_not_feed_each_other_are_one_block():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([stack_models.Block(4) for _ in range(2)])

        def forward(self, x):
            return sum(layer(x) for layer in self.layers)

    class Backwards(Parallel):
        def forward(self, x):
            return self.layers[0](self.layers[1](x))

    class Scaled(Parallel):
        def forward(self, x):
            return self.layers[1](self.layers[0](x) * 2)

    for kind in (Parallel, Backwards, Scaled):
        torch.manual_seed(0)
        model, x = kind(), torch.randn(3, 2, 4)
        with BlockWalk(task_for(model, [Batch((x,))])) as walk:
            (visit,) = list(walk)
            found = visit.observe(SecondMoment)
        assert visit.name == ""
        inputs = heard(model, [Batch((x,))], ["layers.1.attn.qkv"])["layers.1.attn.qkv"]
        layer = walk.found.layers["layers.1.attn.qkv.weight"]
        assert torch.allclose(found[layer.name].value.double(), one_shot(layer, inputs, 3), rtol=1e-5)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["observe", "sweep"])
def test_nan_in_activations_names_the_layer(way):
    model, batches = stack_models.build("llama"), stack_models.batches_for("llama")
    model.model.layers[1].post_attention_layernorm.weight.data[3] = float("nan")
    message = r"enter layer 'model\.layers\.1\.mlp\.gate_proj\.weight' contain NaN or infinity"

    def go():
        with BlockWalk(task_for(model, batches)) as walk:
            for visit in walk:
                if way == "observe":
                    visit.observe(SecondMoment)
                else:
                    visit.sweep(SecondMoment, lambda layer, stat: None)
        pytest.fail("the walk passed")

    with pytest.raises(NumericsError, match=message):
        go()


def test_data_the_model_cannot_run_on_gives_the_shapes():
    timm_like = stack_models.build("timm-like")
    with pytest.raises(
        DataError, match=r"ViT cannot run on the data \(inputs \[1, 1, 8, 8\] float32\): RuntimeError: "
    ):
        BlockWalk(task_for(timm_like, [Batch((torch.zeros(3, 1, 8, 8),))]))
    walk = BlockWalk(task_for(mlp(), [Batch((torch.zeros(3, 5),))]))  # has no stack to look for: runs when asked
    with walk, pytest.raises(DataError, match=r"Sequential cannot run on the data \(inputs \[3, 5\] float32\)"):
        next(iter(walk)).observe(SecondMoment)
    llama = stack_models.build("llama")
    with pytest.raises(DataError, match=r"LlamaForCausalLM cannot run on the data \(inputs \[1, 10\] int64\)"):
        BlockWalk(task_for(llama, [Batch((stack_models.tokens(2) + 1000,))]))
    with pytest.raises(DataError, match="needs calibration data"):
        BlockWalk(task_for(mlp(), []))


def test_a_later_batch_that_does_not_run_gives_its_shapes_too():
    for model, good, bad in (
        (mlp(), torch.zeros(3, 4), torch.zeros(3, 5)),
        (stack_models.build("llama"), stack_models.tokens(2), stack_models.tokens(2) + 1000),
    ):
        walk = BlockWalk(task_for(model, [Batch((good,)), Batch((bad,))]))
        before = traces(model)
        with walk, pytest.raises(DataError, match=rf"cannot run on the data \(inputs \[{len(bad)}, {bad.shape[1]}\]"):
            [visit.observe(SecondMoment) for visit in walk]
        assert traces(model) == before


def test_arguments_that_are_not_per_sample_are_not_cut_by_the_probe():
    class Scaled(stack_models.TimmLikeViT):
        def forward(self, x, scale):
            assert scale.shape == (8,)
            return super().forward(x * scale)

    torch.manual_seed(0)
    model, batches = Scaled(), [Batch((torch.randn(3, 3, 8, 8),), {"scale": torch.arange(8.0)})]
    expected = block_outputs(model, batches, ["blocks.2"])["blocks.2"]
    with BlockWalk(task_for(model, batches)) as walk:
        outputs = [visit.outputs() for visit in walk]
    assert len(outputs) == 3
    assert torch.equal(outputs[-1][0], expected[0])


# --- progress -----------------------------------------------------------------------------------


def test_progress_counts_blocks_of_all_stacks():
    class Heard:
        events = ()

        def start(self, stage, total):
            self.events += ((stage, total),)

        def advance(self, steps=1):
            self.events += (steps,)

        def finish(self):
            self.events += ("finish",)

    model, progress = stack_models.build("t5"), Heard()
    with BlockWalk(task_for(model, stack_models.batches_for("t5"), progress=progress)) as walk:
        for visit in walk:
            visit.outputs()
    assert progress.events == (("blocks", 5), 1, 1, 1, 1, 1, "finish")


def test_observing_stops_when_all_layers_have_shown_their_inputs():
    model, batches = stack_models.build("llama"), stack_models.batches_for("llama")
    runs = Counter()
    for block in model.model.layers:
        block.mlp.down_proj.register_forward_hook(lambda *_: runs.update(["down"]))
        block.mlp.up_proj.register_forward_hook(lambda *_: runs.update(["up"]))
    with BlockWalk(task_for(model, batches)) as walk:
        runs.clear()
        visit = next(iter(walk))
        stats = visit.observe(SecondMoment)
    assert len(batches) > 1
    assert runs == {"up": len(batches), "down": 1}  # the first batch shows the order, the others stop before the last
    names = [name.removesuffix(".weight") for name in stats]
    inputs = heard(model, batches, names)
    samples = sum(batch.samples for batch in batches)
    for name, layer in visit.layers.items():
        expected = one_shot(layer, inputs[name.removesuffix(".weight")], samples)
        assert torch.allclose(stats[name].value.double(), expected, rtol=1e-4)


def test_observing_runs_on_where_a_layer_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(self.b(self.a(x)))

    model = nn.Sequential(Twice(), Twice())
    batches = [Batch((torch.randn(2, 4),)) for _ in range(3)]
    with BlockWalk(task_for(model, batches)) as walk:
        stats = next(iter(walk)).observe(SecondMoment)
    inputs = heard(model, batches, ["0.a"])["0.a"]
    assert len(inputs) == 6
    expected = sum(x.square().sum(0) for x in inputs) / stats["0.a.weight"].samples
    assert torch.allclose(stats["0.a.weight"].value, expected, rtol=1e-4)
