"""An exported pathway, sparse network or CNN is a plain CNN with the same logits, in torch and in onnxruntime."""

import importlib.util
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from engine.checkpoints import load_metadata, load_weights, save_weights
from engine.command import run
from engine.config import UserError, component
from networks.cnn_moe.model import CNN
from pipelines import export as exporting
from pipelines.export import Exported, export, main, onnx_graph
from pipelines.models import load_classifier, weights_file

SIZE = (1, 8, 8)
KEYS = {"arch": "resnet18", "ratio": 0.06}
ROUTED = {"name": "cnn_moe", **KEYS, "num_experts": 3}
SPARSE = {"name": "sparse_cnn", "arch": "resnet18", "ratio": 0.1}


def stored(folder: Path, network: dict, classes=10, **about):
    """A run folder with a network that a training has left its marks on, and the network."""
    torch.manual_seed(0)
    keys = dict(network)
    built = component("networks:CLASSIFIERS", keys.pop("name"), **keys)
    model = built.build(classes).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean, std=0.1)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
    metadata = {
        "classes": [str(one) for one in range(classes)],
        "image_size": list(SIZE),
        "network": built.plain(),
        "config": {"train": {"method": "trades"}},
        "data": "ab" * 32,
        "epoch": 3,
        **about,
    }
    save_weights(folder / "checkpoints" / "best.safetensors", model.state_dict(), metadata)
    return folder, model


def images(count=5, size=SIZE):
    return torch.rand(count, *size, generator=torch.Generator().manual_seed(3))


def forced(model, expert):
    """What a mixture says with one expert at all sites."""
    weights = torch.zeros(model.router.sites, 5, model.num_experts, 1, 1, 1)
    weights[:, :, expert] = 1
    return model.forward_given(images(), weights)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, None),
        ({"granularity": "stage"}, "routes for each stage: pathway 2 is expert 2 at all 4 sites, for every image"),
        ({"granularity": "layer"}, "routes for each layer: pathway 2 is expert 2 at all 19 sites"),
        ({"top_k": 2}, "mixes its best experts: pathway 2 is expert 2, for every image"),
    ],
)  # fmt: skip
def test_a_pathway_is_a_cnn_with_the_logits_of_its_expert_at_all_sites(tmp_path, keys, told):
    run, model = stored(tmp_path / "run", {**ROUTED, **keys, "mean": [0.4, 0.5, 0.6], "enlarge": 2})
    lines = export(str(run), tmp_path / "out", pathway=2)
    assert len(lines) == (1 if told is None else 2) and (told is None or told in lines[0])
    tensors, metadata = load_weights(tmp_path / "out" / "best.safetensors")
    keys = {"stem": "cifar", "enlarge": 2, "mean": [0.4, 0.5, 0.6], "std": [0.25] * 3}
    assert metadata["network"] == {"name": "cnn", **KEYS, **keys}
    plain = CNN(10, **KEYS, **keys).eval()
    plain.load_state_dict(tensors)  # strict
    assert torch.equal(plain(images()), forced(model, 2))
    assert not torch.equal(plain(images()), forced(model, 1))
    source = load_metadata(weights_file(run))
    origin = metadata["exported_from"]
    assert origin["tensors_sha256"] == source["tensors_sha256"] and origin["pathway"] == 2
    assert origin["network"] == source["network"] and origin["config"] == source["config"]
    assert origin["path"] == str(weights_file(run))
    for key in ("classes", "image_size", "data", "epoch"):
        assert metadata[key] == source[key]
    assert metadata["parameters"] == sum(parameter.numel() for parameter in plain.parameters())


def test_an_export_is_loaded_by_its_folder_and_exported_again(tmp_path):
    run, model = stored(tmp_path / "run", ROUTED)
    export(str(run), tmp_path / "first", pathway=0)
    loaded = load_classifier(str(tmp_path / "first"), "RUN")
    assert loaded.file == tmp_path / "first" / "best.safetensors" and not loaded.network.training
    assert torch.equal(loaded.network(images()), forced(model, 0))
    export(str(tmp_path / "first"), tmp_path / "again")
    tensors, metadata = load_weights(tmp_path / "again" / "best.safetensors")
    assert metadata["tensors_sha256"] == loaded.metadata["tensors_sha256"] == loaded.sha256
    assert metadata["exported_from"]["exported_from"]["pathway"] == 0
    assert metadata["network"] == loaded.metadata["network"]


