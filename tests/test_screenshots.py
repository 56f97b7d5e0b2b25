"""The pictures in the documents are younger than what they show."""

from take import HASH, IMAGES, PICTURES, ROOT, hash_of_what_is_drawn


def test_pictures_are_drawn_from_the_code_of_today():
    again = "The pictures of TensorBoard are older than what they show; take them again: scripts/screenshots/take.py"
    assert HASH.read_text() == hash_of_what_is_drawn() + "\n", again


def test_every_picture_is_shown_and_small():
    of_tensorboard = {f"{picture.name}.png" for picture in PICTURES}
    curves = {path.name for path in IMAGES.glob("time_to_loss_*.png")}
    assert {path.name for path in IMAGES.glob("*.png")} == of_tensorboard | curves
    sizes = [path.stat().st_size for path in IMAGES.glob("*.png")]
    assert max(sizes) < 150_000 and sum(sizes) < 750_000
    for page, names in (("tensorboard.md", of_tensorboard), ("learning.md", curves)):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        assert all(f"](images/{name})" in text for name in names)
