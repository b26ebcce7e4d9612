"""Gradients of single samples taken block by block: against autograd on the whole model, one sample at a time."""

import contextlib
from collections import Counter
from dataclasses import replace

import pytest
import stack_models
import torch
import transformers as tr
from torch import nn

from secateur.core.budget import Budget
from secateur.core.errors import DataError, ModelError, NumericsError
from secateur.core.journal import Journal
from secateur.core.method import Batch, Task
from secateur.data.batches import split_batch
from secateur.stats.backward import Aggregate, GradientSums, gradient_walk
from secateur.structure.layers import to_matrix
from secateur.structure.sites import weight_layers

STREAMED = ["llama", "gpt2", "opt", "bert", "vit", "mixtral", "gemma3", "timm-like"]
EVERY = list(Aggregate)


def all_sums(layer):
    return GradientSums(layer.site.matrix_shape, EVERY)


def labelled(name):
    """Every family's batches, images with classes."""
    batches = stack_models.batches_for(name)
    if name in stack_models.IMAGES:
        return [replace(batch, target=torch.arange(batch.samples) % 5) for batch in batches]
    return batches


def plain(name):
    """Batches of text without padding."""
    ids = stack_models.tokens(5)
    return [Batch((ids[:3],)), Batch((ids[3:],))]


def sample_loss(model, one):
    """One sample's loss, written down independently: mean cross entropy of the class or of the next real tokens."""
    logits = model(*one.args, **one.kwargs).logits if hasattr(model, "config") else model(*one.args)
    if one.target is not None:
        return -logits.log_softmax(-1)[0, one.target[0]]
    ids = one.kwargs.get("decoder_input_ids", one.kwargs.get("input_ids", one.args[0] if one.args else None))
    real = one.kwargs["attention_mask"][0] if "decoder_input_ids" not in one.kwargs and one.kwargs else None
    places = [t for t in range(ids.shape[1] - 1) if real is None or (real[t] and real[t + 1])]
    return -torch.stack([logits.log_softmax(-1)[0, t, ids[0, t + 1]] for t in places]).mean()


