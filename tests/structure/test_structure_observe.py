"""One observed run: the model is exactly as it was, and inputs of every form are taken or refused with a reason."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.core.errors import DataError, ModelError, PlanError, SecateurError
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.data.batches import run
from secateur.data.running import evaluating
from secateur.shrink.cut import install, make_cut
from secateur.shrink.reference import reference
from secateur.shrink.verify import difference, float_tensors
from secateur.structure.analysis import analyse
from secateur.structure.observe import observe
from secateur.structure.table import OPERATORS
from secateur.structure.traced import Number, observers

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Two layers; subclasses change what lies between."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)

    def between(self, h: Tensor) -> Tensor:
        return h.relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)))


def half(structure, seed=0) -> Plan:
    """A random half of every site that may lose units."""
    rng = torch.Generator().manual_seed(seed)
    masks = {}
    for name, site in structure.sites.items():
        multiple = structure.multiples.get(name, 1)
        masks[name] = torch.zeros(site.units, dtype=torch.bool)
        kept = max(multiple, site.units // 2 // multiple * multiple)
        masks[name][torch.randperm(site.units, generator=rng)[:kept]] = True
    return Plan({name: structure.sites[name] for name in masks}, masks)


def gap(model: nn.Module, batch: Batch, plan: Plan | None = None) -> float:
    """Largest difference between the cut and the silenced model; the model is put back."""
    structure = analyse(model, batch)
    plan = plan or half(structure)
    expected = reference(model, plan, structure, batch)
    undo = install(model, make_cut(model, plan, structure))
    try:
        with evaluating(model):
            found = run(model, batch)
    finally:
        undo()
    pairs = zip(float_tensors(expected), float_tensors(found), strict=True)
    return max(difference(a, b) for a, b in pairs)


def refused_or_right(model: nn.Module) -> bool:
    """Whether a refusal is one sentence, or the cut gives what it should; anything else is an error."""
    try:
        structure = analyse(model, Batch((X,)))
    except SecateurError as error:
        return "\n" not in str(error) and type(model).__name__ in str(error)
    return not structure.sites or gap(model, Batch((X,))) < 2e-6


def picture(model: nn.Module) -> dict:
    """Everything that can be seen of a model, values by bit, objects by identity."""
    seen: dict = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            seen[name, attribute] = (id(value), type(value), [(key, id(item)) for key, item in items])
            if isinstance(value, (int, str, float, tuple)):
                seen[name, attribute] = (type(value), value, [type(v) for v in value] if type(value) is tuple else [])
        seen[name, "training"] = module.training
    for name, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        seen["tensor", name] = (id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.detach().clone().tolist())
        seen["grad", name] = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
    return seen


# --- left as it was -------------------------------------------------------------------------------


class Stateful(Two):
    """Everything that a forward pass can leave behind on a module."""

    def __init__(self, fails: bool = False):
        super().__init__()
        self.fails, self.calls, self.sizes, self.shape = fails, 0, [6, 8], (8, 4)
        self.cache: dict = {"kept": 1}
        self.seen: list = ["kept"]
        self.config = SimpleNamespace(width=8, to_dict=dict)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8), persistent=False)
        self.register_forward_hook(lambda module, inputs, out: out * 1)

    def between(self, h: Tensor) -> Tensor:
        self.calls += 1
        self.cache["h"], self.last = h, h
        self.seen.append(h)
        self.steps += 1
        self.mean.copy_(h.mean(0).detach())
        if self.fails:
            raise ZeroDivisionError("by design")
        return h.view(-1, self.config.width) + self.mean


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_exactly_as_it_was(fails, training):
    model = Stateful(fails).train(training)
    model.up.training = not training
    model.down.weight.requires_grad_(False)
    model.up.weight.grad = torch.ones(8, 6)
    before = picture(model)
    if fails:
        with pytest.raises(ModelError, match=r"Stateful cannot be observed.*ZeroDivisionError: by design"):
            observe(model, Batch((X,)))
    else:
        observe(model, Batch((X,)))
    assert picture(model) == before
    assert type(model.config.width) is int
    assert not hasattr(model, "last")
    assert not observers


def test_transformers_configs_hold_plain_integers_afterwards():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    before, json = picture(model), config.to_json_string()
    analyse(model, Batch((torch.ones(2, 5, dtype=torch.int64),)))
    assert picture(model) == before
    assert config.to_json_string() == json
    assert not any(isinstance(value, Number) for value in vars(config).values())
    assert not any(isinstance(value, Number) for part in model.modules() for value in vars(part).values())


class Remembers(Two):
    """State that is not directly in the module's own dictionary."""

    def __init__(self):
        super().__init__()
        self.nested: dict = {"inner": {}}
        self.helper = SimpleNamespace(last=None)
        self.counter = torch.zeros(())
        self.widths: set = set()

    def between(self, h: Tensor) -> Tensor:
        return h


