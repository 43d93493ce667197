"""Choose the column of a data set's records that holds documents, and read a document from it."""

import json
from collections.abc import Mapping, Set

from factory.config.references import DEFAULT_COLUMN
from factory.errors import DataError
from factory.model.tokenizer import ASSISTANT, Conversation

CHAT_COLUMNS = ("messages", "conversations")
STRING, CHAT = "string", "conversation"  # kinds of columns that can be read
NULL = "null"  # nothing that would tell the kind
KEYS = (("role", "content"), ("from", "value"))  # of a message: as chat templates read it, or ShareGPT's
NAMES = {
    str: "a text",
    list: "a list",
    dict: "an object",
    int: "a number",
    float: "a number",
    bool: "a truth",
}
ROLES = {"human": "user"} | dict.fromkeys(("gpt", "bing", "chatgpt", "bard"), ASSISTANT)  # ShareGPT's


def choose_column(
    kinds: Mapping[str, str], wanted: str | None, *, name: str, reference: str
) -> tuple[str, bool]:
    """Return the column to read, and whether it holds conversations.

    It is the wanted one, or else `text`, `messages`, `conversations` or the only one of strings.

    Args:
        kinds: Columns with their kinds: `STRING`, `CHAT`, or the name of any other type.
        name: Name of the data, for the error.
        reference: What the user typed, without a column, for the hint.

    Raises:
        DataError: The column does not exist or cannot be read; the hint lists those that can be.
    """
    usable = [column for column, kind in kinds.items() if kind in (STRING, CHAT)]
    strings = [column for column in usable if kinds[column] == STRING]
    usual = [wanted] if wanted else [DEFAULT_COLUMN, *CHAT_COLUMNS]
    only = strings if wanted is None and len(strings) == 1 and DEFAULT_COLUMN not in kinds else []
    for column in [*usual, *only]:
        if column in usable:
            return column, kinds[column] == CHAT
    column = wanted or DEFAULT_COLUMN
    problem = (
        f"holds {kinds[column]} in column {column!r}" if column in kinds else f"has no column {column!r}"
    )
    raise DataError(
        f"{name} {problem}; it has {', '.join(kinds)}",
        hint=choices([f"{reference}#{each}" for each in usable])
        if usable
        else "use another data set: none of its columns holds strings or conversations",
    )


def choices(names: list[str], maximum: int = 8) -> str:
    """Return a hint to give one of these names."""
    more = f" and {len(names) - maximum} more" if len(names) > maximum else ""
    return f"give {' or '.join(names[:maximum])}{more}"


def kind_of(value: object) -> str:
    """Return the kind of a column by one of its values."""
    if isinstance(value, str):
        return STRING
    if isinstance(value, list) and value and all(map(_is_message, value)):
        return CHAT
    return NULL if value in (None, []) else NAMES.get(type(value), type(value).__name__)


def is_chat_type(keys: Set[str]) -> bool:
    """Return whether a list of structures with these keys holds messages."""
    return any({*pair} <= keys for pair in KEYS)


def document_of(value: object, *, is_chat: bool) -> str | None:
    """Return the document in a column's value; None if it has none.

    Raises:
        ValueError: The value is of another kind, or cannot be written as UTF-8.
    """
    if value is None:
        return None
    document = _conversation(value) if is_chat else value
    if document is None or (isinstance(document, str) and not document.strip()):
        return None
    if not isinstance(document, str):
        raise ValueError(f"is {kind_of(value)}, not a text")
    try:
        document.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"contains {document[error.start]!r}, half of a character") from error
    return document


def _conversation(value: object) -> Conversation | None:
    """Return a list of messages as a conversation, with ShareGPT's names replaced; None without an answer.

    TRL's `maybe_convert_to_chatml` replaces the keys alone; no template knows ShareGPT's roles.
    """
    if not isinstance(value, list):
        raise ValueError(f"is {NAMES.get(type(value), kind_of(value))}, not a list of messages")
    messages = []
    for item in value:
        message = json.loads(item) if isinstance(item, str) else item
        if not _is_message(message):
            raise ValueError('has a message without "role" and "content", or "from" and "value"')
        renamed = {"from": "role", "value": "content"} if "role" not in message else {}
        # Where one message of a data set has a key, Arrow gives all others None.
        found = {renamed.get(key, key): part for key, part in message.items() if part is not None}
        messages.append(found | {"role": ROLES.get(found["role"], found["role"])})
    if not any(message["role"] == ASSISTANT for message in messages):
        return None
    return Conversation(json.dumps(messages, ensure_ascii=False, sort_keys=True))


def _is_message(item: object) -> bool:
    return isinstance(item, Mapping) and any(
        isinstance(item.get(role), str) and (content in item or "tool_calls" in item)
        for role, content in KEYS
    )