def by_autograd(model, batches, names):
    """Aggregate -> name -> `[O, I]` sums over samples, float64 sums of float32 gradients."""
    layers = weight_layers(model).layers
    found = {kind: {name: torch.zeros(1, dtype=torch.float64) for name in names} for kind in EVERY}
    weights = [model.get_parameter(name) for name in names]
    for one in (one for batch in batches for one in split_batch(batch)):
        gradients = torch.autograd.grad(sample_loss(model, one), weights, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                g = to_matrix(gradient, layers[name].site.layout).double()
                for kind, value in zip(EVERY, (g.abs(), g.square(), g), strict=True):
                    found[kind][name] = found[kind][name] + value
    return found


def assert_equal(section, expected):
    for kind, values in expected.items():
        found = section.tensors(kind.value)
        assert set(found) == set(values)
        for name, value in values.items():
            # float32 sums of another order: relative to the layer's largest entry
            error = (found[name].double() - value).abs().max()
            assert error <= 1e-5 * value.abs().max(), (kind, name, error)


@pytest.mark.parametrize("name", sorted(stack_models.MODELS))
def test_every_family_equals_autograd_on_the_whole_model(name):
    model, batches = stack_models.build(name), labelled(name)
    section = gradient_walk(Task(model, Budget(0.5), batches=batches), "g", all_sums)
    inside = tuple(f"{stack}." for stack in stack_models.MODELS[name][1])
    names = [layer for layer in weight_layers(model).layers if layer.startswith(inside)]
    assert_equal(section, by_autograd(model, batches, names))
    assert (list(section) == ["model"]) == (name not in STREAMED)


@pytest.mark.parametrize("sizes", [[5], [2, 3], [1] * 5])
def test_batches_do_not_matter_only_samples_do(sizes):
    model, ids = stack_models.build("llama"), stack_models.tokens(5)
    batches = [Batch((part,)) for part in ids.split(sizes)]
    section = gradient_walk(Task(model, Budget(0.5), batches=batches), "g", all_sums)
    names = list(section.tensors("sum"))
    expected = by_autograd(model, plain("llama"), names)
    assert_equal(section, expected)
    # what one batch of all would give instead: signs cancel
    assert expected[Aggregate.SUM][names[0]].abs().sum() < 0.9 * expected[Aggregate.ABSOLUTE][names[0]].sum()


def test_tied_embeddings_and_frozen_parameters():
    torch.manual_seed(0)
    model = stack_models.llama(tie_word_embeddings=True).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = by_autograd(model, plain("llama"), [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)  # the weights are frozen
    flags = [parameter.requires_grad for parameter in model.parameters()]
    task = Task(model, Budget(0.5), batches=plain("llama"), include=("*.up_proj.weight",))
    assert_equal(gradient_walk(task, "g", all_sums), expected)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("left", [True, False])
def test_padding_has_no_part_in_the_gradient(left):
    """A padded sequence gives what it gives alone."""
    model, ids = stack_models.build("llama"), stack_models.tokens(2, length=7)
    padding = torch.zeros(2, 4, dtype=torch.int64)
    padded = torch.cat([padding, ids] if left else [ids, padding], 1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = Batch(kwargs={"input_ids": padded, "attention_mask": mask, "position_ids": positions})
    found = gradient_walk(Task(model, Budget(0.5), batches=[batch]), "g", all_sums).tensors("absolute")
    alone = gradient_walk(Task(model, Budget(0.5), batches=[Batch((ids,))]), "g", all_sums).tensors("absolute")
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)


def test_a_walk_over_the_last_block_goes_no_further_back():
    model, batches = stack_models.build("llama"), plain("llama")
    task = Task(model, Budget(0.5), batches=batches, include=("model.layers.2.*",))
    section = gradient_walk(task, "g", all_sums)
    assert list(section) == ["model.layers.2"]
    assert_equal(section, by_autograd(model, batches, list(section.tensors("sum"))))


# --- models that are no chain of blocks ---------------------------------------------------------


class Skipping(stack_models.TimmLikeViT):
    """The head reads the state after the first block too."""

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = first = self.blocks[0](x)
        for block in list(self.blocks)[1:]:
            x = block(x)
        return self.head(self.norm(x + first)[:, 0])


class Sharing(stack_models.TimmLikeViT):
    """Two blocks use one weight."""

    def __init__(self):
        super().__init__()
        self.blocks[2].mlp[0].weight = self.blocks[0].mlp[0].weight


@pytest.mark.parametrize("kind", [Skipping, Sharing])
def test_what_is_no_chain_is_differentiated_as_a_whole(kind):
    torch.manual_seed(0)
    model, batches = kind().eval(), labelled("timm-like")
    section = gradient_walk(Task(model, Budget(0.5), batches=batches), "g", all_sums)
    assert list(section) == ["model"]
    assert_equal(section, by_autograd(model, batches, list(section.tensors("sum"))))
    again = gradient_walk(Task(model, Budget(0.5), batches=batches), "g", all_sums)
    assert list(again) == ["model"]


# --- weights that come and go, kills ------------------------------------------------------------


class Visiting:
    """A residency whose blocks are on the meta device while they are not visited."""

    device = torch.device("cpu")

    def __init__(self, model, stack):
        self.model, self.stack = model, stack
        self.real = dict(model.named_parameters(remove_duplicate=False))
        self.meta = {id(one): nn.Parameter(one.detach().to("meta"), requires_grad=False) for one in self.real.values()}
        self.visits = Counter()
        for name in self.real:
            self._put(name, None)

    def _put(self, name, value):
        owner, _, leaf = name.rpartition(".")
        value = self.meta[id(self.real[name])] if value is None else value
        self.model.get_submodule(owner)._parameters[leaf] = value

    @contextlib.contextmanager
    def _there(self, names):
        present = [name for name in names if not self._get(name).is_meta]
        assert not present, f"{present} are there twice"
        for name in names:
            self._put(name, nn.Parameter(self.real[name].detach().clone(), requires_grad=False))
        try:
            yield
        finally:
            for name in names:
                self._put(name, None)

    def _get(self, name):
        owner, _, leaf = name.rpartition(".")
        return self.model.get_submodule(owner)._parameters[leaf]

    def inside(self, name):
        blocks = [n for n, p in self.model.named_parameters() if self.stack in n and not p.is_meta]
        assert not blocks, f"{blocks} are there while '{name}' is visited"
        self.visits[name] += 1
        return self._there([one for one in self.real if one.startswith(f"{name}.")])

    def outside(self, names):
        return self._there([one for one in self.real if not one.startswith(tuple(f"{name}." for name in names))])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_streamed_model_gives_the_same_bits_one_block_at_a_time(name, tmp_path):
    whole = gradient_walk(Task(stack_models.build(name), Budget(0.5), batches=labelled(name)), "g", all_sums)
    model = stack_models.build(name)
    residency = Visiting(model, stack_models.MODELS[name][1][0])
    journal = Journal(tmp_path, spill=True)
    task = Task(model, Budget(0.5), batches=labelled(name), residency=residency, journal=journal)
    section = gradient_walk(task, "g", all_sums)
    for kind in EVERY:
        expected, found = whole.tensors(kind.value), section.tensors(kind.value)
        assert set(expected) == set(found)
        assert all(torch.equal(found[layer], value) for layer, value in expected.items())
    assert all(parameter.is_meta for parameter in model.parameters())
    # once forwards, once backwards; and once more for the first to see what blocks return
    assert max(count for block, count in residency.visits.items() if not block.endswith(".0")) == 2
    assert not list(tmp_path.rglob("*.state*")), "states of the walk are left behind"


class Killed(BaseException):
    pass


class Killing(GradientSums):
    """Dies at the n-th update."""

    left = 0

    def update(self, gradient):
        Killing.left -= 1
        if Killing.left == 0:
            raise Killed
        super().update(gradient)


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("updates", [1, 20, 40, 80, 100])
def test_a_killed_walk_goes_on_at_its_block(updates, spill, tmp_path):
    model, batches = stack_models.build("llama"), plain("llama")
    whole = gradient_walk(Task(model, Budget(0.5), batches=batches), "g", all_sums)
    Killing.left = updates  # 35 for each block: 7 layers, 5 samples
    with pytest.raises(Killed):
        gradient_walk(
            Task(model, Budget(0.5), batches=batches, journal=Journal(tmp_path, spill=spill)),
            "g",
            lambda layer: Killing(layer.site.matrix_shape, EVERY),
        )
    runs, seen = Counter(), []
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda module, args, output, index=index: runs.update([index]))

    def counting(layer):
        seen.append(layer.name)
        return all_sums(layer)

    task = Task(model, Budget(0.5), batches=batches, journal=Journal(tmp_path, spill=spill))
    section = gradient_walk(task, "g", counting)
    done = (updates - 1) // 35
    assert len(seen) == 7 * (3 - done)
    assert runs == {index: 1 + (5 if index < 3 - done else 0) for index in range(3)}  # the probe, and backwards
    for kind in EVERY:
        found = section.tensors(kind.value)
        assert all(torch.equal(found[name], value) for name, value in whole.tensors(kind.value).items())
    assert not list(tmp_path.rglob("*.state*"))
    seen.clear()
    gradient_walk(task, "g", counting)
    assert not seen


def test_a_walk_that_was_killed_on_its_way_to_the_loss_goes_on_there(tmp_path):
    model, batches = stack_models.build("llama"), plain("llama")
    whole = gradient_walk(Task(model, Budget(0.5), batches=batches), "g", all_sums)
    task = Task(model, Budget(0.5), batches=batches, journal=Journal(tmp_path))
    passes = Counter()

    def die(module, args, output):
        passes.update("f")
        if passes["f"] == 4:  # after the probe, at the third sample
            raise Killed

    hook = model.model.layers[2].mlp.register_forward_hook(die)
    with pytest.raises(Killed):
        gradient_walk(task, "g", all_sums)
    hook.remove()
    runs = Counter()
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda module, args, output, index=index: runs.update([index]))
    section = gradient_walk(replace(task, journal=Journal(tmp_path)), "g", all_sums)
    assert runs == {0: 6, 1: 6, 2: 11}  # the probe, backwards, and only the last one forwards again
    found = section.tensors("absolute")
    assert all(torch.equal(found[name], value) for name, value in whole.tensors("absolute").items())


