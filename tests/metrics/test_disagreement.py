"""Cases of disagreement against pixel by pixel counting; that they are a partition for any number of experts."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.disagreement import (
    AGAINST_ALL,
    AGREED,
    CASES,
    CONTRADICTED,
    FIRST_ALONE,
    FOLLOWED,
    ONE_FOLLOWED,
    OWN,
    OWN_ANSWER,
    TIED,
    case_map,
    case_names,
    count_cases,
)

CLASSES = 4


@st.composite
def scenes(draw):
    """answers [R, B, 1, n], experts [E, B, 1, n], labels [B, 1, n] with ignored pixels, tied like answers."""
    rows, images, pixels = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    experts = draw(st.integers(2, 6))

    def some(*shape, values=tuple(range(CLASSES))):
        count = int(np.prod(shape))
        found = draw(st.lists(st.sampled_from(values), min_size=count, max_size=count))
        return torch.tensor(found, dtype=torch.uint8).reshape(shape)

    return (
        some(rows, images, 1, pixels),
        some(experts, images, 1, pixels),
        some(images, 1, pixels, values=(*range(CLASSES), 255)),
        some(rows, images, 1, pixels, values=(0, 1)).bool(),
    )


def by_hand(answers, experts, labels, tied):
    """count_cases in plain Python."""
    rows, images = answers.shape[:2]
    counts = np.zeros((rows, images, CLASSES, 5 + len(experts), 2 + len(experts)), np.int64)
    for row, image, pixel in np.ndindex(rows, images, labels.shape[-1]):
        label = labels[image, 0, pixel].item()
        answer = answers[row, image, 0, pixel].item()
        said = [expert[image, 0, pixel].item() for expert in experts]
        if label == 255:
            continue
        who = np.array([1, answer == label, *(one == label for one in said)])
        cell = counts[row, image, label]
        if len(set(said)) == 1:
            follows_by_tie = answer != said[0] and tied[row, image, 0, pixel].item()
            cell[FOLLOWED if answer == said[0] or follows_by_tie else CONTRADICTED] += who
            cell[TIED] += who * follows_by_tie
        else:
            cell[ONE_FOLLOWED if answer in said else OWN_ANSWER] += who
            for index, one in enumerate(said):
                cell[TIED + 1 + index] += who * (one == answer)
    return counts


@settings(max_examples=120, deadline=None)
@given(scenes())
def test_counts_equal_counting_by_hand(scene):
    assert np.array_equal(count_cases(*scene, CLASSES), by_hand(*scene))


@settings(max_examples=60, deadline=None)
@given(scenes())
def test_the_cases_are_a_partition_of_the_labelled_pixels_of_every_image_and_class(scene):
    labels = scene[2]
    counts = count_cases(*scene, CLASSES)
    labelled = torch.stack([(labels == index).sum(dim=(1, 2)) for index in range(CLASSES)], dim=1).numpy()
    cases, parts = counts[..., : len(CASES), :], counts[..., TIED + 1 :, :]
    assert (cases[..., 0].sum(axis=-1) == labelled).all()
    assert (counts[..., 1:] <= counts[..., :1]).all()  # right ones are among the pixels
    assert (parts.sum(axis=3)[..., 0] >= cases[..., ONE_FOLLOWED, 0]).all()
    if len(scene[1]) == 2:  # then one of them at a time
        assert (parts.sum(axis=3) == cases[..., ONE_FOLLOWED, :]).all()
    assert (counts[..., TIED, :] <= cases[..., FOLLOWED, :]).all()


@settings(max_examples=60, deadline=None)
@given(scenes())
def test_the_map_shows_what_is_counted(scene):
    answers, experts, labels, _ = scene
    counts = count_cases(*scene, CLASSES).sum(axis=2)[..., 0]  # [R, B, 5 + E]
    shown = case_map(*scene)
    assert (shown == 255).eq(labels == 255).all()
    for case, index in ((AGREED, FOLLOWED), (AGAINST_ALL, CONTRADICTED), (OWN, OWN_ANSWER)):
        assert ((shown == case).sum(dim=(2, 3)).numpy() == counts[..., index]).all()
    followed = (shown >= FIRST_ALONE) & (shown != 255)
    assert (followed.sum(dim=(2, 3)).numpy() == counts[..., ONE_FOLLOWED]).all()
    for index, expert in enumerate(experts):
        alone = shown == FIRST_ALONE + index
        several = followed & (shown == FIRST_ALONE + len(experts)) & (answers == expert)
        found = (alone | several).sum(dim=(2, 3)).numpy()
        assert (found == counts[..., TIED + 1 + index]).all()
        assert (answers == expert)[alone].all()


def test_every_case_of_two_experts():
    labels = torch.tensor([[1, 1, 1, 1, 1, 1, 255]], dtype=torch.uint8)
    highway = torch.tensor([[1, 0, 1, 0, 0, 2, 1]], dtype=torch.uint8)
    urban = torch.tensor([[1, 0, 0, 1, 2, 2, 1]], dtype=torch.uint8)
    moe = torch.tensor([[[1, 1, 1, 0, 1, 0, 1]]], dtype=torch.uint8)
    tied = torch.tensor([[[0, 0, 0, 0, 1, 1, 0]]], dtype=torch.bool)
    experts = torch.stack([highway, urban])
    assert case_map(moe, experts, labels, tied).tolist() == [[[0, 1, 3, 3, 2, 0, 255]]]
    assert case_names(["highway", "urban"])[3:] == ["follows highway", "follows urban"]
    assert case_names(["a", "b", "c"])[6] == "follows several"
    counts = count_cases(moe, experts, labels, tied, 3)[0, 0, 1]  # pixels, MoE, highway, urban right
    assert counts[FOLLOWED].tolist() == [2, 1, 1, 1]
    assert counts[TIED].tolist() == [1, 0, 0, 0]
    assert counts[CONTRADICTED].tolist() == [1, 1, 0, 0]
    assert counts[ONE_FOLLOWED].tolist() == counts[TIED + 1].tolist() == [2, 1, 1, 1]
    assert counts[TIED + 2].tolist() == [0, 0, 0, 0]
    assert counts[OWN_ANSWER].tolist() == [1, 1, 0, 0]


def test_many_classes_and_many_experts_do_not_overflow():
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(0, 38, (9, 1, 40), generator=generator, dtype=torch.uint8)
    answers = experts[torch.randint(0, 9, (2,), generator=generator)]
    labels = experts[3]
    counts = count_cases(answers, experts, labels, torch.zeros_like(answers, dtype=torch.bool), 38)
    assert counts[:, :, :, : len(CASES), 0].sum() == 2 * 40
    assert counts[:, :, :, OWN_ANSWER, 0].sum() == counts[:, :, :, CONTRADICTED, 0].sum() == 0
    assert counts[..., : len(CASES), 2 + 3].sum() == 2 * 40  # the fourth expert is always right


def test_ignored_pixels_are_counted_in_no_other_image_however_many_there_are():
    answers = torch.zeros(4, 3, 1, 50, dtype=torch.uint8)  # 4 * 3 * 38 cells are more than label 255 reaches
    labels = torch.full((3, 1, 50), 255, dtype=torch.uint8)
    labels[2, 0, 0] = 1
    counts = count_cases(answers, answers[:2], labels, torch.zeros_like(answers, dtype=torch.bool), 38)
    assert counts[:, 2, 1, FOLLOWED, 0].tolist() == [1] * 4 and counts[..., FOLLOWED, 0].sum() == 4
