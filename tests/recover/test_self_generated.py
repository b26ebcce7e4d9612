"""Recovery on answers of the unpruned model: who writes, what is learnt from, what stays of LoRA."""

import copy
import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from secateur import api, zoo
from secateur.core.errors import DataError, MissingExtraError, ModelError, NumericsError, OutputError, SettingsError
from secateur.core.plan import Plan
from secateur.core.progress import Silent
from secateur.data.dataset import DataKind, Dataset
from secateur.data.generation import Sampling, respond
from secateur.recover import Request, find
from secateur.recover import self_generated as sg
from secateur.shrink.apply import apply_

END = 10
FAST = sg.LoRA(steps=3, rank=2, warmup=1, lr=1e-2)


class Characters:
    """A tokenizer: the id of a character is its code, a line's end is the end token."""

    eos_token_id = END
    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1, *text.encode()] if add_special_tokens else list(text.encode())}

    def decode(self, ids):
        return bytes(ids).decode()


class Chat(Characters):
    """The same with a chat template."""

    chat_template = "there is one"

    def apply_chat_template(self, chat, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat) + "<assistant>"


def llama(seed=0, blocks=3):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=24, num_hidden_layers=blocks, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.4, bos_token_id=None, eos_token_id=END,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def exchange(prompt=(5, 6, 7), answer=(8, 9, END), finish=sg.STOPPED):
    return sg.Exchange("", "", tuple(prompt), tuple(answer), finish)


SOME = [exchange((5, 6, 7 + i), (20 + i, 30 + i, END)) for i in range(10)]


def test_the_unpruned_model_writes_and_the_end_token_is_kept():
    full, tokenizer = zoo.load_model("skills-llama"), Characters()
    prompts = ["tom saw the old cat>", "{[(>", "3+4-2>"]
    sampling = Sampling(temperature=0.9, top_p=0.95, limit=40)
    found = sg.self_generated(full, tokenizer, prompts, sampling, frame="{}", seed=1)
    ids = [[1, *prompt.encode()] for prompt in prompts]
    expected = respond(full, ids, sampling, stop=(END,), seed=1)
    assert [one.answer_ids for one in found] == [one.tokens for one in expected]
    assert [one.prompt_ids for one in found] == [tuple(prompt) for prompt in ids]
    for one in found:
        assert (one.finish == sg.STOPPED) is (one.answer_ids[-1] == END)
        assert END not in one.answer_ids[:-1]
        assert "\n" not in one.answer
    assert any(one.finish == sg.STOPPED for one in found)


def test_prompts_stand_in_the_chat_template_or_in_a_plain_frame():
    plain, chat = sg.prompt_ids(Characters(), "why"), sg.prompt_ids(Chat(), "why")
    assert bytes(plain) == b"\x01Question: why\nAnswer:"
    assert bytes(chat) == b"<system>You are a helpful assistant.<user>why<assistant>"
    assert bytes(sg.prompt_ids(Characters(), "why", frame="{}>")) == b"\x01why>"


def test_prompts_without_room_are_left_out():
    found = sg.self_generated(llama(), Characters(), ["a" * 63, "b", "c" * 62], Sampling(limit=3), frame="{}")
    assert [one.prompt for one in found] == ["b", "c" * 62]
    with pytest.raises(DataError, match="none of 1 prompts leaves room in the model's context of 64"):
        sg.self_generated(llama(), Characters(), ["a" * 64], frame="{}")


def test_answers_are_kept_as_lines_of_json(tmp_path):
    path = tmp_path / "answers.jsonl"
    made = sg.self_generated(llama(), Characters(), ["a", "b"], Sampling(limit=3), frame="{}", path=path)
    assert sg.read_exchanges(path) == made
    assert [item.name for item in tmp_path.iterdir()] == ["answers.jsonl"]
    with pytest.raises(OutputError, match="exists already"):
        sg.self_generated(llama(), Characters(), ["a"], path=path)
    with pytest.raises(OutputError, match="cannot write"):
        sg.write_exchanges(made, tmp_path / "no" / "answers.jsonl")
    path.write_text(path.read_text() + '{"prompt": "x"}\n')
    with pytest.raises(DataError, match="line 3 of"):
        sg.read_exchanges(path)
    with pytest.raises(DataError, match="cannot be read"):
        sg.read_exchanges(tmp_path / "other")


