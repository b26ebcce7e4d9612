"""Degeneration figures against hand-computed cases."""

import math

import pytest

from secateur.measure.degeneration import bleu, degeneration, rep_n, self_bleu, sentences


@pytest.mark.parametrize(
    ("text", "order", "percent"),
    [
        ("aaaa", 2, 100 * (1 - 1 / 3)),  # aa aa aa
        ("abab", 2, 100 * (1 - 2 / 3)),  # ab ba ab
        ("abcabc", 3, 100 * (1 - 3 / 4)),  # abc bca cab abc
        ("abcd", 4, 0.0),
        ("abc", 4, None),
        ("", 2, None),
    ],
)
def test_rep_n_is_the_share_of_n_grams_seen_before(text, order, percent):
    found = rep_n(text, order)
    assert found is percent if percent is None else found == pytest.approx(percent)


def test_sentences_end_with_a_sign_and_a_space_or_with_the_line():
    assert sentences("One two. Three!\nfour 3.5 five") == [
        ["One", "two", "."],
        ["Three", "!"],
        ["four", "3", ".", "5", "five"],
    ]


def test_bleu_of_the_same_sentence_is_one_and_of_other_words_zero():
    words = ["the", "cat", "sat", "on", "the", "mat"]
    assert bleu(words, [words]) == pytest.approx(1)
    assert bleu(words, [["dogs", "run", "far", "away"]]) == 0


def test_bleu_by_hand_with_clipping_smoothing_and_brevity():
    """`a b c d` against `a b x y z`: 1-grams 2/4, 2-grams 1/3, no common 3- and 4-gram of 2 and 1; e^(1 - 5/4)."""
    expected = math.exp(1 - 5 / 4) * (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25
    assert bleu(list("abcd"), [list("abxyz")]) == pytest.approx(expected)


def test_a_word_counts_no_more_often_than_in_one_reference():
    """Of `a a a a` two count in `a a b c` (not three in both together); no 3-gram of 2, no 4-gram of 1."""
    expected = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25
    assert bleu(list("aaaa"), [list("aabc"), list("abcd")]) == pytest.approx(expected)


def test_the_closest_reference_counts_and_of_two_the_shorter():
    close, far = list("abcde"), list("abcdefghij")
    assert bleu(list("abcd"), [far, close]) == pytest.approx(math.exp(1 - 5 / 4))
    assert bleu(list("abcdef"), [list("abcdef12"), list("abcd")]) > math.exp(1 - 8 / 6)


def test_self_bleu_leaves_short_sentences_out():
    assert self_bleu("one two three four. one two three four.") == pytest.approx(1)
    assert self_bleu("one two three four five. no.") is None
    assert self_bleu("one two three four. no. one two three four.") == pytest.approx(1)
    expected = (bleu(list("abcd"), [list("abxyz")]) + bleu(list("abxyz"), [list("abcd")])) / 2
    assert self_bleu("a b c d\na b x y z") == pytest.approx(expected)


def test_figures_are_means_over_the_texts_that_have_them():
    found = degeneration(["a a a a", "a b", "a"])
    assert found.rep == {2: pytest.approx(100 * (2 / 3 + 0) / 2), 3: pytest.approx(50.0), 4: 0.0}
    assert found.self_bleu is None
    assert found.length == pytest.approx(7 / 3)
    assert found.texts == 3
    assert degeneration(["x"], [[1, 1, 1]]).rep[2] == pytest.approx(50)
    assert degeneration([]).to_json()["length"] == 0
