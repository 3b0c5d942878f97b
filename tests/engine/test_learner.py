"""Learners in company: each ends as if it had been trained alone, whatever happens to the others."""

import shutil

import pytest
import torch
import toy
from toy import METRICS, Batches, learner, phase_of, settings, together, validate

from engine import progress
from engine.config import Interrupted, UserError
from engine.loop import fit, images_of
from engine.losses import cross_entropy

CROSS_ENTROPY = cross_entropy(None, 255)
SEEDS = {"first": 304, "second": 7, "third": 304}
RATES = {"first": 0.5, "second": 0.5, "third": 0.05}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """progress.png takes longer than the toy's epochs."""
    monkeypatch.setattr(progress, "draw", lambda *arguments: None)


def learners(folder, batches, config, names=tuple(SEEDS), **options):
    return [
        learner(
            folder / name,
            batches,
            config,
            seed=SEEDS[name],
            phases=lambda model, steps, rate=RATES[name]: [phase_of(model, steps, lr=rate)],
            **options,
        )
        for name in names
    ]


def outcome(folder, name) -> tuple[bytes, bytes]:
    return (
        (folder / name / "checkpoints/best.safetensors").read_bytes(),
        (folder / name / "metrics.csv").read_bytes(),
    )


def alone(folder, config) -> dict[str, tuple[bytes, bytes]]:
    """What each learner comes to by itself."""
    for name in SEEDS:
        together(learners(folder, Batches(), config, [name]), Batches(), validate, config)
    return {name: outcome(folder, name) for name in SEEDS}


@pytest.mark.parametrize(
    "changed", [{}, {"ema": 0.9, "accumulate": 2, "clip_norm": 5.0}, {"early_stop": 1, "epochs": 6}]
)
def test_each_ends_as_if_trained_alone(tmp_path, changed):
    config = settings(**changed)
    expected = alone(tmp_path / "alone", config)
    results = together(learners(tmp_path / "all", Batches(), config), Batches(), validate, config)
    assert {name: outcome(tmp_path / "all", name) for name in SEEDS} == expected
    assert len({content for content, _ in expected.values()}) == 3
    if "early_stop" in changed:
        assert len({result.epochs for result in results}) > 1  # they did not all end at once


def test_a_batch_is_prepared_once_for_all(tmp_path):
    config, batches, prepared = settings(epochs=2), Batches(), []

    def counting(batch, device, layout):
        prepared.append(batch.frames[0].name)
        assert not torch.is_grad_enabled()
        return images_of(batch, device, layout)

    fit(
        learners(tmp_path, batches, config),
        batches,
        lambda models: [validate(model) for model in models],
        config,
        "cpu",
        metrics=METRICS,
        prepare=counting,
    )
    assert prepared == [f"frame_{epoch}_{4 * index}" for epoch in range(2) for index in range(6)]


def test_learners_that_were_saved_at_different_steps_go_on_together(tmp_path):
    config = settings(save_steps=2)
    expected = alone(tmp_path / "alone", config)
    folder = tmp_path / "all"

    def stop_with_old_states(epoch, index):
        for name, at in (("first", (0, 4)), ("second", (1, 2))):  # a state some steps behind is kept
            if (epoch, index) == at:
                shutil.copy(folder / name / "checkpoints/last.pt", tmp_path / name)
        if (epoch, index) == (2, 3):
            raise Interrupted

    broken = Batches(hook=stop_with_old_states)
    with pytest.raises(Interrupted):
        together(learners(folder, broken, config), broken, validate, config)
    for name in ("first", "second"):
        shutil.copy(tmp_path / name, folder / name / "checkpoints/last.pt")
    together(learners(folder, Batches(), config, resume=True), Batches(), validate, config)
    assert {name: outcome(folder, name)[1] for name in SEEDS} == {
        name: metrics for name, (_, metrics) in expected.items()
    }
    assert {name: outcome(folder, name)[0] for name in SEEDS} == {
        name: best for name, (best, _) in expected.items()
    }


def test_one_that_fails_does_not_stop_the_others(tmp_path):
    config = settings()
    expected = alone(tmp_path / "alone", config)
    batches = Batches()
    first, second, third = learners(tmp_path / "all", batches, config)

    def broken(model, images, labels):
        total, count = CROSS_ENTROPY(model(images), labels)
        return (total * torch.nan if broken.calls == 8 else total), count

    def counted(model, images, labels):
        broken.calls += 1
        return broken(model, images, labels)

    broken.calls = 0
    second.phases[0].loss = counted
    with pytest.raises(UserError, match=r"^second: training stopped at step 8 .*the loss is nan"):
        together([first, second, third], batches, validate, config)
    assert broken.calls == 8
    for name in ("first", "third"):
        assert outcome(tmp_path / "all", name) == expected[name]
    assert "second: training stopped" in (tmp_path / "all/second/log.txt").read_text()


def test_a_new_learner_joins_finished_ones(tmp_path, capsys):
    config = settings()
    expected = alone(tmp_path / "alone", config)
    folder = tmp_path / "all"
    together(learners(folder, Batches(), config, ["first"]), Batches(), validate, config)
    toy_learners = learners(folder, Batches(), config, resume=True)
    together(toy_learners, Batches(), validate, config)
    assert {name: outcome(folder, name) for name in SEEDS} == expected
    assert "this training is done" in capsys.readouterr().out


def test_lines_name_the_learner(tmp_path, capsys):
    config = settings(epochs=1)
    together(learners(tmp_path, Batches(), config), Batches(), validate, config)
    lines = capsys.readouterr().out
    assert all(f"{name}: epoch 1/1 done" in lines for name in SEEDS)
    toy.train(tmp_path / "single", epochs=1)
    assert "\nepoch 1/1 done" in "\n" + capsys.readouterr().out
