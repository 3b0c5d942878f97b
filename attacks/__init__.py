"""Attacks by name: (model, images, labels, *, knobs) -> images. A new one is one file and one line here."""

ATTACKS = {
    "clean": "attacks.clean:clean",
}
