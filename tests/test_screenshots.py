"""The pictures in the documents are younger than what they show."""

from take import HASH, IMAGES, PICTURES, ROOT, hash_of_what_is_drawn


def test_pictures_are_drawn_from_the_code_of_today():
    again = "The pictures of TensorBoard are older than what they show; take them again: scripts/screenshots/take.py"
    assert HASH.read_text() == hash_of_what_is_drawn() + "\n", again


def test_every_picture_is_shown_and_small():
    pictures = {f"{picture.name}.png" for picture in PICTURES}
    assert {path.name for path in IMAGES.glob("*.png")} == pictures
    sizes = [(IMAGES / name).stat().st_size for name in pictures]
    assert max(sizes) < 150_000 and sum(sizes) < 600_000
    page = (ROOT / "docs" / "tensorboard.md").read_text(encoding="utf-8")
    assert all(f"](images/{name})" in page for name in pictures)
