"""Windows of tokens: what is drawn, what is held out, and what is refused."""

from __future__ import annotations

import pytest
import torch
from data_samples import Characters, Warns, numbered
from hypothesis import given
from hypothesis import strategies as st

from secateur.core.errors import DataError
from secateur.data import text as module
from secateur.data.dataset import DataKind
from secateur.data.text import calibration_windows, evaluation_windows, hold_out, text_splits, tokenize


def test_evaluation_windows_are_consecutive_and_drop_the_rest() -> None:
    assert evaluation_windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert evaluation_windows(torch.arange(11), 4, limit=1).tolist() == [[0, 1, 2, 3]]
    assert evaluation_windows(torch.arange(4), 4, limit=9).tolist() == [[0, 1, 2, 3]]


def test_evaluation_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(DataError, match="holds 3 tokens but one window needs 4"):
        evaluation_windows(torch.arange(3), 4)


def test_calibration_windows_are_pieces_of_documents_with_more_tokens_than_a_window() -> None:
    documents = ["a" * 8, "b" * 7, numbered(20), "c"]
    drawn = calibration_windows(documents, Characters(), 8, 40, seed=0)
    assert drawn.tokens.shape == (40, 8)
    assert drawn.tokens.dtype == torch.int64
    assert not drawn.packed
    # the document of exactly 8 tokens is rejected, so all windows are runs of the numbered one
    starts = set((drawn.tokens[:, 0] - 0x4E00).tolist())
    assert torch.equal(drawn.tokens - drawn.tokens[:, :1], torch.arange(8).expand(40, 8))
    assert starts <= set(range(13))
    assert len(starts) > 6


def test_every_start_and_every_long_document_can_be_drawn() -> None:
    documents = [numbered(6), numbered(6, 0x6000), "short"]
    drawn = calibration_windows(documents, Characters(), 5, 100, seed=3).tokens
    assert set(drawn[:, 0].tolist()) == {0x4E00, 0x4E01, 0x6000, 0x6001}


def test_calibration_depends_on_the_seed_and_on_nothing_else() -> None:
    documents = [numbered(500), numbered(300, 0x6000)]
    first = calibration_windows(documents, Characters(), 8, 16, seed=1).tokens
    torch.manual_seed(99)
    assert torch.equal(first, calibration_windows(documents, Characters(), 8, 16, seed=1).tokens)
    assert not torch.equal(first, calibration_windows(documents, Characters(), 8, 16, seed=2).tokens)


def test_short_documents_are_joined_by_two_newlines() -> None:
    documents = ["abc", "def", "ghi"]
    drawn = calibration_windows(documents, Characters(), 6, 30, seed=0)
    assert drawn.packed
    windows = {"".join(map(chr, row)) for row in drawn.tokens.tolist()}
    assert windows == {"abc\n\ndef\n\nghi"[i : i + 6] for i in range(8)}


def test_joined_text_may_be_exactly_one_window() -> None:
    assert calibration_windows(["abc", "def"], Characters(), 8, 2, seed=0).tokens.shape == (2, 8)
    with pytest.raises(DataError, match="the corpus holds 8 tokens but one window needs 9"):
        calibration_windows(["abc", "def"], Characters(), 9, 2, seed=0, name="the corpus")


def test_each_document_is_tokenised_at_most_once_and_hopeless_ones_never() -> None:
    tokenizer = Characters()
    calibration_windows([numbered(50), numbered(60, 0x6000), "tiny"], tokenizer, 8, 64, seed=0)
    assert sorted(map(len, tokenizer.seen)) == [50, 60]


def test_a_huge_corpus_of_short_documents_is_not_tokenised_whole() -> None:
    tokenizer = Characters()
    documents = ["seven.."] * 50_000
    drawn = calibration_windows(documents, tokenizer, 16, 4, seed=0)
    assert drawn.packed
    assert sum(map(len, tokenizer.seen)) <= module.PACK_SPAN * 16 * 4


def test_long_text_is_tokenised_in_pieces_between_words() -> None:
    tokenizer = Characters()
    words = "lorem ipsum dolor\n\n" * 4000
    assert tokenize(words, tokenizer).tolist() == [ord(character) for character in words]
    assert len(tokenizer.seen) > 1
    assert max(map(len, tokenizer.seen)) <= module.PIECE
    assert all(piece[-1].isalpha() for piece in tokenizer.seen[:-1])
    assert all(piece[0].isspace() for piece in tokenizer.seen[1:])


@given(st.integers(0, 3 * module.PIECE), st.sampled_from(["x", "x ", "\n", "é\n\n"]))
def test_pieces_make_the_text(length: int, unit: str) -> None:
    words = (unit * length)[:length]
    tokenizer = Characters()
    tokenize(words, tokenizer)
    assert "".join(tokenizer.seen) == words
    assert all(0 < len(piece) <= module.PIECE for piece in tokenizer.seen)


def test_enough_tokens_stop_the_work() -> None:
    tokenizer = Characters()
    assert len(tokenize("word " * 100_000, tokenizer, enough=10)) == 10
    assert len(tokenizer.seen) == 1


def test_a_transformers_tokenizer_is_asked_not_to_warn() -> None:
    assert len(tokenize("a long text", Warns())) == 11


