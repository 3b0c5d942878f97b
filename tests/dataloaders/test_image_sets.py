"""Image sets in the layouts that they come in, read in place; damage is named; val is balanced and out of train."""

import gzip
import os
import tarfile
import tracemalloc

import cv2
import numpy as np
import pytest

from dataloaders import IMAGE_SETS
from dataloaders.cifar import BINARY, CIFAR10, cifar
from dataloaders.digits import digits
from dataloaders.image_files import Archive, Folder, Labelled, damage_of, decode, decoded
from dataloaders.image_set import ImageSet, ImageSplit, Picked, with_val
from dataloaders.imagenet import imagenet
from dataloaders.imagenet import main as pack_imagenet
from dataloaders.mnist import mnist
from dataloaders.tiny_imagenet import tiny_imagenet
from engine.command import run
from engine.config import UserError, table_of


def png(color, size=(32, 32)) -> bytes:
    """An image of one RGB colour."""
    image = np.full((*size, 3), color[::-1], np.uint8)
    return cv2.imencode(".png", image)[1].tobytes()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


CACHE = "/nowhere"  # of sets that decode nothing


def binary_cifar(root, classes=10, per_file=40):
    """Files of the official layout; the image of row r is filled with r, its label is r modulo the classes."""
    names = (
        [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"]
        if classes == 10
        else ["train.bin", "test.bin"]
    )
    for name in names:
        rows = []
        for row in range(per_file):
            head = [row % classes] if classes == 10 else [row % 20, row % classes]
            rows.append(np.concatenate([np.array(head, np.uint8), np.full(3072, row % 256, np.uint8)]))
        write(root / name, np.concatenate(rows).tobytes())
    return root


def test_binary_cifar_in_its_folder_or_named_directly(tmp_path):
    binary_cifar(tmp_path / "cifar-10-batches-bin")
    for root in (tmp_path, tmp_path / "cifar-10-batches-bin"):
        found = cifar(CACHE, root=str(root), val_images=20)
        assert found.size == (3, 32, 32) and found.classes == CIFAR10
        assert {name: len(split) for name, split in found.splits.items()} == {
            "train": 180,
            "val": 20,
            "test": 40,
        }
        test = found.split("test")
        assert test.labels.tolist() == [row % 10 for row in range(40)]
        assert (test.images == np.arange(40, dtype=np.uint8)[:, None, None, None]).all()
        assert np.bincount(found.split("val").labels).tolist() == [2] * 10
        assert not set(found.split("val").names) & set(found.split("train").names)


def test_cifar_100_takes_the_fine_label(tmp_path):
    binary_cifar(tmp_path / "cifar-100-binary", classes=100, per_file=300)
    (tmp_path / "cifar-100-binary" / "fine_label_names.txt").write_text(
        "\n".join(f"thing {n}" for n in range(100))
    )
    found = cifar(CACHE, root=str(tmp_path), classes=100, val_images=100)
    assert found.split("test").labels.tolist() == [row % 100 for row in range(300)]
    assert found.classes[7] == "thing 7" and found.name == "cifar100"


def test_damaged_binary_files_are_named(tmp_path):
    root = binary_cifar(tmp_path / "cifar-10-batches-bin")
    content = (root / "data_batch_3.bin").read_bytes()
    (root / "data_batch_3.bin").write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"data_batch_3\.bin: \d+ bytes are no whole number of rows of 3073"):
        cifar(CACHE, root=str(tmp_path), val_images=20)
    for name in ("data_batch_3", "test_batch"):
        (root / f"{name}.bin").unlink()
        with pytest.raises(UserError, match=rf"{name}\.bin: can't be read"):
            cifar(CACHE, root=str(tmp_path), val_images=20)
        binary_cifar(root)
        (root / f"{name}.bin").write_bytes(bytes([11]) + bytes(3072))
        with pytest.raises(UserError, match=rf"{name}\.bin: label 11, allowed: 0 to 9"):
            cifar(CACHE, root=str(tmp_path), val_images=20)
        binary_cifar(root)
    with pytest.raises(UserError, match="holds neither cifar-10-batches-bin/"):
        cifar(CACHE, root=str(root.parent.parent))
    with pytest.raises(UserError, match="no folder"):
        cifar(CACHE, root=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("classes, train, test", [(10, "data_batch_2", "test_batch"), (100, "train", "test")])
def test_short_binary_files_beside_official_ones_are_named(tmp_path, monkeypatch, classes, train, test):
    assert set(BINARY[10][1].values()) | set(BINARY[10][2].values()) == {10_000}
    assert (BINARY[100][1], BINARY[100][2]) == ({"train.bin": 50_000}, {"test.bin": 10_000})
    folder, *files, label_bytes, names = BINARY[classes]
    small = [{name: count // 50 for name, count in one.items()} for one in files]
    monkeypatch.setitem(BINARY, classes, (folder, *small, label_bytes, names))
    root = binary_cifar(tmp_path / folder, classes, 200)
    if classes == 100:
        write(root / "train.bin", (root / "train.bin").read_bytes() * 5)
    assert len(cifar(CACHE, root=str(tmp_path), classes=classes, val_images=100).split("test")) == 200
    for name, count in ((train, small[0][f"{train}.bin"]), (test, 200)):
        whole = (root / f"{name}.bin").read_bytes()
        (root / f"{name}.bin").write_bytes(whole[: 50 * (3072 + label_bytes)])
        with pytest.raises(UserError, match=rf"{name}\.bin: 50 images, expected {count}; download it again"):
            cifar(CACHE, root=str(tmp_path), classes=classes, val_images=100)
        (root / f"{name}.bin").write_bytes(whole)


def test_train_batches_of_a_small_set_are_equally_long(tmp_path):
    root = binary_cifar(tmp_path / "cifar-10-batches-bin")
    (root / "test_batch.bin").write_bytes((root / "test_batch.bin").read_bytes()[: 30 * 3073])
    assert len(cifar(CACHE, root=str(tmp_path), val_images=20).split("test")) == 30
    (root / "data_batch_4.bin").write_bytes((root / "data_batch_4.bin").read_bytes()[: 30 * 3073])
    with pytest.raises(UserError, match=r"data_batch_4\.bin: 30 images, expected 40; download it again"):
        cifar(CACHE, root=str(tmp_path), val_images=20)


def class_folders(root, splits, classes, count=4, size=(32, 32), inner=""):
    """SPLIT/CLASS/INNER/N.png in the colour (class, number, 7)."""
    for split in splits:
        for place, name in enumerate(classes):
            for number in range(count):
                write(root / split / name / inner / f"{name}_{number}.png", png((place, number, 7), size))
    return root


def packed(root, split):
    """SPLIT/ as SPLIT.tar.gz in its place."""
    with tarfile.open(root / f"{split}.tar.gz", "w:gz") as archive:
        archive.add(root / split, split)
    for path in sorted((root / split).rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (root / split).rmdir()


@pytest.mark.parametrize("archived", [False, True])
def test_folders_and_archives_of_image_files(tmp_path, archived, capsys):
    root = class_folders(tmp_path / "data", ("train", "test"), CIFAR10)
    if archived:
        packed(root, "train")
        packed(root, "test")
    found = cifar(str(tmp_path / "cache"), root=str(root), val_images=10)
    assert found.classes == CIFAR10 and isinstance(found.split("train").images, Picked)
    for split in found.splits.values():
        for image, label, name in zip(
            split.images[np.arange(len(split))], split.labels, split.names, strict=True
        ):
            number = int(name.split("_")[-1].split(".")[0])
            assert name.startswith(CIFAR10[label] + "/")
            assert (image == np.array([label, number, 7], np.uint8)[:, None, None]).all()
    assert "decoded cifar10 train: 40 images" in capsys.readouterr().err
    again = cifar(str(tmp_path / "cache"), root=str(root), val_images=10)
    assert capsys.readouterr().err == ""  # from the memory map
    assert again.manifest("train") == found.manifest("train") != found.manifest("val")


def test_lossy_image_files_are_another_data_set(tmp_path):
    root = class_folders(tmp_path / "data", ("train", "test"), CIFAR10)
    assert cifar(str(tmp_path / "cache"), root=str(root), val_images=10).name == "cifar10"
    file = root / "train" / "cat" / "cat_0.png"
    file.rename(file.with_suffix(".jpg"))  # published figures are of the original pixels
    assert cifar(str(tmp_path / "cache"), root=str(root), val_images=10).name == "cifar10_jpeg"


def test_a_changed_file_is_decoded_again_and_damage_is_mended(tmp_path, capsys):
    root = class_folders(tmp_path / "data", ("train", "test"), CIFAR10)
    cache = tmp_path / "cache"

    def open_test():
        capsys.readouterr()
        found = cifar(str(cache), root=str(root), val_images=10).split("test")
        return found.images[np.arange(len(found))], capsys.readouterr().err

    before, _ = open_test()
    write(root / "test" / "cat" / "cat_0.png", png((200, 100, 50)))
    after, told = open_test()
    assert "decoded cifar10 test" in told and "train" not in told and not np.array_equal(before, after)
    path = max((cache / "images").glob("*/images.npy"), key=lambda path: path.stat().st_mtime)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    mended, told = open_test()
    assert "1 of 40 images have other bytes; decoding again" in told and np.array_equal(mended, after)


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("torn", [False, True])
def test_decoding_that_was_stopped_goes_on(tmp_path, capsys, monkeypatch, archived, torn):
    """A torn row, as a crash of the machine leaves it, is decoded again."""
    root = class_folders(tmp_path / "data", ("train",), CIFAR10)
    expected = {f"{name}/{name}_{number}.png": (place, number, 7)
                for place, name in enumerate(CIFAR10) for number in range(4)}  # fmt: skip
    source = Folder(root / "train")
    if archived:
        packed(root, "train")
        source = Archive(root / "train.tar.gz")
    files = [Labelled(name, 0) for name in expected]
    asked = []

    def until(last):
        def one(content, size, what):
            if len(asked) == last:
                raise KeyboardInterrupt
            asked.append(what)
            return decode(content, size, what)

        monkeypatch.setattr("dataloaders.image_files.decode", one)
        return decoded(source, files, 32, tmp_path, "some")

    with pytest.raises(KeyboardInterrupt):
        until(25)
    (building,) = (tmp_path / "images").glob("*.building")
    if torn:
        with open(building / "images.npy", "r+b") as file:
            file.seek(-5, os.SEEK_END)
            file.write(b"\xff")
        with open(building / "done", "a") as file:
            file.write("39")
    found = until(None)
    assert len(asked) == 40 + torn and len(set(asked)) == 40
    assert f"going on after {25 - torn} of 40 images" in capsys.readouterr().err
    assert all((found.images[row, :, 0, 0] == color).all() for row, color in enumerate(expected.values()))
    assert not list((tmp_path / "images").glob("*.building"))
    assert damage_of(next((tmp_path / "images").glob("*/images.npy")).parent, found.images.shape) == ""


def test_images_are_as_they_are_stored_whatever_exif_says(tmp_path):
    image = np.zeros((16, 32, 3), np.uint8)
    image[:, 16:] = 255
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6
    content = cv2.imencode(".jpg", image)[1].tobytes()
    turned = content[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + content[2:]
    assert cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR).shape == (32, 16, 3)
    assert np.array_equal(decode(turned, 16, "x"), decode(content, 16, "x"))
    assert decode(turned, 16, "x")[0, :, 0].max() < 20 < 235 < decode(turned, 16, "x")[0, :, -1].min()


def test_files_that_are_no_images_or_of_no_class_are_named(tmp_path):
    root = class_folders(tmp_path / "data", ("train", "test"), CIFAR10)
    (root / "train" / "dog" / "dog_1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=rf"^{root / 'train'}: dog/dog_1\.png: is no image"):
        cifar(str(tmp_path / "cache"), root=str(root), val_images=10)
    assert not list((tmp_path / "cache" / "images").glob("*.building"))
    write(root / "train" / "dog" / "dog_1.png", png((5, 1, 7)))
    write(root / "test" / "wolf" / "wolf_1.png", png((1, 2, 3)))
    with pytest.raises(UserError, match=r"cifar test: wolf/wolf_1\.png is in no folder of a class"):
        cifar(str(tmp_path / "cache"), root=str(root), val_images=10)


def test_tiny_imagenet_in_its_own_layout_in_place(tmp_path):
    wnids = ["n02", "n01", "n03"]
    root = class_folders(tmp_path / "tiny", ("train",), wnids, 5, (64, 64), "images")
    (root / "wnids.txt").write_text("\n".join(wnids) + "\n")
    lines = []
    for number, wnid in enumerate(["n03", "n01", "n03", "n02"]):
        write(root / "val" / "images" / f"val_{number}.JPEG", png((number, 9, 9), (64, 64)))
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t62\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    before = sorted(path.relative_to(root) for path in root.rglob("*"))
    found = tiny_imagenet(str(tmp_path / "cache"), root=str(root), val_images=3)
    assert found.classes == ("n01", "n02", "n03") and found.size == (3, 64, 64)
    test = found.split("test")
    assert test.labels.tolist() == [2, 0, 2, 1]
    assert [image[0, 0, 0] for image in test.images[np.arange(4)]] == [0, 1, 2, 3]
    assert np.bincount(found.split("train").labels).tolist() == [4, 4, 4]
    assert sorted(path.relative_to(root) for path in root.rglob("*")) == before  # nothing is moved
    annotations = root / "val" / "val_annotations.txt"
    for wrong, message in (
        (lines[:3], r"1 image not in this list, of 4 that are there: images/val_3\.JPEG"),
        ([*lines, lines[1]], r"1 image more than once, expected once each: images/val_1\.JPEG"),
        ([*lines, "val_9.JPEG\tn01\t0\t0\t1\t1"], r"1 image missing, of 5 in this list: images/val_9\.JPEG"),
    ):
        annotations.write_text("\n".join(wrong) + "\n")
        with pytest.raises(UserError, match=r"val_annotations\.txt: " + message):
            tiny_imagenet(str(tmp_path / "cache"), root=str(root), val_images=3)
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn09\t0\t0\t1\t1\n")
    with pytest.raises(UserError, match=r"val_annotations\.txt:1: 'n09' is no class"):
        tiny_imagenet(str(tmp_path / "cache"), root=str(root), val_images=3)


def kaggle(root):
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    class_folders(data, ("train",), ["n01", "n02"], 3, (48, 64))
    for number in range(4):
        write(data / "val" / f"ILSVRC2012_val_{number}.JPEG", png((number, 5, 5), (64, 48)))
    rows = ["ImageId,PredictionString"]
    rows += [f"ILSVRC2012_val_{n},n0{1 + n % 2} 1 2 3 4 n02 1 2 3 4" for n in (2, 0, 1, 3)]
    (root / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    return root


def same(one, other):
    return one.classes == other.classes and all(
        split.names == other.splits[name].names
        and split.labels.tolist() == other.splits[name].labels.tolist()
        and np.array_equal(
            split.images[np.arange(len(split))], other.splits[name].images[np.arange(len(split))]
        )
        for name, split in one.splits.items()
    )


def test_imagenet_as_kaggle_packs_it_as_class_folders_and_as_an_lmdb(tmp_path, capsys):
    pytest.importorskip("lmdb")
    cache = str(tmp_path / "cache")
    root = kaggle(tmp_path / "kaggle")
    found = imagenet(cache, root=str(root), edge=32, val_images=2)
    assert found.size == (3, 32, 32) and found.classes == ("n01", "n02")
    assert found.split("test").names == [f"ILSVRC2012_val_{n}.JPEG" for n in range(4)]
    assert found.split("test").labels.tolist() == [0, 1, 0, 1]
    assert pack_imagenet([str(root), str(tmp_path / "packed")]) == 0
    assert same(found, imagenet(cache, root=str(tmp_path / "packed"), edge=32, val_images=2))
    before = (tmp_path / "packed" / "train.lmdb").stat().st_mtime_ns
    (tmp_path / "packed" / "val.lmdb").unlink()
    assert pack_imagenet([str(root), str(tmp_path / "packed")]) == 0  # as stopped between the two
    assert "train.lmdb: is there already, with these" in capsys.readouterr().out
    assert (tmp_path / "packed" / "train.lmdb").stat().st_mtime_ns == before
    assert same(found, imagenet(cache, root=str(tmp_path / "packed"), edge=32, val_images=2))
    (tmp_path / "file").write_text("")
    solution = root / "LOC_val_solution.csv"
    right = solution.read_text()
    solution.write_text(right.replace("val_3,n02", "val_3,n01"))
    for out, told in (
        ("packed", "val.lmdb: exists; delete it first"),
        ("file", "can't be written (File exists)"),
    ):
        assert run(pack_imagenet, [str(root), str(tmp_path / out)]) == 2
        assert told in capsys.readouterr().err
    solution.write_text(right)
    folders = class_folders(tmp_path / "folders", ("train", "val"), ["n01", "n02"], 3, (48, 64))
    plain = imagenet(cache, root=str(folders), edge=32, val_images=2)
    assert plain.split("test").labels.tolist() == [0, 0, 0, 1, 1, 1]
    solution.write_text("\ufeff" + solution.read_text())  # as spreadsheets write it
    assert same(found, imagenet(cache, root=str(root), edge=32, val_images=2))
    solution.write_text(solution.read_text().replace("ImageId", "Id"))
    with pytest.raises(
        UserError, match=r"solution\.csv: column ImageId missing; expected ImageId,Prediction"
    ):
        imagenet(cache, root=str(root))
    for size in (5000, 20_000):
        os.truncate(tmp_path / "packed" / "train.lmdb", size)
        with pytest.raises(UserError, match=rf"train\.lmdb: is cut off; it has {size} bytes of \d+$"):
            imagenet(cache, root=str(tmp_path / "packed"), edge=32, val_images=2)
    (root / "LOC_val_solution.csv").unlink()
    with pytest.raises(UserError, match=r"no class folders, and there is no LOC_val_solution\.csv"):
        imagenet(cache, root=str(root))
    with pytest.raises(UserError, match="holds neither"):
        imagenet(cache, root=str(tmp_path))


@pytest.mark.parametrize("archived", [False, True])
@pytest.mark.parametrize("gone", [1, 3])  # the last one once made a file that is too short
def test_a_val_of_imagenet_with_other_images_than_its_list_is_refused(tmp_path, archived, gone):
    root, cache = kaggle(tmp_path / "kaggle"), tmp_path / "cache"
    val = root / "ILSVRC" / "Data" / "CLS-LOC" / "val"
    name = f"ILSVRC2012_val_{gone}"
    content = (val / f"{name}.JPEG").read_bytes()
    (val / f"{name}.JPEG").unlink()
    if archived:
        packed(val.parent, "val")
    message = rf"LOC_val_solution\.csv: 1 image missing, of 4 in this list: {name}\.JPEG$"
    with pytest.raises(UserError, match=message):
        imagenet(str(cache), root=str(root), edge=32, val_images=2)
    assert not cache.exists()
    if not archived:
        write(val / f"{name}.JPEG", content)
        solution = root / "LOC_val_solution.csv"
        rows = solution.read_text().splitlines()
        short = [row for row in rows if not row.startswith(name)]
        for wrong, message in (
            (short, rf"1 image not in this list, of 4 that are there: {name}\.JPEG"),
            ([*rows, rows[1]], r"1 image more than once, expected once each: ILSVRC2012_val_2\.JPEG"),
        ):
            solution.write_text("\n".join(wrong) + "\n")
            with pytest.raises(UserError, match=r"LOC_val_solution\.csv: " + message):
                imagenet(str(cache), root=str(root), edge=32, val_images=2)


@pytest.mark.parametrize("gone", [2, 7])  # in the middle, and the last
def test_images_that_an_archive_does_not_give_leave_nothing_behind(tmp_path, gone):
    root = tmp_path / "data"
    for number in range(8):
        write(root / "val" / f"{number}.png", png((number, 0, 0)))
    packed(root, "val")
    archive = Archive(root / "val.tar.gz")
    files = [Labelled(name, 0) for name in archive.names()]
    files[gone] = Labelled("other.png", 0)
    with pytest.raises(UserError, match=r"toy val: 1 image missing, of 8: other\.png$"):
        decoded(archive, files, 32, tmp_path / "cache", "toy val")
    assert [path.suffix for path in (tmp_path / "cache" / "images").iterdir()] == [".lock"]


def test_archives_that_are_cut_off_or_hold_a_file_twice_are_refused(tmp_path):
    root, cache = class_folders(tmp_path / "data", ("train", "test"), CIFAR10), str(tmp_path / "cache")
    packed(root, "train")
    content = (root / "train.tar.gz").read_bytes()
    (root / "train.tar.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"train\.tar\.gz: can't be read"):
        cifar(cache, root=str(root), val_images=10)
    (root / "train.tar.gz").write_bytes(content)
    with tarfile.open(root / "test.tar", "w") as archive:
        for _ in range(2):
            archive.add(root / "test" / "cat", "test/cat")
    (root / "test").rename(root / "unpacked")
    with pytest.raises(UserError, match=r"test\.tar: 4 images more than once, .*: cat/cat_0\.png, cat/cat_1"):
        cifar(cache, root=str(root), val_images=10)


def idx(array) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return head + array.tobytes()


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_mnist_files(tmp_path, pack):
    ending = ".gz" if pack is gzip.compress else ""
    for name, count in (("train", 60), ("t10k", 20)):
        images = np.arange(count * 784).reshape(count, 28, 28).astype(np.uint8)
        write(tmp_path / f"{name}-images-idx3-ubyte{ending}", pack(idx(images)))
        write(
            tmp_path / f"{name}-labels-idx1-ubyte{ending}", pack(idx(np.arange(count).astype(np.uint8) % 10))
        )
    found = mnist(CACHE, root=str(tmp_path), val_images=10)
    assert {name: len(split) for name, split in found.splits.items()} == {"train": 50, "val": 10, "test": 20}
    assert found.size == (1, 28, 28) and found.split("test").labels.tolist() == [n % 10 for n in range(20)]
    assert np.array_equal(
        found.split("test").images[3, 0].ravel(), np.arange(3 * 784, 4 * 784).astype(np.uint8)
    )
    path = tmp_path / f"t10k-images-idx3-ubyte{ending}"
    path.write_bytes(pack(idx(np.zeros((20, 28, 28), np.uint8))[:-5]))
    with pytest.raises(
        UserError, match=r"t10k-images-idx3-ubyte(\.gz)?: 15675 values, its header says \(20, 28, 28\)"
    ):
        mnist(CACHE, root=str(tmp_path), val_images=10)
    path.unlink()
    with pytest.raises(UserError, match="no t10k-images-idx3-ubyte"):
        mnist(CACHE, root=str(tmp_path), val_images=10)


def mnist_t10k(root, labels):
    write(root / "t10k-images-idx3-ubyte", idx(np.zeros((len(labels), 28, 28), np.uint8)))
    write(root / "t10k-labels-idx1-ubyte", idx(np.array(labels, np.uint8)))
    return root


def test_test_files_alone_have_a_name_of_their_own(tmp_path):
    root = str(mnist_t10k(tmp_path, np.arange(40) % 10))
    found = mnist(CACHE, root=root, val_images=10)
    assert found.name == "mnist_t10k" and [len(one) for one in found.splits.values()] == [18, 10, 12]
    for share, split in ((0.0, "test"), (1.0, "train")):
        with pytest.raises(
            UserError, match=f"data.test_share: {share} leaves no image for {split}; expected"
        ):
            mnist(CACHE, root=root, val_images=10, test_share=share)


def test_labels_that_are_no_digits_are_named(tmp_path):
    mnist_t10k(tmp_path, [*range(10), 25])  # as in EMNIST
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte: label 25, allowed: 0 to 9; is this EMNIST"):
        mnist(CACHE, root=str(tmp_path), val_images=10)


@pytest.mark.parametrize(
    "kind, length, message",
    [
        ("images-idx3", 0, "is no IDX file of bytes in 3 dimensions"),
        ("images-idx3", 4, "4 bytes, its header alone has 16"),
        ("images-idx3", 15, "15 bytes, its header alone has 16"),
        ("images-idx3", 16, "0 values, its header says"),
        ("labels-idx1", 7, "7 bytes, its header alone has 8"),
    ],
)
def test_idx_files_that_end_in_their_header_are_named(tmp_path, kind, length, message):
    path = mnist_t10k(tmp_path, np.arange(40) % 10) / f"t10k-{kind}-ubyte"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=rf"t10k-{kind}-ubyte: {message}"):
        mnist(CACHE, root=str(tmp_path), val_images=10)


def test_idx_files_of_other_things_and_of_nothing_are_named(tmp_path):
    mnist_t10k(tmp_path, [])
    with pytest.raises(UserError, match="0 images and 0 labels of t10k"):
        mnist(CACHE, root=str(tmp_path), val_images=10)
    write(tmp_path / "t10k-images-idx3-ubyte", idx(np.zeros(40, np.uint8)))
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte: is no IDX file of bytes in 3 dimensions"):
        mnist(CACHE, root=str(tmp_path), val_images=10)


def test_rows_of_a_memory_map_are_not_read(tmp_path):
    array = np.memmap(tmp_path / "images", np.uint8, "w+", shape=(1000, 3, 64, 64))
    split = ImageSplit(array, np.arange(1000) % 10, [str(row) for row in range(1000)])
    tracemalloc.start()
    taken = split.take(np.arange(0, 1000, 2)).take(np.arange(400))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(taken.images, Picked) and len(taken) == 400 and peak < array.nbytes / 20


def test_digits_are_there_with_no_download():
    found = digits(CACHE)
    assert {name: len(split) for name, split in found.splits.items()} == {
        "train": 1237,
        "val": 200,
        "test": 360,
    }
    assert found.size == (1, 8, 8) and found.split("train").images.max() == 255
    assert found.split("test").names[-1] == "digit_1796"
    assert digits(CACHE).manifest("val") == found.manifest("val") != digits(CACHE, val_seed=1).manifest("val")


@pytest.mark.parametrize("count", [1778, 1797, 2000])
def test_a_test_split_that_leaves_digits_no_train_is_refused(count):
    assert len(digits(CACHE, test_images=1777, val_images=10).split("train")) == 10
    with pytest.raises(
        UserError, match=f"^data.test_images: {count} is wrong for digits; expected 1 to 1777$"
    ):
        digits(CACHE, test_images=count)


def test_a_train_split_that_val_would_empty_is_told():
    split = ImageSplit(np.zeros((5, 1, 2, 2), np.uint8), np.array([0, 0, 1, 1, 2]), list("vwxyz"))
    with pytest.raises(UserError, match="toy: train has 1 of class c, expected 2 images or more"):
        with_val(ImageSet("toy", tuple("abc"), {"train": split}), 3, 0)


@pytest.mark.parametrize("count", [0, 9, 1000])
def test_a_val_that_train_cannot_give_is_refused(count):
    labels = np.arange(50) % 10
    split = ImageSplit(np.zeros((50, 1, 2, 2), np.uint8), labels, [f"i{n}" for n in range(50)])
    whole = ImageSet("toy", tuple("abcdefghij"), {"train": split})
    with pytest.raises(UserError, match=f"val_images: {count} is wrong for toy; expected 10 .* to 40"):
        with_val(whole, count, 0)
    with pytest.raises(UserError, match="no split 'test'; allowed: train"):
        whole.split("test")


def test_val_does_not_depend_on_the_order_of_the_files():
    dice = np.random.default_rng(1)
    names = [f"i{n}" for n in range(60)]
    labels = np.arange(60) % 3
    images = np.arange(60, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 2), np.uint8)
    order = dice.permutation(60)
    one, other = (
        ImageSplit(images[rows], labels[rows], [names[row] for row in rows])
        for rows in (np.arange(60), order)
    )
    one, other = (
        with_val(ImageSet("toy", ("a", "b", "c"), {"train": split}), 9, 4) for split in (one, other)
    )
    assert set(one.split("val").names) == set(other.split("val").names)
    for split in other.splits.values():
        assert all(
            f"i{image[0, 0, 0]}" == name for image, name in zip(split.images, split.names, strict=True)
        )


def test_real_sets(real_data, tmp_path):
    cache = str(tmp_path)
    found = mnist(CACHE, root=str(real_data("mnist_t10k")), val_images=500)
    assert sum(map(len, found.splits.values())) == 6667 and len(found.split("test")) == 2000
    tiny = tiny_imagenet(cache, root=str(real_data("tiny_imagenet_20")), val_images=600)
    assert {name: len(split) for name, split in tiny.splits.items()} == {
        "train": 6060,
        "val": 600,
        "test": 660,
    }
    assert tiny.num_classes == 20 and tiny.size == (3, 64, 64)


def test_the_table_names_functions_that_are_there():
    for target in table_of("dataloaders:IMAGE_SETS").values():
        assert target.split(":")[1] in IMAGE_SETS
