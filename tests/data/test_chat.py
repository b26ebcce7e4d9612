"""Conversations: every form of row becomes the right text, through a chat template and without one; broken rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import Characters
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from secateur.core.errors import DataError
from secateur.data.chat import Rows, chat_text, is_readable, prompt_ids
from secateur.data.files import Options, open_file, parse_spec, read_documents

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
)
ASK, SAY = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so."}


def templated(template: str | None = TEMPLATE) -> Any:
    found = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, unk_token="x")))
    found.chat_template = template
    return found


@pytest.mark.parametrize(
    ("row", "chat", "expected"),
    [
        ({"messages": [ASK, SAY, ASK]}, False, "<user>why?</><assistant>so.</><user>why?</>"),
        ({"prompt": "a", "response": "b"}, False, "<user>a</><assistant>b</>"),
        ({"prompt": "a", "completion": "b"}, False, "<user>a</><assistant>b</>"),
        ({"instruction": "a", "output": "b", "input": ""}, False, "<user>a</><assistant>b</>"),
        ({"instruction": "a", "output": "b", "input": "c"}, False, "<user>a\n\nc</><assistant>b</>"),
        ({"question": "a", "answer": "b", "input": "c"}, False, "<user>a</><assistant>b</>"),
        ({"question": "q", "answer": "p", "messages": [ASK]}, False, "<user>why?</>"),
        ({"prompt": "a", "response": None, "question": "q", "answer": ""}, False, "<user>q</><assistant></>"),
        ({"text": "plain", "messages": [ASK]}, False, "plain"),
        ({"text": "", "messages": [ASK]}, False, ""),
        ({"text": None, "messages": [ASK]}, False, "<user>why?</>"),
        ({"text": "plain", "messages": [ASK]}, True, "<user>why?</>"),
        ({"text": "plain"}, True, "<user>plain</>"),
    ],
)
def test_rows_through_the_template(row: dict[str, Any], chat: bool, expected: str) -> None:
    assert Rows(templated(), chat).document(row, "here") == expected


def test_the_plain_frame_of_a_tokenizer_without_a_template() -> None:
    system = {"role": "system", "content": "be brief"}
    for tokenizer in (templated(None), Characters(), None):
        assert chat_text([ASK, SAY, ASK], tokenizer) == "Question: why?\nAnswer: so.\n\nQuestion: why?\nAnswer:"
        assert chat_text([system, ASK, SAY], tokenizer, frame="{}>") == "be brief\n\nwhy?> so."
        assert chat_text([SAY], tokenizer) == "so."


@given(st.text(), st.text(max_size=5))
def test_braces_in_messages_are_no_places_to_fill(asked: str, more: str) -> None:
    asked = f"{{{asked}}} {{}} {{0}}{more}"
    assert chat_text([{"role": "user", "content": asked}]) == f"Question: {asked}\nAnswer:"


def test_a_prompt_is_asked_in_the_frame_that_its_data_were_written_in() -> None:
    """What a model is asked is the beginning of a document made from the same question."""
    tokenizer = templated()
    seen: list[tuple[str, bool]] = []

    class Sees:
        chat_template: str | None = TEMPLATE
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            seen.append((text, add_special_tokens))
            return {"input_ids": []}

    prompt_ids(Sees(), "why?", system="short")
    asked, special = seen.pop()
    document = Rows(tokenizer).document({"messages": [{"role": "system", "content": "short"}, ASK, SAY]}, "here")
    assert document.startswith(asked)
    assert asked.endswith("<assistant>")
    assert not special  # the template brings its own
    plain = Sees()
    plain.chat_template = None
    prompt_ids(plain, "why?")
    asked, special = seen.pop()
    assert Rows().document({"question": "why?", "answer": "so."}, "here").startswith(asked)
    assert special


BROKEN = {
    "nothing": (
        {"body": "x"},
        r"has no text in 'text', nor a conversation in 'messages' or in 'prompt' with 'response'",
    ),
    "half a pair": ({"prompt": "x"}, "has no text in 'text'"),
    "no list": ({"messages": "hello"}, "'messages' is no list of messages"),
    "empty list": ({"messages": []}, "or an empty one"),
    "no message": ({"messages": [ASK, "hello"]}, "message 1 of 'messages' has no 'role' and 'content'"),
    "no content": ({"messages": [{"role": "user"}]}, "message 0 of 'messages'"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "message 0 of 'messages'"),
    "no text in a pair": ({"question": "x", "answer": {"text": ["y"]}}, "'answer' holds dict, not a text"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows_are_named(case: str, tmp_path: Path) -> None:
    row, said = BROKEN[case]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl' line 3:? ?.*{said}"):
        read_documents(path, Rows(templated()))


def test_a_template_that_refuses_a_conversation_names_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    system = {"role": "system", "content": "x"}
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in ([ASK, SAY], [system, ASK])))
    with pytest.raises(
        DataError, match=r"line 2: the tokenizer's chat template refuses the roles system, user \(no sys"
    ):
        read_documents(path, Rows(templated(STRICT)))


def test_tables_with_conversations(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2], "messages": [[ASK, SAY], [ASK]]}), path, row_group_size=1)
    assert read_documents(path, Rows(templated())) == ["<user>why?</><assistant>so.</>", "<user>why?</>"]
    pq.write_table(pa.table({"text": ["t", None], "messages": [[ASK], [ASK]]}), path)
    assert read_documents(path, Rows(templated())) == ["t", "<user>why?</>"]
    pq.write_table(pa.table({"question": ["q", "r"], "answer": ["a", None]}), path)
    with pytest.raises(DataError, match=r"a\.parquet' row 1 has no text in 'text', nor a conversation"):
        read_documents(path, Rows(templated()))
    pq.write_table(pa.table({"question": ["q"], "label": [1]}), path)
    with pytest.raises(DataError, match=r"has the columns question, label; it needs 'text'.* or a conversation in"):
        read_documents(path)


def test_columns_that_can_be_read() -> None:
    for columns in (["text"], ["messages"], ["answer", "question", "id"], ["instruction", "output"]):
        assert is_readable(columns)
    for columns in ([], ["question"], ["prompt", "answer"], ["instruction", "input"]):
        assert not is_readable(columns)


def test_windows_of_conversations(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"{i:02d}" * 10, "response": "yes" * 20} for i in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    splits = open_file(f"{path}?length=30&samples=6", Characters())
    whole = "\n\n".join(Rows().document(row, "") for row in rows)
    for row in (*splits.calibration.inputs.tolist(), *splits.evaluation.inputs.tolist()):
        assert "".join(map(chr, row)) in whole
    assert splits.calibration.name == str(path)  # no conversation had to be joined with another


def test_the_option_chat(tmp_path: Path) -> None:
    assert parse_spec("a.jsonl?chat=1", Options())[1].chat
    assert not parse_spec("a.jsonl?chat=0", Options(chat=True))[1].chat
    with pytest.raises(DataError, match=r"'chat' of 'a\.jsonl' cannot be 'yes'; give 0 or 1"):
        parse_spec("a.jsonl?chat=yes", Options())
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "abc " * 20}) for _ in range(20)))
    for chat in (0, 1):
        splits = open_file(f"{path}?length=85&chat={chat}&samples=50", Characters())
        assert any("Question: abc" in "".join(map(chr, row)) for row in splits.calibration.inputs.tolist()) == bool(
            chat
        )
    (tmp_path / "a.txt").write_text("x" * 500)
    with pytest.raises(DataError, match=r"chat=1 is for rows of \.jsonl and \.parquet files"):
        open_file(f"{tmp_path / 'a.txt'}?length=8&chat=1", Characters())
