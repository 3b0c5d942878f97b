"""Attacks by name: functions (model, images, labels, *, knobs) -> images. A new one is one new file and one line here."""

ATTACKS = {
    "clean": "attacks.clean:clean",
}
