"""Settings that hold several values can be given as one string, as on the command line."""

import pytest
from pydantic import Field

from secateur.core.errors import SettingsError
from secateur.core.method import Settings, configure


class Some(Settings):
    """Of a made-up method."""

    moments: tuple[float, ...] = Field((0.5,), description="several")
    pair: tuple[int, int] | None = Field(None, description="two or none")
    word: str = Field("", description="one word")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("moments", "0.1,0.3", (0.1, 0.3)),
        ("moments", "4", (4.0,)),
        ("moments", "", ()),
        ("moments", " 1 , 2 ,", (1.0, 2.0)),
        ("moments", (1, 2), (1.0, 2.0)),
        ("pair", "3,4", (3, 4)),
        ("pair", None, None),
        ("word", "a,b", "a,b"),
    ],
)
def test_strings_become_several_values_where_several_fit(name, text, value):
    assert getattr(configure("it", Some, {name: text}), name) == value


def test_a_wrong_part_is_named():
    with pytest.raises(SettingsError, match=r"setting 'moments.1' of it: .* got 'x'"):
        configure("it", Some, {"moments": "1,x"})
