"""Helpers for text that people read."""

import pytest

from alora_kernels.text import NAME, clipped, listed, percent, percentile, printable, size, some


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain", "plain"), ("two\nlines\t", "two lines "), ("\x1b[31mred", "?[31mred"), ("añb", "añb"), ("", "")],
)
def test_a_strangers_text_becomes_one_printable_line(text, shown):
    assert printable(text) == shown


def test_a_long_text_ends():
    assert printable("abcdef", 4) == "abc…"
    assert printable("abcd", 4) == "abcd"
    assert clipped("begin-middle-end", 9) == "begi…-end"
    assert clipped("short", 9) == "short"


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (99_949, "99.9 kB"), (99_950, "100 kB"), (999_500, "1.0 MB"),
     (12_345_678, "12.3 MB"), (3.2e9, "3.2 GB"), (5e12, "5.0 TB")],
)  # fmt: skip
def test_sizes(count, shown):
    assert size(count) == shown


def test_percentiles_are_measured_values():
    assert percent(0.873) == "87.3 %"
    assert [percentile([5, 1, 4, 2, 3], q) for q in (0, 0.2, 0.5, 0.8, 1)] == [1, 2, 3, 4, 5]
    assert percentile([1, 100], 0.5) in (1, 100)


@pytest.mark.parametrize("name", ["a", "a.b-c_9", "x" * 64])
def test_allowed_names(name):
    assert NAME.fullmatch(name)


@pytest.mark.parametrize("name", ["x" * 65, "", ".a", "a/b", "a b", "ä"])
def test_refused_names(name):
    assert not NAME.fullmatch(name)


def test_a_long_list_is_its_first_names_and_a_count():
    assert [listed("abc", most) for most in (1, 2, 3)] == ["a and 2 more", "a, b and 1 more", "a, b, c"]
    assert listed([], 2) == some([], 2) == ""
    assert [some("abc", most) for most in (1, 2, 3)] == ["a, ...", "a, b, ...", "a, b, c"]
