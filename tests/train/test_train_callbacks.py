"""Transformers' Trainer and Lightning drive the same sparsifier as a plain loop."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from secateur.callbacks import hf_callback, lightning_callback
from secateur.core.errors import ModelError, PlanError
from secateur.core.method import Method, Protocol
from secateur.methods import methods
from secateur.train.part import Part

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pl = pytest.importorskip("pytorch_lightning")

ASKED = {"every": 2}


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def texts():
    rng = torch.Generator().manual_seed(0)
    return [{"input_ids": row, "labels": row} for row in torch.randint(32, (48, 8), generator=rng)]


def hf_trainer(model, home, callback, **more):
    given = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"} | more
    arguments = transformers.TrainingArguments(
        output_dir=str(home), use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=0, **given
    )
    return transformers.Trainer(model, arguments, train_dataset=texts(), callbacks=[callback])


def zeros(model, plan):
    return sum(int((model.get_parameter(name)[~mask] != 0).sum()) for name, mask in plan.masks.items())


@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2}], ids=["plain", "accumulated"])
def test_trainer_ends_exactly_on_target(more, tmp_path):
    model = llama()
    callback = hf_callback("granet", 0.8, **ASKED)
    hf_trainer(model, tmp_path, callback, save_strategy="no", **more).train()
    plan = callback.plan
    assert callback.sparsifier.step == 12
    assert plan.units()[0] == callback.sparsifier.target
    assert zeros(model, plan) == 0
    assert plan.provenance[0].settings["every"] == 2


def test_a_resumed_trainer_equals_the_straight_one(tmp_path):
    straight = llama()
    first = hf_callback("granet", 0.8, initial_density=0.5, **ASKED)
    hf_trainer(straight, tmp_path / "a", first, save_steps=6).train()
    again = llama()
    second = hf_callback("granet", 0.8, initial_density=0.5, **ASKED)
    hf_trainer(again, tmp_path / "a", second, save_steps=6).train(
        resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6")
    )
    assert all(torch.equal(first.plan.masks[n], second.plan.masks[n]) for n in first.plan.masks)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), again.parameters(), strict=True))


def test_a_checkpoint_without_our_state_is_refused(tmp_path):
    hf_trainer(llama(), tmp_path, transformers.TrainerCallback(), save_steps=6).train()
    later = hf_trainer(llama(), tmp_path, hf_callback("granet", 0.8, **ASKED))
    with pytest.raises(PlanError, match="holds no sparsifier state"):
        later.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


class Counting(Part):
    has_penalty = True
    calls = 0

    def penalty(self, run):
        type(self).calls += 1
        return 0.0 * next(run.model.parameters()).sum() + 1.0


@pytest.fixture
def penalising(monkeypatch):
    """A method with a penalty, for as long as a test runs."""
    likeness = methods()["granet"]
    fields = {name: getattr(likeness, name) for name in likeness.__dataclass_fields__}
    fields |= {"name": "penalising", "kind": Protocol.SPARSIFIER, "parts": lambda order, settings: [Counting()]}
    monkeypatch.setitem(methods(), "penalising", Method(**fields))
    monkeypatch.setattr(Counting, "calls", 0)


def test_trainer_s_loss_contains_the_penalty(penalising, tmp_path):
    hf_trainer(llama(), tmp_path, hf_callback("penalising", 0.5), save_strategy="no", max_steps=3).train()
    assert Counting.calls == 3
    model = llama()
    callback = hf_callback("penalising", 0.5)
    trainer = hf_trainer(model, tmp_path, callback, save_strategy="no", max_steps=1)
    trainer.compute_loss = lambda model, inputs, **_: model(inputs["input_ids"]).logits.sum()
    with pytest.raises(ModelError, match="returns none; give it labels"):
        trainer.train()


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch, index):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def loader():
    rng = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(48, 6, generator=rng), torch.randint(3, (48,), generator=rng))
    return DataLoader(data, 4)


def lightning(home, callback, **more):
    return pl.Trainer(
        default_root_dir=str(home),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **{"max_epochs": 2, "enable_checkpointing": False} | more,
    )


def test_lightning_ends_exactly_on_target_as_a_plain_loop_does(tmp_path):
    module, callback = Module(), lightning_callback("granet", 0.8, **ASKED)
    lightning(tmp_path, callback, gradient_clip_val=0.5).fit(module, loader())
    assert callback.sparsifier.step == 24
    assert callback.plan.units()[0] == callback.sparsifier.target
    assert zeros(module, callback.plan) == 0
    import secateur as sc

    plain = Module()
    optimizer = plain.configure_optimizers()
    sparsifier = sc.sparsify(plain, optimizer, "granet", 0.8, steps=24, **ASKED)
    for _ in range(2):
        for batch in loader():
            optimizer.zero_grad()
            plain.training_step(batch, 0).backward()
            sparsifier.after_backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
            optimizer.step()
    expected = sparsifier.finish()
    assert all(torch.equal(expected.masks[n], callback.plan.masks[n]) for n in expected.masks)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), plain.parameters(), strict=True))


def test_a_resumed_lightning_run_equals_the_straight_one(tmp_path):
    straight, first = Module(), lightning_callback("granet", 0.8, initial_density=0.5, **ASKED)
    keeper = pl.callbacks.ModelCheckpoint(dirpath=tmp_path, filename="half", every_n_train_steps=12, save_top_k=-1)
    trainer = lightning(tmp_path, first, enable_checkpointing=True)
    trainer.callbacks.append(keeper)
    trainer.fit(straight, loader())
    again, second = Module(), lightning_callback("granet", 0.8, initial_density=0.5, **ASKED)
    lightning(tmp_path, second).fit(again, loader(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert all(torch.equal(first.plan.masks[n], second.plan.masks[n]) for n in first.plan.masks)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), again.parameters(), strict=True))


def test_lightning_s_loss_contains_the_penalty(penalising, tmp_path):
    lightning(tmp_path, lightning_callback("penalising", 0.5), max_epochs=1).fit(Module(), loader())
    assert Counting.calls == 12