@pytest.mark.parametrize("arch", ["resnet18", "densenet"])
def test_a_sparse_network_is_a_cnn_of_full_width_with_zeros(tmp_path, arch):
    run, model = stored(tmp_path / "run", {**SPARSE, "arch": arch})
    note, line = export(str(run), tmp_path / "out")
    assert "pruned filters are 0 in best.safetensors" in note and "parameters" in line
    plain = load_classifier(str(tmp_path / "out"), "RUN")
    assert type(plain.network) is CNN and plain.metadata["network"]["ratio"] == 1.0
    assert torch.equal(plain.network(images()), model(images()))
    for conv, kept in zip(plain.network.body.expert_convs(), model.masks(), strict=True):
        assert (conv.weight.abs().sum(dim=(1, 2, 3)) > 0).tolist() == kept.bool().tolist()


@pytest.mark.parametrize(
    ("network", "pathway"),
    [
        (ROUTED, 1),
        (SPARSE, None),
        ({"name": "cnn", "arch": "vgg16_bn", "ratio": 0.03, "enlarge": 4}, None),
        ({"name": "sparse_cnn", "arch": "wrn_28_4", "ratio": 0.02}, None),
    ],
    ids=["pathway", "sparse", "vgg", "sparse_wrn"],
)
def test_onnxruntime_says_what_torch_says_for_any_number_of_images(tmp_path, network, pathway):
    run, model = stored(tmp_path / "run", network)
    *_, line = export(str(run), tmp_path / "out", pathway=pathway, onnx=True)
    assert "model.onnx: opset" in line and "largest difference from torch" in line
    session = onnxruntime.InferenceSession(
        tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (given,) = session.get_inputs()
    assert given.name == "images" and given.shape == ["batch", *SIZE]
    expected = (forced(model, pathway) if pathway is not None else model(images())).detach()
    spread = (expected.max() - expected.min()).item()
    assert spread > 0.1
    for count in (1, 5):
        (found,) = session.run(None, {"images": images()[:count].numpy()})
        assert (torch.from_numpy(found) - expected[:count]).abs().max() < 1e-4 * spread
    plain = load_classifier(str(tmp_path / "out"), "RUN").network
    full = sum(parameter.numel() for parameter in plain.parameters())
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    weights = sum(torch.tensor(one.dims).prod().item() for one in graph.initializer)
    assert weights < 0.1 * full if network["name"] == "sparse_cnn" else weights < 1.2 * full


def test_an_opset_that_is_asked_for_is_written(tmp_path):
    run, _ = stored(tmp_path / "run", {"name": "cnn", **KEYS})
    export(str(run), tmp_path / "out", onnx=True, opset=22)
    assert [one.version for one in onnx.load(tmp_path / "out" / "model.onnx").opset_import] == [22]


def test_a_graph_with_other_logits_is_refused_and_nothing_written(tmp_path, monkeypatch):
    run, model = stored(tmp_path / "run", {"name": "cnn", **KEYS})
    with torch.no_grad():
        other = load_classifier(str(run), "RUN").network
        other.body.head.bias[3] += 0.01
    with pytest.raises(UserError, match="--onnx: the graph's logits differ from torch by 1.0e-02"):
        onnx_graph(Exported(model, other, {}), SIZE, None)
    other.body.head.bias[3] = torch.nan
    monkeypatch.setattr(exporting, "plain_network", lambda *_: Exported(other, other, {}))
    with pytest.raises(UserError, match="differ from torch by inf.*nothing was written"):
        export(str(run), tmp_path / "out", onnx=True)
    assert not (tmp_path / "out").exists()


def test_overwriting_leaves_no_graph_of_other_weights(tmp_path):
    run, _ = stored(tmp_path / "run", ROUTED)
    export(str(run), tmp_path / "out", pathway=0)
    before = (tmp_path / "out" / "best.safetensors").read_bytes()
    (tmp_path / "out" / "model.onnx").write_text("of pathway 0")
    with pytest.raises(UserError, match="out is not empty; replace what is there"):
        export(str(run), tmp_path / "out", pathway=1)
    assert (tmp_path / "out" / "best.safetensors").read_bytes() == before
    export(str(run), tmp_path / "out", pathway=1, overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["best.safetensors"]
    assert (tmp_path / "out" / "best.safetensors").read_bytes() != before


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a mixture, a CNN, a sparse network and things that are none."""
    monkeypatch.chdir(tmp_path)
    stored(Path("mixture"), ROUTED)
    stored(Path("plain"), {"name": "cnn", **KEYS})
    stored(Path("sparse"), {**SPARSE, "arch": "densenet"})
    stored(Path("sizeless"), {"name": "cnn", **KEYS}, image_size=None)
    segmenting = {"classes": ["a"], "network": {"name": "deeplabv3plus", "backbone": "resnet18"}}
    save_weights("expert.safetensors", {"a": torch.zeros(1)}, segmenting)
    save_weights("gate.safetensors", {"a": torch.zeros(1)}, {"classes": ["a"], "gate": {}})
    Path("file").touch()
    Path("others").mkdir()
    Path("others/last.pt").touch()
    export("plain", Path("done"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("mixture --out new", "--pathway: missing; mixture/checkpoints/best.safetensors holds a mixture of 3: 0 to 2"),
        ("mixture --out new --pathway 3", "pathway: 3 is wrong; expected 0 to 2"),
        ("mixture --out new --pathway -1", "pathway: -1 is wrong; expected 0 to 2"),
        ("plain --out new --pathway 0", "--pathway: plain/checkpoints/best.safetensors holds a cnn, which has none"),
        ("sparse --out new --pathway 0", "best.safetensors holds a sparse_cnn, which has none; leave it out"),
        ("gone --out new", "RUN: no checkpoint at gone/checkpoints/best.safetensors; train that network first"),
        ("expert.safetensors --out new", "RUN: expert.safetensors holds a deeplabv3plus, not a classifier"),
        ("gate.safetensors --out new", "RUN: gate.safetensors holds a gate, not a classifier"),
        ("sizeless --out new", "best.safetensors doesn't tell the size of its images; train that network again"),
        ("plain --out file", "--out: file should become a folder, but is a file"),
        ("plain --out done", "--out: done is not empty; replace what is there (--overwrite), or name another"),
        ("plain --out others --overwrite", "--out: others holds other things than an export (last.pt); name another"),
        ("done --out done --overwrite", "--out: done holds RUN itself; name another"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line_and_nothing_is_written(here, capsys, line, told):
    before = Path("done/best.safetensors").read_bytes()
    assert run(main, line.split()) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not Path("new").exists() and Path("done/best.safetensors").read_bytes() == before
    assert [path.name for path in Path("others").iterdir()] == ["last.pt"]


def test_missing_packages_are_told_with_the_command_that_brings_them(here, capsys, monkeypatch):
    find, installed = importlib.util.find_spec, {"onnx": True, "onnxscript": None, "onnxruntime": True}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: installed[name] if name in installed else find(name, *rest),
    )
    assert run(main, ["plain", "--out", "new", "--onnx"]) == 2
    told = "--onnx: needs onnxscript: pip install onnx onnxscript onnxruntime\n"
    assert capsys.readouterr().err == told and not Path("new").exists()


def test_opsets_that_the_exporter_does_not_write_are_refused(here, capsys):
    assert run(main, ["plain", "--out", "new", "--onnx", "--opset", "17"]) == 2
    newest = onnx.defs.onnx_opset_version()
    assert capsys.readouterr().err == f"--opset: 17 is wrong; expected 18 to {newest}\n"
    assert run(main, ["plain", "--out", "new", "--onnx", "--opset", str(newest + 1)]) == 2
    assert not Path("new").exists()


def test_the_command_tells_what_it_wrote(here, capsys):
    assert main(["mixture", "--out", "new", "--pathway", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("new/best.safetensors: ") and out.endswith(" parameters\n")
    assert Path("new/best.safetensors").exists()
