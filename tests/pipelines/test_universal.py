"""Universal perturbations from the command line: trained on train, chosen on val, applied to another row."""

import pytest
import torch

from attacks.threat import Threat
from attacks.universal import load_universal
from dataloaders.frames import FrameIndex
from engine.command import run
from engine.config import UserError, component, load
from pipelines.classifier_evaluation import evaluate as evaluate_classifiers
from pipelines.cli import Options
from pipelines.matrix import load_zoo
from pipelines.robustness import target_of_row
from pipelines.universal import cache_of, main, number, of_frames
from tests.pipelines.conftest import write_yaml
from tests.pipelines.test_segmentation import evaluation_of


@pytest.fixture(scope="session")
def trained(workshop):
    """(config, file, splits that were read) of one on the expert `day`."""
    config = write_yaml(workshop.folder / "universal.yaml", evaluation_of(workshop))
    path, asked, select = workshop.folder / "deltas" / "day.safetensors", [], FrameIndex.select

    def recording(self, split, subsets):
        asked.append(split)
        return select(self, split, subsets)

    keys = [
        "--eps=32/255",
        "--epochs=3",
        "--inner-steps=2",
        "--step-size=0.03",
        "--seed=2",
        "--device=cpu",
        "--overwrite",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FrameIndex, "select", recording)
        assert main([str(config), "day", str(path), "evaluate.batch_size=8", *keys]) == 0
    return config, path, asked


def test_it_reads_train_and_val_only(trained):
    assert set(trained[2]) == {"train", "val"}


def test_the_file_says_where_it_comes_from(trained, workshop):
    config, path, _ = trained
    found = load_universal(path)
    zoo = load_zoo(load(config), load(config).data.build())
    about = found.metadata
    assert about["source"] == {"row": "day", **target_of_row(zoo, "day").identity}
    assert about["data"] == {
        "dataset": load(config).data.build().name,
        "train": 16,
        "val": 8,
        "subsets": ["day", "night"],
        "resize": load(config).data.resize,
        "batch_size": 8,
    }
    assert (about["size"], about["images"], about["steps"], about["seed"]) == ([32, 48], 16, 2 * 2 * 3, 2)
    assert found.delta.shape == (3, 32, 48)
    assert found.delta.abs().max() <= 32 / 255
    assert about["chosen_epoch"] > 0 and min(about["accuracy"]) < about["accuracy"][0]


def test_it_is_applied_to_another_row(trained):
    config, path, _ = trained
    index = load(config).data.build()
    target = target_of_row(load_zoo(load(config), index), "gate")
    samples = of_frames(cache_of(load(config).data, index, "test"), torch.device("cpu"))
    images, labels = (torch.stack(kind) for kind in zip(*samples, strict=True))
    threat = Threat(32 / 255, seeds=tuple(range(len(images))))
    found = component("attacks:ATTACKS", "universal", file=str(path)).build(
        target.model, images, labels, threat
    )
    expected = (images + load_universal(path).delta).clamp(0, 1)
    torch.testing.assert_close(found.images, expected, rtol=0, atol=1e-6)


def test_samples_are_the_frames_evenly_spread(trained):
    config = load(trained[0])
    index = config.data.build()
    every, some = (cache_of(config.data, index, "train", count) for count in (None, 4))
    assert (len(every.frames), len(some.frames)) == (16, 4)
    assert [frame.name for frame in some.frames] == [every.frames[row].name for row in (2, 6, 10, 14)]
    some = of_frames(some, torch.device("cpu"))
    assert len(some) == 4
    image, label = some[1]
    assert image.shape == (3, 32, 48) and image.dtype == torch.float32 and label.dtype == torch.int64
    assert torch.equal(
        (image * 255).round().permute(1, 2, 0).byte(), torch.from_numpy(every.images[6].copy())
    )


def test_mistakes_are_told(trained, capsys):
    config, path, _ = trained
    new = str(path.with_name("new.safetensors"))
    assert run(main, [str(config), "nowhere", new, "--eps", "0.1", "--device", "cpu"]) == 2
    assert (
        "row 'nowhere': there is none of that name; allowed: day, night, ensemble mean"
        in capsys.readouterr().err
    )
    for keys, told in (
        (["--eps", "2"], "--eps: 2.0 lets every pixel become any other"),
        (["--eps", "8"], "8.0/255 may be meant"),
        ([], f"{path}: is there already; replace it (--overwrite), or name another file"),
    ):
        assert run(main, [str(config), "day", str(path), "--eps", "0.1", *keys]) == 2
        assert told in capsys.readouterr().err
    assert run(main, [str(config), "day", str(path.parent), "--eps", "0.1"]) == 2
    assert f"{path.parent}: is a folder" in capsys.readouterr().err
    assert run(main, [str(config), "day", str(path / "deeper"), "--eps", "0.1"]) == 2
    assert f"can't be written: {path}: is a file, not a folder" in capsys.readouterr().err
    for keys in (["--eps", "0"], ["--eps", "1/0"], ["--eps", "0.1", "--epochs", "0"]):
        with pytest.raises(SystemExit):
            main([str(config), "day", str(path), *keys])
    assert (number("8/255"), number("0.05")) == (8 / 255, 0.05)


