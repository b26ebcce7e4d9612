"""Tasks: accuracies of models that are known to be right or wrong, with several tokenizers, and the report."""

import pytest
import torch
from torch import nn

from secateur import zoo
from secateur.core.errors import DataError, SettingsError
from secateur.data.skills import Question
from secateur.measure import paired_quality, tasks
from secateur.measure.tasks import How, LanguageTask, run_task


class Characters:
    """A tokenizer: the id of a character is its code; `first` and `last` stand around the ids if asked."""

    eos_token_id = 10

    def __init__(self, first=(), last=()):
        self.first, self.last = list(first), list(last)

    def __call__(self, text, add_special_tokens=True):
        ids = list(text.encode())
        return {"input_ids": [*self.first, *ids, *self.last] if add_special_tokens else ids}

    def decode(self, ids):
        return bytes(ids).decode()


class Pairs(Characters):
    """Two characters make one token where they can: options of one length have different numbers of tokens."""

    def __call__(self, text, add_special_tokens=True):
        codes, ids = list(text.encode()), []
        while codes:
            one = codes.pop(0)
            ids.append(one * 128 + codes.pop(0) if codes and one % 2 else one)
        return {"input_ids": ids}

    def decode(self, ids):
        return "".join(chr(i) if i < 128 else chr(i // 128) + chr(i % 128) for i in ids)


class Parrot(nn.Module):
    """Knows some texts by heart: after a known beginning comes what follows, otherwise a `?`."""

    def __init__(self, tokenizer, texts, size=128):
        super().__init__()
        self.known = [tokenizer(text)["input_ids"] for text in texts]
        self.size = size

    def forward(self, ids):
        out = torch.zeros(*ids.shape, self.size)
        for row, sequence in enumerate(ids.tolist()):
            for place in range(len(sequence)):
                out[row, place, self.next(sequence[: place + 1])] = 9
        return out

    def next(self, so_far):
        for known in self.known:
            if known[: len(so_far)] == so_far and len(known) > len(so_far):
                return known[len(so_far)]
        return ord("?")


QUESTIONS = (
    Question("one>", "ab", ("ab", "ax", "abcd")),
    Question("two>", "cd", ("ab", "cd", "zz")),
    Question("six>", "ef", ("ef", "xf", "?")),
)


@pytest.mark.parametrize("tokenizer", [Characters(), Pairs(), Characters(first=[1]), Characters(last=[10])])
def test_choices_are_by_likelihood(tokenizer):
    texts = ["one>ab", "two>cd"]
    model = Parrot(tokenizer, texts, 128 * 128)
    if tokenizer.last:
        model.known = [known[:-1] for known in model.known]
    found = run_task(model, tokenizer, LanguageTask("three", How.CHOICE, QUESTIONS))
    assert found.answers == ("ab", "cd", "?")
    assert found.quality.values.tolist() == [1, 1, 0]
    assert found.accuracy == pytest.approx(2 / 3)


def test_a_choice_s_likelihood_is_the_sum_over_its_tokens():
    tokenizer = Characters()
    model = Parrot(tokenizer, ["one>ab"])
    found = run_task(model, tokenizer, LanguageTask("one", How.CHOICE, QUESTIONS[:1]))
    sure = 9 - torch.tensor([9.0] + [0.0] * 127).double().logsumexp(0)
    assert found.margins.item() == pytest.approx(2 * sure.item(), abs=1e-5)


@pytest.mark.parametrize("tokenizer", [Characters(), Pairs()])
def test_generation_is_right_where_the_whole_answer_is(tokenizer):
    model = Parrot(tokenizer, ["one>ab\n", "two>cdx\n", "six>e\nf"], 128 * 128)
    found = run_task(model, tokenizer, LanguageTask("three", How.GENERATION, QUESTIONS))
    assert found.answers[:2] == ("ab", "cdx")
    assert found.answers[2] == "e"
    assert found.quality.values.tolist() == [1, 0, 0]


def test_worked_examples_stand_before_every_prompt_and_are_not_asked():
    task = tasks.copying(20, seed=0, shots=3)
    assert task.frame.count("\n") == 3
    assert not set(task.examples) & set(task.questions)
    assert tasks.copying(20, seed=0).questions == task.questions
    tokenizer = Characters()
    shown = f"{task.frame}{task.questions[0].prompt}"
    model = Parrot(tokenizer, [shown + task.questions[0].answer + "\n"])
    assert run_task(model, tokenizer, task).quality.values.tolist() == [1] + [0] * 19


def test_results_pair_and_have_intervals():
    tokenizer = Characters()
    task = LanguageTask("three", How.CHOICE, QUESTIONS)
    good, bad = (
        run_task(Parrot(tokenizer, texts), tokenizer, task) for texts in (["one>ab", "two>cd"], ["one>ax", "two>zz"])
    )
    assert bad.accuracy == 0
    assert paired_quality(good.quality, bad.quality).difference == pytest.approx(-2 / 3)
    assert good.interval is not None
    assert tasks.relative(bad, good) == 0
    assert tasks.relative(good, bad) == 0  # of a full model that gets nothing right


def test_a_report_needs_generation_and_always_shows_degeneration():
    tokenizer = Characters()
    model = Parrot(tokenizer, ["one>ab\n", "two>cdcdcdcd\n"])
    choice, writing = (LanguageTask(how.value, how, QUESTIONS) for how in (How.CHOICE, How.GENERATION))
    with pytest.raises(SettingsError, match=r"tasks of choice.*arithmetic"):
        tasks.abilities(model, tokenizer, [choice])
    found = tasks.abilities(model, tokenizer, [choice, writing])
    shown = found.table(found)
    for word in ("choice (choice)", "generation (generation)", "rep-2", "rep-4", "self-BLEU", "mean length"):
        assert word in shown
    assert "perplexity" not in shown
    # `ab`; `cdcdcdcd`; 64 times `?`
    assert found.degeneration.rep[2] == pytest.approx(100 * (0 + 5 / 7 + 62 / 63) / 3)
    assert found.degeneration.length == pytest.approx((2 + 8 + 64) / 3)
    assert found.retained(found) == {"choice": 1.0, "generation": 1.0}
    assert found.to_json()["tasks"]["generation"]["value"] == pytest.approx(1 / 3)


def test_fitness_is_the_mean_share_of_the_full_model_s_accuracy():
    tokenizer = Characters()
    full = Parrot(tokenizer, ["one>ab\n", "two>cd\n"])
    half = Parrot(tokenizer, ["one>ab\n"])
    both = [LanguageTask("choice", How.CHOICE, QUESTIONS), LanguageTask("generation", How.GENERATION, QUESTIONS)]
    fitness = tasks.task_fitness(full, tokenizer, both)
    assert fitness(full) == 1
    assert fitness(half) == pytest.approx(0.5)


def test_malformed_tasks_are_refused():
    with pytest.raises(DataError, match="no questions"):
        LanguageTask("none", How.CHOICE, ())
    with pytest.raises(DataError, match=r"'no' to 'p' is not among its options"):
        LanguageTask("odd", How.CHOICE, (Question("p", "no", ("a",)),))
    empty = LanguageTask("empty", How.CHOICE, (Question("p", "", ("", "a")),))
    with pytest.raises(DataError, match="the option '' has no token"):
        run_task(Parrot(Characters(), []), Characters(), empty)


def test_built_in_tasks_run_with_a_shipped_model_that_never_saw_them():
    from transformers import AutoTokenizer

    model, tokenizer = zoo.load_model("pydoc-llama"), AutoTokenizer.from_pretrained(zoo.folder("pydoc-llama"))
    text = "".join(map(chr, zoo.load_data("pydoc").evaluation.inputs[:30].flatten().tolist()))
    cloze = run_task(model, tokenizer, tasks.cloze(text, 40, context=60))
    assert 0.4 < cloze.accuracy < 1  # four options: chance is 0.25
    assert tasks.unbalanced(run_task(model, tokenizer, tasks.brackets(4))) > 0