def test_cut_off_answers_are_dropped_unless_the_model_cannot_stop():
    cut, whole = exchange(finish=sg.CUT), exchange()
    assert sg.usable([cut, whole]) == [whole]
    assert sg.usable([cut, whole], stops=False) == [cut, whole]
    with pytest.raises(DataError, match="all 1 answers were cut off by the limit"):
        sg.usable([cut])


def test_given_answers_end_with_the_end_token():
    made = sg.exchange_of(Characters(), "a", "bc", (3, END), frame="{}")
    assert made.answer_ids == (*b"bc", END)
    assert made.finish == sg.STOPPED
    with pytest.raises(SettingsError, match="no end token"):
        sg.exchange_of(Characters(), "a", "bc", ())


def test_only_answers_have_labels_the_end_token_included():
    ids, labels = sg.padded([exchange(), exchange((5,), (END,))])
    assert ids.tolist() == [[5, 6, 7, 8, 9, END], [5, END, 0, 0, 0, 0]]
    assert labels.tolist() == [[-100, -100, -100, 8, 9, END], [-100, END, -100, -100, -100, -100]]


def test_the_loss_is_that_of_every_answer_alone():
    model = llama()
    pair = [exchange((5, 6, 7), (8, 9, END)), exchange((5,), (11, END))]
    with torch.no_grad():
        found = sg.answer_loss(model, *sg.padded(pair))
        singles = []
        for one in pair:
            logits = model(torch.tensor([[*one.prompt_ids, *one.answer_ids]])).logits[0].log_softmax(-1)
            start = len(one.prompt_ids)
            singles += [-logits[start - 1 + place, token].item() for place, token in enumerate(one.answer_ids)]
    assert found.item() == pytest.approx(sum(singles) / 5, abs=1e-5)


def test_tuning_learns_the_answers_and_leaves_a_plain_model():
    model = llama()
    before = copy.deepcopy(model)
    wanted = dict(model.named_parameters())
    model.lm_head.weight.requires_grad_(False)
    figures = sg.tune(model, SOME, sg.LoRA(steps=60, rank=8, warmup=5, lr=2e-2, held_out=0.0))
    assert figures["last_loss"] < 0.5 * figures["first_loss"]
    assert "validation_loss" not in figures
    assert model.state_dict().keys() == before.state_dict().keys()
    assert {name: type(part) for name, part in model.named_modules()} == {
        name: type(part) for name, part in before.named_modules()
    }
    assert all(parameter is wanted[name] for name, parameter in model.named_parameters())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    assert not model.training
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    linears = {f"{name}.weight" for name, part in before.named_modules() if isinstance(part, nn.Linear)}
    assert changed == linears - {"lm_head.weight"}
    delta = model.model.layers[1].mlp.up_proj.weight - before.model.layers[1].mlp.up_proj.weight
    assert 1 <= torch.linalg.matrix_rank(delta.detach(), atol=1e-4) <= 8


def test_tuning_depends_on_the_seed_and_not_on_the_surroundings():
    def tuned(seed):
        model = llama()
        torch.manual_seed(seed * 7 + 1)
        sg.tune(model, SOME, FAST, seed=seed % 2)
        return model.state_dict()["model.layers.0.mlp.up_proj.weight"]

    assert torch.equal(tuned(0), tuned(2))
    assert not torch.equal(tuned(0), tuned(1))


