"""Numbers as people read them."""

import pytest

from jsfdd.base.numbers import decimals, interval, percent, signed, significant, whole


@pytest.mark.parametrize(
    "text, expected",
    [
        (decimals(1234.5), "1,234.50"),
        (decimals(-0.126, 1), "−0.1"),
        (decimals(None), "–"),
        (decimals(float("nan")), "–"),
        (signed(0.123), "+0.12"),
        (signed(-0.123, 3), "−0.123"),
        (signed(-0.001), "0.00"),
        (interval(0.1, 0.25), "[0.10, 0.25]"),
        (interval(None, None), ""),
        (whole(1234.4), "1,234"),
        (percent(0.5), "50%"),
        (percent(0.123), "12%"),
        (percent(0.034), "3.4%"),
        (percent(0.05), "5%"),
        (percent(0.0996), "10%"),
        (percent(0.0), "0%"),
        (percent(1.0), "100%"),
        (percent(-0.02), "−2%"),
        (percent(None), "–"),
        (significant(0.0123456), "0.0123"),
        (significant(None), "–"),
    ],
)
def test_numbers(text, expected):
    assert text == expected
