"""KL to the dense model on drawn samples: the formula, minibatches, and the traps around them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import zoo
from secateur.core.errors import DataError
from secateur.core.journal import Journal
from secateur.core.method import Batch
from secateur.core.progress import Silent
from secateur.core.seeding import generator
from secateur.data.batches import forward
from secateur.search.fitness import Comparison, Minibatch, Objective, Samples, Target, Teacher, divergence


def text(samples: int = 6, length: int = 10, size: int = 4, seed: int = 0) -> list[Batch]:
    tokens = torch.randint(0, 128, (samples, length), generator=torch.Generator().manual_seed(seed))
    return [Batch((part,)) for part in tokens.split(size)]


class TestDivergence:
    def test_by_hand(self) -> None:
        teacher, student = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.0, 1.0, 5.0]])
        p, q = teacher[0].softmax(0), student[0].softmax(0)
        expected = float((p * (p / q).log()).sum())
        assert divergence(student, teacher, None).item() == pytest.approx(expected, rel=1e-6)
        p, q = teacher[0, :2].softmax(0), student[0, :2].softmax(0)  # both among the teacher's two highest
        expected = float((p * (p / q).log()).sum())
        values, index = teacher.topk(2)
        assert divergence(student, values, index).item() == pytest.approx(expected, rel=1e-6)

    def test_zero_only_for_the_same_distribution(self) -> None:
        logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0))
        assert divergence(logits + 7, logits, None).abs().max() < 1e-6
        assert divergence(logits * 1.1, logits, None).min() > 1e-4


class TestDraw:
    @given(st.integers(1, 70), st.integers(0, 99))
    def test_exactly_as_many_tokens_as_asked_and_no_sample_twice(self, size: int, seed: int) -> None:
        samples = Samples(text())
        found = samples.draw(size, generator(seed, "draw"))
        tokens = sum(batch.args[0].numel() for batch in found.batches)
        # one token alone predicts nothing
        assert tokens == min(size, 60) - (1 if size < 60 and size % 10 == 1 and size > 1 else 0) or size == 1
        drawn = [index for group in found.samples for index in group]
        assert len(set(drawn)) == len(drawn)
        for batch, group, length in zip(found.batches, found.samples, found.lengths, strict=True):
            whole = torch.cat([samples.items[index].args[0] for index in group])
            assert torch.equal(batch.args[0], whole[:, :length])
            assert len(group) <= 4

    def test_draws_differ_and_reach_everything(self) -> None:
        samples, seen = Samples(text()), Counter[int]()
        for number in range(60):
            seen.update(index for group in samples.draw(20, generator(0, str(number))).samples for index in group)
        assert set(seen) == set(range(6))
        assert max(seen.values()) < 2 * min(seen.values())

    def test_samples_without_tokens_count_one_each(self) -> None:
        images = [Batch((torch.randn(5, 3, 4, 4),))]
        assert [batch.samples for batch in Samples(images).draw(3, generator(0, "x")).batches] == [3]

    def test_masks_are_cut_with_their_tokens(self) -> None:
        ids, mask = torch.arange(10)[None], torch.ones(1, 10, dtype=torch.int64)
        samples = Samples([Batch(kwargs={"input_ids": ids, "attention_mask": mask})])
        (batch,) = samples.draw(4, generator(0, "x")).batches
        assert batch.kwargs["input_ids"].tolist() == [[0, 1, 2, 3]]
        assert batch.kwargs["attention_mask"].shape == (1, 4)

    def test_no_data(self) -> None:
        with pytest.raises(DataError, match="needs data"):
            Samples([])


def compared(objective: Objective, minibatch: Minibatch | None = None, scale: float = 0.5) -> tuple[float, nn.Module]:
    """The fitness of a Llama whose second block lost a part, and that model."""
    model, data = zoo.load_model("pydoc-llama").eval(), text()
    blocks = list(model.model.layers)  # type: ignore[union-attr, arg-type]
    samples = Samples(data)
    teacher = Teacher(objective, samples, Journal().section("t"), len(blocks))
    teacher.ask(model, blocks, Silent())

    def assemble(levels: tuple[int, ...]) -> int:
        with torch.no_grad():
            blocks[1].mlp.down_proj.weight.mul_(scale)
        return 1

    whole = minibatch or samples.draw(10**6, generator(0, "all"))
    (found,) = Comparison(model, blocks, whole, teacher).fitness([(0,)], assemble)
    return found, model


def states_of(model: nn.Module) -> list[Tensor]:
    """What each block gives."""
    found: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: found.append(out if isinstance(out, Tensor) else out[0]))
        for block in model.model.layers  # type: ignore[union-attr]
    ]
    with torch.no_grad():
        model(torch.cat([batch.args[0] for batch in text()]))
    for hook in hooks:
        hook.remove()
    return found


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat([forward(model, batch) for batch in text()])


class TestComparison:
    def test_mean_over_tokens_without_the_last_position(self) -> None:
        dense = logits_of(zoo.load_model("pydoc-llama").eval())
        for objective, k in [(Objective(Target.KL), 128), (Objective(topk=9), 9), (Objective(topk=10**6), 128)]:
            found, model = compared(objective)
            values, index = dense[:, :-1].topk(k)
            own = logits_of(model)[:, :-1].gather(-1, index).log_softmax(-1).flatten(0, 1)
            expected = F.kl_div(own, values.log_softmax(-1).flatten(0, 1), reduction="batchmean", log_target=True)
            assert found == pytest.approx(float(expected), rel=1e-4)
            assert found > 1e-4

    def test_nothing_changed_is_zero(self) -> None:
        assert compared(Objective(topk=16), scale=1.0)[0] == pytest.approx(0, abs=1e-6)

    def test_perplexity_is_of_the_text_itself(self) -> None:
        found, model = compared(Objective(Target.PPL))
        tokens = torch.cat([batch.args[0] for batch in text()])
        loss = F.cross_entropy(logits_of(model)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert found == pytest.approx(float(loss.exp()), rel=1e-5)

    def test_hidden_states_are_added(self) -> None:
        """First, middle and last block; the first is before the change."""
        dense, changed = zoo.load_model("pydoc-llama").eval(), compared(Objective())[1]
        apart = sum(
            float((one - other)[:, :-1].square().sum(-1).mean())
            for block, (one, other) in enumerate(zip(states_of(dense), states_of(changed), strict=True))
            if block in (0, 2, 3)
        )
        plain = compared(Objective())[0]
        assert apart > 0.01
        assert compared(Objective(alpha=3.0, beta=2.0))[0] == pytest.approx(2 * plain + 3 * apart, rel=1e-3)
        assert compared(Objective(alpha=1.0, beta=0.0, depths=(0.0,)))[0] == pytest.approx(0, abs=1e-6)

    def test_a_cut_sample_counts_by_its_tokens(self) -> None:
        samples = Samples(text())
        minibatch = samples.draw(14, generator(0, "cut"))
        assert [batch.args[0].shape[1] for batch in minibatch.batches] == [10, 4]
        found, model = compared(Objective(Target.KL), minibatch)
        dense = zoo.load_model("pydoc-llama").eval()
        parts = []
        with torch.no_grad():
            for batch in minibatch.batches:
                one, other = (forward(each, batch)[:, :-1] for each in (dense, model))
                parts.append(F.kl_div(other.log_softmax(-1), one.log_softmax(-1), reduction="none", log_target=True))
        assert found == pytest.approx(float(torch.cat([part.sum(-1).flatten() for part in parts]).mean()), rel=1e-4)

    def test_padding_does_not_count(self) -> None:
        ids = torch.randint(0, 128, (2, 10), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        values = []
        for tail in (0, 77):
            ids[1, 4:] = tail
            samples = Samples([Batch(kwargs={"input_ids": ids.clone(), "attention_mask": mask})])
            teacher = Teacher(Objective(Target.KL), samples, Journal().section("t"), 0)
            model = zoo.load_model("pydoc-llama").eval()
            teacher.ask(model, [], Silent())
            with torch.no_grad():
                model.model.layers[0].mlp.down_proj.weight.mul_(0.5)  # type: ignore[union-attr, index]
            minibatch = samples.draw(100, generator(0, "x"))
            values += Comparison(model, [], minibatch, teacher).fitness([(0,)], lambda levels: 0)
        assert values[0] == pytest.approx(values[1], rel=1e-5)
        assert values[0] > 1e-4

    def test_perplexity_needs_text(self) -> None:
        model, data = zoo.load_model("digits-vit").eval(), zoo.load_data("digits", samples=4)
        samples = Samples(list(data.calibration.batches(4)))
        teacher = Teacher(Objective(Target.PPL), samples, Journal().section("t"), 0)
        with pytest.raises(DataError, match="fitness=kl"):
            Comparison(model, [], samples.draw(4, generator(0, "x")), teacher).fitness([(0,)], lambda levels: 0)

    def test_classifiers_are_compared_on_all_their_logits(self) -> None:
        model, data = zoo.load_model("digits-vit").eval(), zoo.load_data("digits", samples=4)
        (batch,) = data.calibration.batches(4)
        samples = Samples([batch])
        teacher = Teacher(Objective(), samples, Journal().section("t"), 0)
        teacher.ask(model, [], Silent())
        with torch.no_grad():
            dense = forward(model, batch)
            for parameter in model.vit.layers[0].parameters():  # type: ignore[union-attr, index]
                parameter.mul_(0.5)
            changed = forward(model, batch)
        found = Comparison(model, [], samples.draw(4, generator(0, "x")), teacher).fitness([(0,)], lambda levels: 0)
        expected = F.kl_div(changed.log_softmax(-1), dense.log_softmax(-1), reduction="batchmean", log_target=True)
        assert found == [pytest.approx(float(expected), rel=1e-4)]


def test_candidates_come_back_in_the_order_given() -> None:
    model = zoo.load_model("pydoc-llama").eval()
    samples = Samples(text(2))
    teacher = Teacher(Objective(), samples, Journal().section("t"), 0)
    teacher.ask(model, [], Silent())
    weight = model.model.layers[3].mlp.down_proj.weight  # type: ignore[union-attr, index]
    original, seen = weight.detach().clone(), []

    def assemble(levels: tuple[int, ...]) -> int:
        seen.append(levels)
        weight.data = original * (1 - levels[0] / 10)
        return 0

    values = Comparison(model, [], samples.draw(99, generator(0, "x")), teacher).fitness([(5,), (0,), (2,)], assemble)
    assert seen == [(0,), (2,), (5,)]
    assert values[0] > values[2] > values[1] == pytest.approx(0, abs=1e-6)