def test_held_out_answers_are_measured_and_not_learnt(monkeypatch):
    seen = []
    padded = sg.padded

    def spy(exchanges, pad=0):
        seen.append({one.prompt_ids for one in exchanges})
        return padded(exchanges, pad)

    monkeypatch.setattr(sg, "padded", spy)
    figures = sg.tune(llama(), SOME, FAST.model_copy(update={"held_out": 0.2, "batch": 4}))
    learnt, held_out = set().union(*seen[:3]), set().union(*seen[3:])
    assert len(held_out) == 2
    assert not learnt & held_out
    assert figures["validation_loss"] > 0


def test_the_rate_rises_and_stays(monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        rates.append((self.param_groups[0]["lr"], self.param_groups[0]["betas"], self.param_groups[0]["weight_decay"]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    sg.tune(llama(), SOME, sg.LoRA(steps=6, warmup=4))
    assert [rate for rate, _, _ in rates] == pytest.approx([5e-5, 1e-4, 1.5e-4, 2e-4, 2e-4, 2e-4])
    assert rates[0][1:] == ((0.9, 0.99), 1e-4)


def test_a_failing_tuning_leaves_the_model_as_it_was():
    model = llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NumericsError, match="at step 2"):
        sg.tune(model, SOME, sg.LoRA(steps=3, warmup=0, lr=1e30))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_peft_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"secateur\[peft\]"):
        sg.tune(llama(), SOME, FAST)


WINDOWS = Dataset("text", DataKind.TEXT, torch.randint(11, 120, (24, 16), generator=torch.Generator().manual_seed(0)))
SMALL = {"steps": 3, "rank": 2, "prompt": 4, "responses": 10, "limit": 40}


def request(**changes):
    full = llama()
    plan = api.plan(full, "layer_limits", 0.34, data=WINDOWS, selector="reverse")
    pruned = apply_(copy.deepcopy(full), plan)
    return Request(
        **{"model": pruned, "plan": plan, "data": WINDOWS, "seed": 0, "progress": Silent(), "dense": full} | changes
    )


def test_the_recovery_asks_the_unpruned_model(monkeypatch):
    entry, asked = find("self_generated"), request()
    writers, respond_as_before = [], sg.respond

    def spy(model, *args, **kwargs):
        writers.append(model)
        return respond_as_before(model, *args, **kwargs)

    monkeypatch.setattr(sg, "respond", spy)
    dense = copy.deepcopy(asked.dense.state_dict())
    figures = entry.run(asked, entry.configure(SMALL))
    assert writers == [asked.dense]
    assert all(torch.equal(value, dense[name]) for name, value in asked.dense.state_dict().items())
    assert figures["answers"] + figures["answers_cut_off"] == 10
    assert figures["answers"] > 0
    assert len(asked.model.model.layers) == 2


def test_a_model_that_cannot_stop_is_tuned_on_all_answers():
    full = llama()
    for config in (full.config, full.generation_config):
        config.eos_token_id = None
    asked = request(dense=full)
    figures = find("self_generated").run(asked, find("self_generated").configure({**SMALL, "limit": 5}))
    assert (figures["answers"], figures["answers_cut_off"]) == (10, 0)


def test_requests_that_make_no_sense_are_refused():
    entry = find("self_generated")
    settings, asked = entry.configure(SMALL), request()
    with pytest.raises(SettingsError, match=r"needs the unpruned model"):
        entry.run(request(dense=None), settings)
    with pytest.raises(SettingsError, match="not the pruned one itself"):
        entry.run(request(dense=asked.model, model=asked.model), settings)
    weights = api.plan(llama(), "global_magnitude", 0.5)
    with pytest.raises(SettingsError, match="would fill removed weights"):
        entry.run(request(plan=weights), settings)
    images = Dataset("images", DataKind.IMAGE, torch.zeros(2, 1, 4, 4))
    with pytest.raises(ModelError, match="'images' holds no windows"):
        entry.run(request(data=images), settings)
    with pytest.raises(DataError, match="no answers"):
        sg.tune(llama(), [], FAST)
    with pytest.raises(SettingsError, match="temperature"):
        entry.configure({"temperature": 0})  # greedy answers are not what the method learns from
    assert isinstance(asked.plan, Plan)
