"""Generated questions: right by an independent look, the same for the same seed, refused where there are too few."""

import re

import pytest
import torch

from secateur.core.errors import DataError
from secateur.core.seeding import generator
from secateur.data import skills

MANY = 200


def drawn(kind):
    return skills.questions(kind.__name__, kind, MANY, seed=3)


def test_brackets_are_closed_by_the_answer_and_by_nothing_shorter():
    for question in drawn(skills.brackets):
        text = question.prompt.removesuffix(skills.ASK) + question.answer
        while (shorter := re.sub(r"\(\)|\[\]|\{\}", "", text)) != text:
            text = shorter
        assert not text
        assert 1 <= len(question.answer) <= 5
        assert skills.unbalanced(question.prompt + question.answer[:-1])
        assert not skills.unbalanced(question.prompt + question.answer)


@pytest.mark.parametrize(
    ("text", "wrong"), [("([)]", True), (")(", True), ("a(b)c>{}", False), ("(", True), ("", False)]
)
def test_unbalanced_brackets_are_seen(text, wrong):
    assert skills.unbalanced(text) is wrong


def test_arithmetic_goes_from_left_to_right_and_every_step_is_true():
    for question in drawn(skills.arithmetic):
        value, *rest = re.findall(r"^\d|[-+*]\d", question.prompt)
        value, steps = int(value), question.answer.split(";")
        assert len(steps) == len(rest) == 3
        for step, operation in zip(steps, rest, strict=True):
            left, right = step.split("=")
            assert left == f"{value}{operation}"
            value = eval(left)
            assert int(right) == value
            assert 0 <= value <= skills.LARGEST


def test_the_probe_asks_for_the_first_digit_behind_the_sign():
    for question in drawn(skills.last_result):
        assert question.options == tuple("0123456789")
        last = question.prompt.rpartition(">")[2].split(";")[-1]
        assert str(eval(last.removesuffix("=")))[0] == question.answer
    assert skills.first_digit("3-15=", -12) == skills.Question("3-15=-", "1", tuple("0123456789"))


def test_copies_and_labels_are_true():
    for question in drawn(skills.copying):
        assert question.prompt == question.answer + ">"
    for question in drawn(skills.labels):
        thing = question.prompt.removesuffix(">").split()[-1]
        assert [label for label, things in skills.LABELS.items() if thing in things] == [question.answer]
        assert question.options == tuple(skills.LABELS)


def test_questions_depend_on_seed_and_kind_only_and_are_distinct():
    first = skills.questions("x", skills.copying, 20, seed=0)
    assert first == skills.questions("x", skills.copying, 50, seed=0)[:20]
    assert first != skills.questions("x", skills.copying, 20, seed=1)
    assert first != skills.questions("y", skills.copying, 20, seed=0)
    assert len(set(drawn(skills.brackets))) == MANY


def test_too_many_questions_are_refused():
    def coin(rng):
        return skills.Question(str(int(torch.randint(2, (1,), generator=rng))), "a")

    assert len(skills.questions("coin", coin, 2, 0)) == 2
    with pytest.raises(DataError, match="only 2 different questions of coin"):
        skills.questions("coin", coin, 3, 0)
    assert len(skills.questions("coin", coin, 5, 0, distinct=False)) == 5
    with pytest.raises(DataError, match="1 question or more"):
        skills.questions("coin", coin, 0, 0)


TEXT = "we saw one red cat and two old dog and ten big hen but not any new fox near our own den for now " * 3


def test_cloze_offers_the_true_next_word_among_words_of_its_length_from_the_text():
    for question in skills.cloze(TEXT, 30, seed=0, context=20):
        assert question.answer in question.options
        assert len(set(question.options)) == 4
        assert {len(option) for option in question.options} == {len(question.answer)}
        assert all(option[1:] in TEXT.split() for option in question.options)
        assert question.prompt + question.answer in TEXT
        assert not question.prompt.endswith(" ")
        assert len(question.prompt) <= 20
        assert f" {question.prompt}" in f" {TEXT}"
    assert skills.cloze(TEXT, 5, seed=0, context=20) == skills.cloze(TEXT, 5, seed=0, context=20)
    assert skills.cloze(TEXT, 5, seed=0, context=20) != skills.cloze(TEXT, 5, seed=1, context=20)


def test_cloze_needs_enough_words():
    with pytest.raises(DataError, match="words that suit a cloze question, 1000 were asked for"):
        skills.cloze(TEXT, 1000, seed=0)
    with pytest.raises(DataError, match="0 words"):
        skills.cloze("no", 1, seed=0)


def test_generators_of_two_questions_differ():
    rng = generator(0, "x")
    assert len({skills.arithmetic(rng) for _ in range(10)}) > 5