def test_nested_caches_are_emptied():
    class Nested(Remembers):
        def between(self, h):
            self.nested["inner"]["h"] = h
            return h

    model = Nested()
    observe(model, Batch((X,)))
    assert not model.nested["inner"]


def test_objects_beside_the_module_are_put_back():
    class Helped(Remembers):
        def between(self, h):
            self.helper.last = h
            return h

    model = Helped()
    observe(model, Batch((X,)))
    assert model.helper.last is None


def test_tensors_that_are_no_buffers_are_not_changed():
    class Counts(Remembers):
        def between(self, h):
            self.counter.add_(1)
            return h

    model = Counts()
    observe(model, Batch((X,)))
    assert model.counter == 0


def test_sets_are_put_back():
    class Collects(Remembers):
        def between(self, h):
            self.widths.add(h.shape[-1])
            return h

    model = Collects()
    observe(model, Batch((X,)))
    assert not model.widths


def test_global_hooks_are_gone_afterwards():
    from torch.nn.modules import module as hooks

    before = len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)
    observe(Two(), Batch((X,)))
    with pytest.raises(ModelError):
        observe(Stateful(fails=True), Batch((X,)))
    assert (len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks)) == before


class WritesToItsInput(Two):
    """Changes what it is given."""

    def forward(self, x):
        return super().forward(x.mul_(2))


def test_the_inputs_are_left_alone():
    x = X.clone()
    analyse(WritesToItsInput(), Batch((x,)))
    assert torch.equal(x, X)


def test_a_model_that_writes_to_its_input_is_cut():
    model = WritesToItsInput()
    plan = sc.plan(model, "channel_norm", 0.5, example=X.clone())
    sc.apply_(model, plan, example=Batch((X.clone(),)))


