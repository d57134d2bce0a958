from __future__ import annotations

from runs import load_script

TABLES = (
    "a\n<!-- begin fits -->\n{}<!-- end fits -->\nb\n<!-- begin takes -->\n{}<!-- end takes -->\n"
)


def test_a_row_comes_to_its_place_in_both_tables(monkeypatch):
    """Mutation: write it at the end, in one table alone, or beside what it had."""
    page = load_script("gpus_page")
    monkeypatch.setattr(page, "ROWS", ("one", "two nf4", "three"))
    text = TABLES.format(
        "| `one` | 1 |\n| `gone` | - |\n| `three` | 3 |\n", "| `two nf4` | old |\n"
    )
    expected = TABLES.format(
        "| `one` | 1 |\n| `two nf4` | 2 |\n| `three` | 3 |\n", "| `two nf4` | 5 h |\n"
    )
    assert page.inserted(text, "two nf4", ["| `two nf4` | 2 |", "| `two nf4` | 5 h |"]) == expected


def test_every_recipe_of_the_page_is_counted_in_both_tables():
    """Mutation: leave a row for another day, or keep one that the script no longer has."""
    page = load_script("gpus_page")
    text = page.PAGE.read_text("utf-8")
    for part in page.PARTS:
        body = text.split(f"<!-- begin {part} -->\n")[1].split("<!-- end")[0]
        cells = [line.split("|")[1].strip() for line in body.splitlines()]
        assert cells == [f"`{row}`" for row in page.ROWS]


def test_the_page_takes_of_each_gpu_what_the_script_takes():
    """Ratings, prices, and the columns of both tables. Mutation: change one of them here alone."""
    page = load_script("gpus_page")
    text = page.PAGE.read_text("utf-8")
    assert f"<!-- begin gpus -->\n{page.offers()}<!-- end gpus -->" in text
    sizes = [f"{offer.gib} GiB" for offer in page.OFFERS]
    names = [f"{offer.name}, {size}" for offer, size in zip(page.OFFERS, sizes, strict=True)]
    assert f"overridden | {' | '.join(sizes)} |\n" in text
    assert f"10^15 | {' | '.join(names)} |\n" in text
