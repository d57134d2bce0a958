"""The picture of the rooms is drawn from the imports, and is the committed one."""

from runs import ROOT, load_script


def test_the_picture_is_current():
    """Mutation: import another room without `python scripts/import_picture.py`."""
    script = load_script("import_picture")
    assert (ROOT / "docs" / "imports.svg").read_text() == script.draw(script.read_rooms())


def test_a_room_stands_above_what_it_imports():
    """Mutation: order rooms by name."""
    script = load_script("import_picture")
    rooms = {"top": {"middle", "base"}, "middle": {"base"}, "base": set()}
    assert script.levels_of(rooms) == {"top": 2, "middle": 1, "base": 0}
    assert script.direct(rooms) == {"top": {"middle"}, "middle": {"base"}, "base": set()}