def test_a_model_can_be_copied_and_saved_after_the_run(tmp_path):
    model = Two()
    analyse(model, Batch((X,)))
    copy.deepcopy(model)
    pickle.dumps(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")


# --- inputs ---------------------------------------------------------------------------------------


class Takes(nn.Module):
    """Two inputs that meet."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, a, b):
        return {"result": self.out(self.left(a) + self.right(b))}


class TakesDict(Takes):
    """The same inputs in a dictionary."""

    def forward(self, inputs):
        return super().forward(inputs["a"], inputs["b"])


class TakesPair(Takes):
    """The same inputs in a tuple."""

    def forward(self, inputs):
        return super().forward(*inputs)


@pytest.mark.parametrize(
    ("make", "batch"),
    [
        (Takes, Batch((X, X))),
        (Takes, Batch((X,), {"b": X})),
        (Takes, Batch(kwargs={"a": X, "b": X})),
        (TakesDict, Batch(({"a": X, "b": X},))),
        (TakesPair, Batch(((X, X),))),
    ],
    ids=["args", "mixed", "kwargs", "dict", "tuple"],
)
def test_inputs_of_every_form(make, batch):
    structure = analyse(make(), batch)
    assert {site.units for site in structure.sites.values()} == {8}
    assert gap(make(), batch) < 1e-6


@pytest.mark.parametrize(
    ("make", "example"),
    [(Takes, {"a": X, "b": X}), (Takes, Batch((X, X))), (Two, X)],
    ids=["mapping", "batch", "tensor"],
)
def test_examples_of_every_form_make_a_plan(make, example):
    plan = sc.plan(make(), "channel_norm", 0.5, example=example)
    assert [plan.kept(name) for name in plan.sites] == [4]


@pytest.mark.parametrize("example", [X, {"x": X}], ids=["tensor", "mapping"])
def test_examples_of_every_form_apply_a_plan(example):
    model = Two()
    plan = sc.plan(model, "channel_norm", 0.5, example=X)
    sc.apply_(model, plan, example=example)


def test_missing_inputs_are_asked_for():
    with pytest.raises(DataError, match=r"not clear what Takes takes; give example inputs \(example=\.\.\."):
        sc.plan(Takes(), "channel_norm", 0.5)


def test_inputs_of_a_wrong_width_are_named():
    with pytest.raises(ModelError, match=r"Two cannot be observed: it stopped in 'up'"):
        analyse(Two(), Batch((torch.randn(2, 5),)))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a, b: a @ b,
        lambda a, b: torch.einsum("ij,kj->ik", a, b[:, :5]),
        lambda a, b: F.scaled_dot_product_attention(a[None], b[None, :, :5], b[None]),
    ],
    ids=["matmul", "einsum", "attention"],
)
def test_products_that_do_not_fit_are_named(wrong):
    class Wrong(Two):
        def between(self, h):
            return wrong(h, self.up.weight.new_zeros(7, 8) + h[:1])

    with pytest.raises((RuntimeError, ValueError)):
        Wrong()(X)
    with pytest.raises(ModelError, match="Wrong cannot be observed"):
        analyse(Wrong(), Batch((X,)))


def test_missing_inputs_of_a_call_are_named():
    with pytest.raises(ModelError, match=r"Takes cannot be observed.*missing 1 required positional argument"):
        analyse(Takes(), Batch((X,)))


def test_one_sample_is_enough_and_nothing_of_it_is_a_unit():
    assert analyse(Two(), Batch((X[:1],))).sites.keys() == analyse(Two(), Batch((X,))).sites.keys()


def test_a_batch_as_large_as_a_width_is_no_unit():
    """Sizes that are equal by chance are not the same thing."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    structure = analyse(model, Batch((torch.randn(2, 2, 2),)))
    assert list(structure.sites) == ["0:neuron"]
    assert gap(model, Batch((torch.randn(2, 2, 2),))) < 1e-6


# --- unusual models: work, freeze or refuse with the reason, never wrong ---------------------------------------------


class InPlaceViews(Two):
    """Writes into views of an activation."""

    def between(self, h):
        h = h.clone()
        h[:, :4].mul_(2)
        h[:, 4:] = h[:, 4:].relu()
        h.view(-1, 2, 4)[:, 1].add_(1)
        return h


class InPlaceWhole(Two):
    """In-place operators on the whole activation."""

    def between(self, h):
        return h.add_(1).relu_().mul_(0.5).clamp_(max=2)


class UsedTwice(nn.Module):
    """One layer applied twice, and its weight once more by hand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.loop, self.down = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.loop(self.loop(self.up(x)).relu())
        return self.down(F.linear(h, self.loop.weight.t()))


class TiedLayers(nn.Module):
    """Two modules that share a parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.first, self.second, self.down = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.down(self.second(self.first(self.up(x)).relu()).relu())


class DoubledGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.tanh() * 2

    @staticmethod
    def backward(context, gradient):
        return gradient


class Autograd(Two):
    """A function with its own backward pass."""

    def between(self, h):
        return DoubledGradient.apply(h)


class Buffered(Two):
    """A buffer as wide as the activation."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.linspace(1, 2, 8))

    def between(self, h):
        return h * self.scale


class LoopsOverHeads(Two):
    """Heads one after the other, sliced by hand."""

    def __init__(self):
        super().__init__()
        self.heads, self.width = 4, 2

    def between(self, h):
        parts = [h[:, i * self.width : (i + 1) * self.width].softmax(-1) for i in range(self.heads)]
        return torch.cat(parts, 1)


class Quantity(Two):
    """The width as a number in the result."""

    def between(self, h):
        return h / h.shape[-1] ** 0.5


class FloatQuantity(Two):
    """The same in a form that Python hides from the engine."""

    def between(self, h):
        return h * (1.0 / h.shape[-1])


class Checks(Two):
    """Code that looks at widths, not at values."""

    def between(self, h):
        if h.shape[-1] != 8:
            raise ValueError("another width")
        return h.relu()


class EvenOnly(Two):
    """The same without a comparison."""

    def between(self, h):
        if h.shape[-1] % 2:
            raise ValueError("odd width")
        return h.relu()


class Complex(Two):
    """Pairs of units as complex numbers."""

    def between(self, h):
        return torch.view_as_real(torch.view_as_complex(h.view(-1, 4, 2)) * 1j).flatten(1)


class Fourier(Two):
    """All units mixed by a function without a rule."""

    def between(self, h):
        return torch.fft.rfft(h).abs().repeat(1, 2)[:, :8]


class Jitter(Two):
    """Random numbers in the shape of the activation, off in eval mode."""

    def between(self, h):
        return F.dropout(h, 0.5, self.training)


class Statistics(Two):
    """Functions over the units."""

    def between(self, h):
        return (h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1)


class Sorted(Two):
    """The order of units is their value."""

    def between(self, h):
        return h.sort(-1).values


UNUSUAL = [
    InPlaceViews,
    InPlaceWhole,
    UsedTwice,
    TiedLayers,
    Autograd,
    Buffered,
    LoopsOverHeads,
    Quantity,
    Checks,
    Complex,
    Fourier,
    Jitter,
    Statistics,
    Sorted,
    Stateful,
]


def free_units(model: nn.Module, batch: Batch) -> dict[str, int]:
    return {name: site.units for name, site in analyse(model, batch).sites.items()}


@pytest.mark.parametrize("make", UNUSUAL, ids=lambda make: make.__name__)
def test_unusual_models_are_cut_rightly_or_left_whole(make):
    model, batch = make(), Batch((X,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    structure = analyse(model, batch)
    if structure.sites:
        for seed in range(4):
            plan = half(structure, seed)
            assert gap(model, batch, plan) < 2e-6
    else:
        assert {entry.reason for entry in structure.frozen} - {"it is an output of the model"}
    for name, value in model.state_dict().items():
        if name != "steps":  # changed by every real run
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Quantity, "the size itself is computed with"),
        (Checks, "the size itself is computed with"),
        (Fourier, "no rule for this operator in 'Fourier' (_fft_r2c)"),
        (Sorted, "the order of units matters in 'Sorted' (sort)"),
    ],
)
def test_what_cannot_go_says_why_and_where(make, reason):
    structure = analyse(make(), Batch((X,)))
    assert not structure.sites
    assert any(entry.reason.startswith(reason) for entry in structure.frozen if entry.units == 8), structure.frozen


@pytest.mark.parametrize("make", [InPlaceWhole, Autograd, Buffered, Jitter, Statistics, Stateful])
def test_these_are_not_given_up(make):
    assert free_units(make(), Batch((X,))) == {"up:neuron": 8}


def test_a_quantity_that_is_not_seen_is_refused_when_it_is_cut():
    model = FloatQuantity()
    plan = sc.plan(model, "channel_norm", 0.5, example=X)
    before = model.state_dict()
    with pytest.raises(PlanError, match="does not give what the masked model gives"):
        sc.apply_(model, plan, example=Batch((X,)))
    assert model.up.weight.shape == (8, 6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_width_that_the_code_asks_about_is_frozen():
    structure = analyse(EvenOnly(), Batch((X,)))
    assert not structure.sites
    assert "the size itself is computed with in 'EvenOnly' (linear)" in {
        entry.reason for entry in structure.frozen if (entry.parameter, entry.dim) == ("up.weight", 0)
    }
    with pytest.raises(ModelError, match="nothing is left to cut in EvenOnly"):
        sc.plan(EvenOnly(), "channel_norm", 0.375, multiple=1, example=X)


def test_widths_that_the_code_does_not_ask_about_stay_free():
    model = nn.Sequential(OrderedDict(inner=Two(), odd=nn.Linear(4, 6), last=EvenOnly()))
    assert set(analyse(model, Batch((X,))).sites) == {"inner.up:neuron", "inner.down:neuron", "odd:neuron"}


class LooksAtValues(Two):
    """A branch on data."""

    def between(self, h):
        return h * 2 if h.sum() > 0 else h


class LooksByItem(Two):
    """A number read out of an activation."""

    def between(self, h):
        return h * float(h.abs().max())


class GoesToNumpy(Two):
    """Leaves torch."""

    def between(self, h):
        return torch.from_numpy(h.detach().numpy() * 2)


@pytest.mark.parametrize("make", [LooksAtValues, LooksByItem, GoesToNumpy])
def test_models_that_look_at_values_are_refused_or_right(make):
    """A branch on data is guessed; the comparison after the cut decides."""
    model = make()
    assert refused_or_right(model)


def test_a_number_read_from_values_is_named_and_the_rest_goes_on():
    structure = analyse(LooksByItem(), Batch((X,)))
    assert [(module, operator) for module, operator, _ in structure.unknown] == [("", "aten::_local_scalar_dense")]
    assert structure.sites


def test_indices_that_data_decide_are_followed():
    """The shape of `x[x > 0]` is not known without values."""

    class Selects(Two):
        def between(self, h):
            return h * (h[h > 0].numel() > 0)

    assert refused_or_right(Selects())


# --- wrappers -------------------------------------------------------------------------------------


def test_data_parallel_wrappers_are_seen_through():
    wrapped = nn.DataParallel(Two())
    structure = analyse(wrapped, Batch((X,)))
    assert list(structure.sites) == ["module.up:neuron"]
    assert gap(wrapped, Batch((X,))) < 1e-6


def test_hooks_of_the_user_run_and_stay():
    model, seen = Two(), []
    handles = [
        model.up.register_forward_pre_hook(lambda module, inputs: seen.append("pre")),
        model.up.register_forward_hook(lambda module, inputs, out: out.tanh()),
        model.register_forward_hook(lambda module, inputs, out: seen.append("post")),
    ]
    assert gap(model, Batch((X,))) < 1e-6
    assert seen
    assert len(model.up._forward_hooks) == len(model.up._forward_pre_hooks) == len(model._forward_hooks) == 1
    for handle in handles:
        handle.remove()


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_compiled_modules():
    model = torch.compile(Two(), backend="eager")
    assert refused_or_right(model)


def test_scripted_modules_are_refused_or_left_whole():
    model = torch.jit.script(Two())
    assert refused_or_right(model)


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_quantised_layers_are_refused_or_left_whole():
    model = torch.ao.quantization.quantize_dynamic(Two(), {nn.Linear}, dtype=torch.qint8)
    assert refused_or_right(model)


@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_part_of_a_model_may_be_quantised():
    model = nn.Sequential(OrderedDict(up=nn.Linear(6, 8), mid=nn.Linear(8, 8), act=nn.ReLU(), down=nn.Linear(8, 4)))
    model.mid = torch.ao.quantization.quantize_dynamic(nn.Sequential(model.mid), {nn.Linear}, dtype=torch.qint8)
    assert refused_or_right(model)


# --- number formats and devices -------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.bfloat16, 3e-2), (torch.float16, 5e-3)])
def test_other_number_formats(dtype, limit):
    model = Two().to(dtype)
    batch = Batch((X.to(dtype),))
    assert gap(model, batch) < limit
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_meta_models_are_analysed_and_not_scored():
    with torch.device("meta"):
        model = Two()
    structure = analyse(model, Batch((X,)))
    assert list(structure.sites) == ["up:neuron"]
    with pytest.raises(ModelError, match="weights are on the meta device, and scores need their values"):
        sc.plan(model, "channel_norm", 0.5, example=X)


def test_a_meta_model_is_cut_in_its_shapes():
    with torch.device("meta"):
        model = Two()
    structure = analyse(model, Batch((X,)))
    sc.apply_(model, half(structure), example=Batch((X,)))
    assert model.up.weight.shape == (4, 6)
    assert model.down.in_features == 4


def test_train_mode_is_left_on_by_everything():
    model = Two().train()
    model.up.eval()
    plan = sc.plan(model, "channel_norm", 0.5, example=X)
    with sc.masked(model, plan, example=Batch((X,))):
        assert [part.training for part in model.modules()] == [True, False, True]
    sc.apply_(model, plan, example=Batch((X,)))
    assert [part.training for part in model.modules()] == [True, False, True]


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ModelError, match="ReLU has no parameters"):
        analyse(nn.ReLU(), Batch((X,)))


def test_parameters_that_take_no_part_are_named():
    class Idle(Two):
        def __init__(self):
            super().__init__()
            self.idle = nn.Linear(5, 7)

    structure = analyse(Idle(), Batch((X,)))
    assert {entry.reason for entry in structure.frozen if entry.parameter == "idle.weight"} == {
        "'idle.weight' takes no part in the run"
    }


def test_the_rules_are_not_changed_by_a_run():
    analyse(Two(), Batch((X,)))  # fills the table
    before = dict(OPERATORS)
    analyse(Fourier(), Batch((X,)))
    assert before == OPERATORS


# --- verification leaves state alone --------------------------------------------------------------


def test_checking_a_cut_leaves_buffers_as_they_were():
    model = Stateful()
    plan = sc.plan(model, "channel_norm", 0.5, example=X)
    with sc.masked(model, plan, example=Batch((X,))):
        pass
    assert model.steps == 0
