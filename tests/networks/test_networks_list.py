import pytest
import torch
from torch import nn

import networks
from networks import NETWORKS, available, output_tensors, use_networks, vary, warm_up
from secateur.core.errors import ModelError

SOME = (
    "cifar_resnet20",
    "unet",
    "yolo",
    "lstm_tagger",
    "fused_llama",
    "einsum_attention",
    "film",
    "fpn",
    "weight_norm_net",
)


@pytest.fixture(params=SOME)
def network(request):
    return NETWORKS[request.param]


def run(model, inputs):
    args, kwargs = inputs
    with torch.no_grad():
        return output_tensors(model(*args, **kwargs))


def test_a_network_is_the_same_whenever_it_is_built(network):
    state = torch.random.get_rng_state()
    first, second = network.build(), network.build()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not first.training
    for a, b in zip(run(first, network.inputs()), run(second, network.inputs()), strict=True):
        assert torch.equal(a, b)


def test_outputs_are_finite_and_follow_the_inputs(network):
    model = warm_up(network.build(), network.inputs)
    assert not model.training
    outputs, others = run(model, network.inputs()), run(model, vary(network.inputs()))
    assert outputs
    for output, other in zip(outputs, others, strict=True):
        assert output.isfinite().all()
        assert (output - other).norm() > 0.02 * output.norm()


def test_warming_up_leaves_no_value_that_hides_a_mistake():
    network = NETWORKS["cifar_resnet20"]
    model = warm_up(network.build(), network.inputs)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.momentum == 0.1
            for values in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                assert values.std() > 1e-3
        elif isinstance(layer, nn.Linear):
            assert layer.bias.std() > 1e-3


def test_tied_weights_and_masks_stay_what_they_are():
    model = warm_up(NETWORKS["tied_lm"].build(), NETWORKS["tied_lm"].inputs)
    assert model.head.weight is model.embed.weight
    inputs = NETWORKS["masked"].inputs()
    assert torch.equal(vary(inputs)[1]["mask"], inputs[1]["mask"])
    assert not torch.equal(vary(inputs)[0][0], inputs[0][0])


def test_only_floats_that_are_results_are_outputs():
    one, two = torch.ones(1), torch.zeros(2)
    found = output_tensors({"a": [one, torch.arange(3)], "past_key_values": [one], "b": (two, None)})
    assert [value.tolist() for value in found] == [[1.0], [0.0, 0.0]]


def test_two_networks_with_one_name_are_refused():
    network = NETWORKS["unet"]
    with pytest.raises(ValueError, match="two networks are called 'unet'"):
        networks._by_name([network], [network])


def test_every_family_is_listed():
    counts = dict.fromkeys(("torchvision", "timm", "transformers", "diffusers", "hand-written"), 0)
    for network in NETWORKS.values():
        counts[network.family] += 1
    assert counts["timm"] >= 40
    assert min(counts.values()) >= 7


def test_a_missing_folder_is_named_and_its_networks_are_not_available(tmp_path, monkeypatch):
    monkeypatch.setenv("SECATEUR_NETWORKS", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="SECATEUR_NETWORKS"):
        use_networks()
    assert not available(NETWORKS["resnet18"])
    assert available(NETWORKS["unet"])
