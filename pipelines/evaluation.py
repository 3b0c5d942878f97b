"""The evaluation pipeline: everything a config names in one pass over the frames, then tables and pictures."""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from dataloaders.frames import Frame, FrameIndex
from dataloaders.transforms import valid_window
from engine.checkpoints import atomic_write
from engine.config import Evaluation, Run, UserError, dump
from engine.devices import own_gpu, pick_device
from evaluation.ceilings import NO_CEILINGS, Ceilings, ceilings_for
from evaluation.console import note_idle, results_table
from evaluation.corruptions import Corrupted
from evaluation.evaluate import Sample, spread_frames
from evaluation.evaluate import evaluate as evaluate_rows
from evaluation.gate_table import collapse_warnings
from evaluation.results import Protocol, Results, best_row, main_subset
from evaluation.robust import begin as begin_ledger
from evaluation.robust import shard
from evaluation.rows import Row, constant_row
from evaluation.tables import write_tables
from networks.resize import upsample
from pipelines import corruptions, robustness
from pipelines.matrix import Zoo, as_evaluation, constant_candidates, load_zoo, subsets_of
from pipelines.segmentation import evaluation_batches, refuse_bad_data, tell_bad_data
from reports.figures import overlay, shown_rows


def evaluate(config: Run | Evaluation, options) -> Results | None:
    """Evaluate every run that the config names in one pass over the frames, then under corruptions and attacks where
    it asks for them; tables and pictures are written. Of several processes (torchrun) the first does the passes, all
    do attacks."""
    device, rank = own_gpu(pick_device(options.device)), shard()[0]
    if isinstance(config, Run):
        config = as_evaluation(config)
    settings, folder = config.evaluate, evaluation_folder(config)
    attacked = robustness.is_asked(settings)
    last = {corruptions.LAST: corruptions.is_asked(settings), "robustness.csv": attacked, "results.csv": True}
    done = all((folder / name).exists() for name, asked in last.items() if asked)
    begun = (folder / "ledger").exists() or (folder / corruptions.FOLDER).exists()
    done = done or ((folder / "results.csv").exists() and not begun)  # else it goes on
    if done and not (options.overwrite or options.dry_run):
        raise UserError(f"{folder}: holds an evaluation already; evaluate again with --overwrite")
    index = config.data.build()
    subsets = subsets_of(config)
    frames = index.select(settings.split, subsets)
    zoo = load_zoo(config, index)
    config = robustness.with_ladder(config, zoo)
    settings = config.evaluate
    if not attacked:
        note_idle(settings)
    if options.dry_run:
        print(describe_zoo(config, zoo, frames))
        if corruptions.is_asked(settings):
            print(corruptions.describe(settings, frames))
        if attacked:
            print(robustness.describe_attacks(config, index, zoo, subsets))
        refuse_bad_data(index)
        if attacked:
            robustness.refuse_unlabelled(config, index, subsets)
        return None
    tell_bad_data(index)
    results = None
    if attacked:
        robustness.refuse_unlabelled(config, index, subsets)
        parts = robustness.parts_of(config, index, zoo, subsets)
        # One of another evaluation is refused here, before anything is lost.
        begin_ledger(folder / "ledger", *parts, device=device, replace=options.overwrite)
    if rank == 0:
        robustness.begin(folder)
        corruptions.begin(folder, options.overwrite and not options.resume)
        results = clean_matrix(config, index, frames, zoo, subsets, device)
    if attacked:
        robustness.attack_rows(config, index, parts, device, folder, options.overwrite)
    return results


def clean_matrix(
    config: Evaluation,
    index: FrameIndex,
    frames: Sequence[Frame],
    zoo: Zoo,
    subsets: Sequence[str],
    device: torch.device,
) -> Results:
    """Every row on the frames as they are."""
    settings, folder = config.evaluate, evaluation_folder(config)
    for trained in zoo.networks.values():
        trained.network.to(device, memory_format=torch.channels_last)
    for trained, _ in zoo.gates.values():
        trained.network.to(device)
    chosen, constant = choose_on_val(config, zoo, index, device)
    rows = zoo.rows(settings.controls, constant)
    bounded = settings.ceilings and len(zoo.experts) > 1
    ceilings = ceilings_for(zoo.experts) if bounded else NO_CEILINGS
    samples: list[Sample] = []

    def keep_shown(sample: Sample) -> None:  # a native A2D2 prediction has 2 MB, and there are twenty rows
        kept = {
            kind: {name: ids for name, ids in getattr(sample, kind).items() if name in shown}
            for kind in ("predictions", "cases")
        }
        samples.append(replace(sample, **kept))

    shown = shown_rows([row.info for row in rows], chosen)
    results = run_rows(
        config,
        index,
        frames,
        zoo,
        rows,
        settings.split,
        device,
        ceilings=ceilings,
        keep=spread_frames(frames, settings.overlays),
        on_sample=keep_shown,
        chosen=chosen,
    )
    write_evaluation(folder, config, zoo, results, rows, samples, subsets, index)
    print(results_table(results, subsets, zoo.paper_rows))
    for warning in collapse_warnings(results, subsets):
        print(f"warning: {warning}")
    if corruptions.is_asked(settings):
        run = partial(run_rows, config, index, frames, zoo, rows, settings.split, device)
        corruptions.corrupted_rows(folder, settings, index, frames, zoo, results, subsets, run, device.type)
    print(f"evaluation: {folder}")
    return results