@pytest.mark.parametrize("key", ["attacks", "transfer"])
@pytest.mark.parametrize("dry", [True, False])
def test_a_perturbation_for_another_norm_is_refused_before_any_work(trained, workshop, tmp_path, key, dry):
    one = {"name": "universal", "file": str(trained[1])}
    config = {**evaluation_of(workshop), "output": str(tmp_path / "runs")}
    config["evaluate"] = {"norm": "l2", "eps": [0.5], "attack_images": 2, "attacks": [{"name": "fgsm"}]}
    config["evaluate"] |= {key: [one] if key == "attacks" else one}
    with pytest.raises(UserError, match="day.safetensors: universal: made for norm linf, not l2"):
        workshop.evaluate(config, dry_run=dry)
    assert not (tmp_path / "runs").exists()


def test_one_for_l2_is_taken_there(trained, workshop, tmp_path, capsys):
    config, path, _ = trained
    file = tmp_path / "l2.safetensors"
    keys = ["--eps=0.5", "--norm=l2", "--epochs=1", "--frames=2", "--device=cpu", "evaluate.batch_size=8"]
    assert main([str(config), "day", str(file), *keys]) == 0
    assert main([str(config), "day", str(file), *keys, "--overwrite"]) == 0
    asked = {"norm": "l2", "eps": [0.5], "attacks": [{"name": "universal", "file": str(file)}]}
    workshop.evaluate({**evaluation_of(workshop), "name": "of_l2", "evaluate": asked}, dry_run=True)
    assert "network passes" in capsys.readouterr().out


NEAREST_MEAN = """
import torch
from sklearn.datasets import load_digits

def build(seed):
    found = load_digits()
    rows = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(seed))[:500]
    images, labels = torch.tensor(found.data[rows]).float() / 16, torch.tensor(found.target[rows])
    means = torch.stack([images[labels == label].mean(0) for label in range(10)])
    layer = torch.nn.Linear(64, 10)
    layer.weight.data, layer.bias.data = means, -means.square().sum(1) / 2
    return torch.nn.Sequential(torch.nn.Flatten(), layer)
"""


def test_one_for_a_classifier_is_applied_to_another(tmp_path, capsys):
    (tmp_path / "net.py").write_text(NEAREST_MEAN)
    net = {"name": "external", "file": str(tmp_path / "net.py")}
    config = {
        "name": "classifiers",
        "output": str(tmp_path / "runs"),
        "data": {"name": "digits", "test_images": 300, "val_images": 100},
        "models": {name: {**net, "args": {"seed": seed}} for seed, name in enumerate(("mine", "other"))},
    }
    path, file = write_yaml(tmp_path / "config.yaml", config), tmp_path / "mine.safetensors"
    keys = ["--eps=0.2", "--epochs=2", "--device=cpu", "--frames=200"]
    assert main([str(path), "mine", str(file), *keys]) == 0
    about = load_universal(file).metadata
    assert about["data"] == {"dataset": "digits", "train": 200, "val": 100, "batch_size": 256}
    assert about["source"]["row"] == "mine" and load_universal(file).delta.shape == (1, 8, 8)
    assert min(about["accuracy"]) < about["accuracy"][0]
    capsys.readouterr()
    asked = ["evaluate.attacks=[{name: universal, file: " + str(file) + "}]", "evaluate.eps=[0.2]"]
    evaluation = load(path, [*asked, "evaluate.attack_images=20", "evaluate.attack_checks=false"])
    evaluate_classifiers(evaluation, Options(device="cpu"))
    assert "universal" in (tmp_path / "runs/classifiers/evaluation/test/results.csv").read_text()
    assert run(main, [str(path), "nobody", str(tmp_path / "x"), "--eps=0.2"]) == 2
    assert "row 'nobody': there is none of that name; allowed: mine, other" in capsys.readouterr().err
    assert run(main, [str(path), "mine", str(tmp_path / "x"), "--eps=0.2", "--loss=balanced_masked_ce"]) == 2
    assert (
        "--loss balanced_masked_ce: weighs classes by their pixels; it is for label maps"
        in capsys.readouterr().err
    )