def test_a_streamed_model_that_is_no_chain_is_refused():
    model = stack_models.build("t5")
    task = Task(model, Budget(0.5), batches=stack_models.batches_for("t5"), residency=Visiting(model, "block"))
    with pytest.raises((ModelError, DataError)):
        gradient_walk(task, "g", all_sums)


# --- numbers ------------------------------------------------------------------------------------


def test_opposite_gradients_add_up_and_do_not_cancel():
    """L = -log softmax(w x)[y]: with x and -x under swapped labels the two gradients are equal, not opposite."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2, bias=False)
            self.fc.weight = nn.Parameter(torch.zeros(2, 2))

        def forward(self, x):
            return self.fc(x)

    x = torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    batch = Batch((x,), target=torch.tensor([0, 1]))
    section = gradient_walk(Task(Two(), Budget(0.5), batches=[batch]), "g", all_sums)
    g = torch.tensor([[-0.5, -1.0], [0.5, 1.0]])  # softmax is 1/2 each: (1/2 - 1) x and 1/2 x
    torch.testing.assert_close(section.tensors("absolute")["fc.weight"], 2 * g.abs())
    torch.testing.assert_close(section.tensors("squares")["fc.weight"], 2 * g.square())
    torch.testing.assert_close(section.tensors("sum")["fc.weight"], torch.zeros(2, 2))


def test_half_precision_does_not_lose_small_gradients():
    """Gradients far below float16's smallest number: the same model in float32 tells what they are."""
    torch.manual_seed(0)
    config = tr.LlamaConfig(**stack_models.TEXT, **stack_models.SIZES, num_key_value_heads=2)
    model = tr.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.2)
        model.lm_head.weight.mul_(1e-5)
    half = stack_models.llama().half().eval()
    half.load_state_dict({name: value.half() for name, value in model.state_dict().items()})
    reference = stack_models.llama().eval()
    reference.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    found, expected = (
        gradient_walk(Task(one, Budget(0.5), batches=plain("llama")), "g", all_sums).tensors("absolute")
        for one in (half, reference)
    )
    for name, value in expected.items():
        assert found[name].dtype is torch.float32
        assert (found[name] - value).norm() < 0.05 * value.norm(), name
    ids = plain("llama")[0].args[0][:1]
    naive = torch.autograd.grad(half(ids, labels=ids).loss, [half.model.layers[0].self_attn.q_proj.weight])[0]
    assert (naive == 0).float().mean() > 0.1  # what plain half precision gives


def test_what_has_no_gradient_is_refused_with_advice():
    model = stack_models.build("llama")
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(torch.ones(24, 16, dtype=torch.int8), requires_grad=False)
    layer.forward = lambda x: x @ torch.ones(16, 24)
    task = Task(model, Budget(0.5), batches=plain("llama"))
    with pytest.raises(ModelError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds int8 .* before it is quant"):
        gradient_walk(task, "g", all_sums)
    section = gradient_walk(replace(task, exclude=("model.layers.1.mlp.up_proj",)), "g", all_sums)
    assert len(section.tensors("sum")) == 20


def test_infinite_gradients_name_their_layer():
    model = stack_models.build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e38)
    with pytest.raises(NumericsError, match=r"gradient of layer 'model\.layers\.2\."):
        gradient_walk(Task(model, Budget(0.5), batches=plain("llama")), "g", all_sums)


def test_data_without_labels_or_without_samples():
    images = stack_models.batches_for("timm-like")
    for batches, message in ((images, "no labels and is not text"), ([], "calibration data")):
        with pytest.raises(DataError, match=message):
            gradient_walk(Task(stack_models.build("timm-like"), Budget(0.5), batches=batches), "g", all_sums)