def run_rows(
    config: Evaluation,
    index: FrameIndex,
    frames: Sequence[Frame],
    zoo: Zoo,
    rows: Sequence[Row],
    split: str,
    device: torch.device,
    *,
    ceilings: Ceilings = NO_CEILINGS,
    change: Callable | None = None,
    **options,
) -> Results:
    """One pass of evaluation.evaluate under the config's protocol; networks that no row needs don't run. Each image is
    replaced by change(image uint8 [H, W, 3], name of its frame) where that is given."""
    data, settings = config.data, config.evaluate
    batches = evaluation_batches(data, index, frames, settings.batch_size, settings.resolution)
    if change is not None:
        batches = Corrupted(batches, change)
    protocol = Protocol(
        dataset=index.name,
        split=split,
        classes=index.classes,
        training_subsets=tuple(name for name in index.subsets if name in index.trained_subsets),
        image_size=data.image_size,
        resize=data.resize,
        resolution=settings.resolution,
        absent=settings.absent,
        precision=settings.precision,
    )
    needed = {*ceilings.experts, *(name for row in rows for name in row.networks)}
    networks = {name: trained.network for name, trained in zoo.networks.items() if name in needed}
    return evaluate_rows(
        batches,
        networks,
        rows,
        protocol,
        upsample=upsample,
        window=partial(valid_window, image_size=data.image_size, resize=data.resize),
        device=device,
        ceilings=ceilings,
        **options,
    )


def choose_on_val(
    config: Evaluation, zoo: Zoo, index: FrameIndex, device
) -> tuple[str, tuple[float, ...] | None]:
    """(best gate, best constant weights) by mIoU on the validation frames; no test frame is looked at."""
    candidates = constant_candidates(zoo) if config.evaluate.controls and len(zoo.experts) > 1 else {}
    rows = [zoo.gate_row(name) for name in zoo.learned_gates]
    rows += [constant_row(name, zoo.experts, weights) for name, weights in candidates.items()]
    if len(rows) < 1 or (not candidates and len(rows) == 1):
        return (rows[0].name if rows else ""), None
    results = run_rows(config, index, index.select("val", config.data.subsets), zoo, rows, "val", device)
    subset = main_subset(results.subset_names)
    gate = best_row(results, zoo.learned_gates, subset) if zoo.learned_gates else ""
    return gate, candidates[best_row(results, candidates, subset)] if candidates else None


def write_evaluation(
    folder: Path, config: Evaluation, zoo: Zoo, results: Results, rows, samples, subsets, index
) -> None:
    """per_image.npz, overlays and tables; results.csv last: where it is, the evaluation is complete."""
    costs = zoo.costs(rows, config.data.image_size)
    atomic_write(folder / "config.yaml", dump(config.resolved()))
    results.save(folder / "per_image.npz")
    shutil.rmtree(
        folder / "overlays", ignore_errors=True
    )  # of an earlier evaluation, of other networks maybe
    for sample in samples:
        picture = overlay(sample, results, index.palette)
        atomic_write(folder / "overlays" / f"{sample.subset}_{sample.name.replace('/', '_')}.png", picture)
    write_tables(folder, results, costs, subsets)


def evaluation_folder(config: Run | Evaluation) -> Path:
    """runs/<name>/evaluation/<split>/"""
    return Path(config.output) / config.name / "evaluation" / config.evaluate.split


def describe_zoo(config: Evaluation, zoo: Zoo, frames: Sequence[Frame]) -> str:
    """What --dry-run tells of an evaluation."""
    counts = Counter(frame.subset for frame in frames)
    lines = [
        f"{config.name}: {', '.join(f'{count} {subset}' for subset, count in counts.items())} ({config.evaluate.split})"
    ]
    costs = zoo.costs(zoo.rows(controls=False), config.data.image_size)
    lines += [f"{row}: {cost.parameters:,} parameters, {cost.gmacs:.2f} GMACs" for row, cost in costs.items()]
    return "\n".join(lines)
