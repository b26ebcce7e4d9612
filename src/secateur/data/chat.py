"""Conversations as text: in the tokenizer's chat template where it has one, else in a plain frame.

A row of a data set is a text, a list of messages, or a question with its answer; all become one document each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.core.errors import DataError

TEXT = "text"
MESSAGES = "messages"
PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"))
CONTEXT = "input"  # beside an instruction: what it is to be done with
FIELDS = tuple(dict.fromkeys((TEXT, MESSAGES, *(name for pair in PAIRS for name in pair), CONTEXT)))
USER, ASSISTANT = "user", "assistant"
WANTED = f"a conversation in '{MESSAGES}' or in {' or '.join(f'{asked!r} with {said!r}' for asked, said in PAIRS)}"

QUESTION = "Question: {}\nAnswer:"  # around a prompt where the tokenizer has no chat template
SYSTEM = "You are a helpful assistant."
BETWEEN = "\n\n"  # turns of a plain frame

Message = Mapping[str, str]


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_text(chat: Sequence[Message], tokenizer: Any = None, *, frame: str = QUESTION, asking: bool = False) -> str:
    """A conversation as text.

    Args:
        chat: messages with `role` and `content`.
        tokenizer: writes it in its chat template, special tokens included, if it has one.
        frame: otherwise what stands around a user's message, `{}`; an answer follows behind a space, and what has
            another role, such as a system prompt, stands as it is.
        asking: end with the opening of an answer; the last message is then the user's.
    """
    if has_template(tokenizer):
        return str(tokenizer.apply_chat_template(list(chat), add_generation_prompt=asking, tokenize=False))
    text = ""
    for message in chat:
        if message["role"] == ASSISTANT:
            text += f" {message['content']}" if text else message["content"]
        else:
            asked = frame.format(message["content"]) if message["role"] == USER else message["content"]
            text += (BETWEEN if text else "") + asked
    return text


def prompt_ids(tokenizer: Any, prompt: str, frame: str = QUESTION, system: str = SYSTEM) -> list[int]:
    """Ids of a prompt as a model is asked: in the chat template, below `system`, if there is one, else in `frame`."""
    templated = has_template(tokenizer)
    chat = [{"role": "system", "content": system}] * templated + [{"role": USER, "content": prompt}]
    text = chat_text(chat, tokenizer, frame=frame, asking=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"] if templated else tokenizer(text)["input_ids"])


def is_readable(columns: Collection[str]) -> bool:
    """Whether a table with these columns holds texts or conversations."""
    return TEXT in columns or MESSAGES in columns or any({*pair} <= {*columns} for pair in PAIRS)


@dataclass(frozen=True)
class Rows:
    """How rows become documents.

    A row's `text` comes first; without one its `messages`, then `prompt` with `response` or `completion`,
    `instruction` (and `input`) with `output`, `question` with `answer`.

    Attributes:
        tokenizer: gives the chat template; None or one without a template: the plain frame.
        chat: a conversation comes before `text`, and a row with nothing but a text is a user's message.
    """

    tokenizer: Any = None
    chat: bool = False

    def document(self, row: Mapping[str, Any], where: str) -> str:
        """The document that a row holds.

        Raises:
            DataError: it holds none, or a broken one; `where` names it.
        """
        text = row.get(TEXT)
        if isinstance(text, str) and not self.chat:
            return text
        chat = conversation(row, where)
        if chat is None and isinstance(text, str):
            chat = [{"role": USER, "content": text}]
        if chat is None:
            raise DataError(f"{where} has no text in '{TEXT}', nor {WANTED}; add one or drop the row")
        return self._written(chat, where)

    def _written(self, chat: Sequence[Message], where: str) -> str:
        from jinja2 import TemplateError

        try:
            return chat_text(chat, self.tokenizer)
        except (TemplateError, ValueError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            roles = ", ".join(message["role"] for message in chat)
            raise DataError(
                f"{where}: the tokenizer's chat template refuses the roles {roles} ({reason}); change or drop the row"
            ) from error


def conversation(row: Mapping[str, Any], where: str) -> list[Message] | None:
    """The messages of a row; None where it has no field for any.

    Raises:
        DataError: such a field is there, and broken.
    """
    if row.get(MESSAGES) is not None:
        return _checked(row[MESSAGES], where)
    for asked, said in PAIRS:
        if row.get(asked) is None or row.get(said) is None:
            continue
        broken = next((name for name in (asked, said) if not isinstance(row[name], str)), None)
        if broken is not None:
            raise DataError(
                f"{where}: '{broken}' holds {type(row[broken]).__name__}, not a text; correct or drop the row"
            )
        more = row.get(CONTEXT) if asked == "instruction" else None
        question = f"{row[asked]}{BETWEEN}{more}" if isinstance(more, str) and more else row[asked]
        return [{"role": USER, "content": question}, {"role": ASSISTANT, "content": row[said]}]
    return None


def _checked(messages: Any, where: str) -> list[Message]:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise DataError(f"{where}: '{MESSAGES}' is no list of messages, or an empty one; give [{{role, content}}, ...]")
    for place, message in enumerate(messages):
        content = message if isinstance(message, Mapping) else {}
        if not all(isinstance(content.get(key), str) for key in ("role", "content")):
            raise DataError(
                f"{where}: message {place} of '{MESSAGES}' has no 'role' and 'content' with texts in them; "
                "correct or drop the row"
            )
    return [{"role": message["role"], "content": message["content"]} for message in messages]
