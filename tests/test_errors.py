"""Messages that hold what a file said: one line that reads as it is."""

from __future__ import annotations

from zenith_det.errors import UserError, is_printable, one_line


def test_characters_that_turn_the_order_of_text_are_left_out_and_writing_from_right_to_left_stays() -> None:
    turned = "cat\N{RIGHT-TO-LEFT OVERRIDE}txt.exe\N{POP DIRECTIONAL FORMATTING}"
    assert one_line(turned) == "cat txt.exe"
    assert not is_printable(turned)
    assert (
        str(UserError(f"category {turned}\x1b[2J\nerror: forged"))
        == "category cat txt.exe  [2J error: forged"
    )
    for name in ("חתול", "قطة\N{RIGHT-TO-LEFT MARK}", "می\N{ZERO WIDTH NON-JOINER}خواهم", "\N{DOG FACE}"):
        assert is_printable(name)
        assert one_line(name) == name