def test_pieces_and_whole_give_the_same_tokens_with_byte_level_bpe() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    prose = "".join(
        f"Line {i} of the play, said he;  and so on.\n\n" if i % 3 else f" = Act {i} = \n" for i in range(3000)
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator([prose], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained)
    assert len(prose) > 4 * module.PIECE
    assert tokenize(prose, tokenizer).tolist() == tokenizer.encode(prose, add_special_tokens=False)


def test_splits_hold_out_the_last_tenth() -> None:
    splits = text_splits("book", [numbered(1000)], Characters(), length=20, count=300, seed=0)
    assert splits.evaluation.inputs.flatten().tolist() == list(range(0x4E00 + 900, 0x4E00 + 1000))
    assert splits.calibration.inputs.max() < 0x4E00 + 900
    assert splits.calibration.inputs.max() > 0x4E00 + 850
    assert splits.calibration.inputs.shape == (300, 20)
    assert splits.calibration.kind is DataKind.TEXT
    assert splits.calibration.targets is None
    different = len({tuple(row) for row in splits.calibration.inputs.tolist()})
    assert different < 300
    assert splits.calibration.name == f"book ({different} different windows of 300)"
    assert splits.evaluation.name == "book"


def test_held_out_text_does_not_depend_on_the_seed() -> None:
    first, second = (
        text_splits("book", [numbered(1000)], Characters(), length=20, count=5, seed=seed) for seed in (0, 1)
    )
    assert first.evaluation.digest == second.evaluation.digest
    assert first.calibration.digest != second.calibration.digest


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(2, 30))
def test_calibration_and_evaluation_never_overlap(sizes: list[int], length: int) -> None:
    starts = [0x4E00 + sum(sizes[:i]) for i in range(len(sizes))]
    documents = [numbered(size, start) for size, start in zip(sizes, starts, strict=True)]
    try:
        splits = text_splits("text", documents, Characters(), length=length, count=20, seed=0)
    except DataError:
        assert sum(sizes) < 2 * length  # text for one window of each is never refused
        return
    newline = {ord("\n")}
    calibration = set(splits.calibration.inputs.flatten().tolist()) - newline
    evaluation = set(splits.evaluation.inputs.flatten().tolist()) - newline
    assert not calibration & evaluation
    assert not evaluation or not calibration or max(calibration) < min(evaluation)


def test_at_least_one_window_is_held_out_of_a_short_text() -> None:
    splits = text_splits("note", [numbered(50)], Characters(), length=20, count=3, seed=0)
    assert len(splits.evaluation) == 1
    assert splits.calibration.inputs.max() < splits.evaluation.inputs.min()


def test_words_are_not_torn_by_the_division() -> None:
    words = " ".join(f"word{i:04d}" for i in range(500))
    rest, held = hold_out([words], Characters(), 20)
    assert rest[0] + held[0] == words
    assert held[0].startswith(" word")


def test_a_sparse_end_holds_out_more() -> None:
    class NoSpaces(Characters):
        def encode(self, text: str, *, add_special_tokens: bool = True, **kwargs: object) -> list[int]:
            return super().encode(text.replace(" ", ""), add_special_tokens=add_special_tokens)

    rest, held = hold_out([numbered(100) + " " * 400], NoSpaces(), 30)
    assert 30 <= len(held[0].replace(" ", "")) <= 60
    assert rest[0] + held[0] == numbered(100) + " " * 400


def test_too_little_text_for_both_says_how_much_there_is() -> None:
    with pytest.raises(DataError, match=r"'note' holds 15 tokens .* need 40; give more text"):
        text_splits("note", [numbered(15)], Characters(), length=20, count=3, seed=0)
    with pytest.raises(DataError, match="calibration text of 'note' holds 9 tokens but one window needs 20"):
        text_splits("note", [numbered(29)], Characters(), length=20, count=3, seed=0)


def test_own_evaluation_text_leaves_all_text_to_calibrate() -> None:
    splits = text_splits(
        "pair",
        [numbered(30)],
        Characters(),
        length=25,
        count=50,
        seed=0,
        evaluation_documents=["abc", "d" * 60],
        limit=2,
    )
    assert splits.evaluation.inputs.flatten().tolist() == [ord(c) for c in ("abc\n\n" + "d" * 60)[:50]]
    assert splits.calibration.inputs.max() == 0x4E00 + 29


def test_joined_documents_show_in_the_name_of_the_calibration_set() -> None:
    documents = [numbered(5, 0x4E00 + 5 * i) for i in range(40)]
    splits = text_splits("lines", documents, Characters(), length=10, count=4, seed=0)
    assert splits.calibration.name == "lines (short documents joined)"
    assert splits.evaluation.name == "lines"
    splits = text_splits("lines", documents[:4], Characters(), length=7, count=40, seed=0)
    different = len({tuple(row) for row in splits.calibration.inputs.tolist()})
    assert splits.calibration.name == f"lines (short documents joined; {different} different windows of 40)"


@pytest.mark.parametrize("wrong", [{"length": 1}, {"count": 0}, {"limit": 0}])
def test_senseless_numbers_are_refused(wrong: dict[str, int]) -> None:
    numbers = {"length": 8, "count": 4, "limit": 2, **wrong}
    with pytest.raises(DataError, match="windows need a length of 2"):
        text_splits("text", [numbered(100)], Characters(), seed=0, **numbers)
