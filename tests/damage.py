"""What may happen to a file behind a cache's back."""

import os


def cut_off(path):
    os.truncate(path, path.stat().st_size - 7)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")
