"""HTML and SVG from plain values: everything that is not markup already is escaped."""

from __future__ import annotations

from html import escape


class Html(str):
    """Text that is markup already; the template engine leaves it as it is."""

    __slots__ = ()

    def __html__(self) -> str:
        return self


def element(name: str, attributes: dict[str, str | float], *children: str) -> Html:
    """One element. Attribute values and children that are not `Html` are escaped."""
    written = "".join(f' {key}="{escape(_text(value))}"' for key, value in attributes.items())
    inside = "".join(child if isinstance(child, Html) else escape(child) for child in children)
    return Html(f"<{name}{written}>{inside}</{name}>")


def join(parts: list[Html]) -> Html:
    """Several pieces of markup, one after the other."""
    return Html("".join(parts))


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
