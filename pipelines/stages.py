"""A pipeline: its stages run through the same functions as the scripts, and only where their key changed."""

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.checkpoints import atomic_write, file_sha256, load_metadata
from engine.config import (
    Classification,
    ClassifierEvaluation,
    Component,
    Evaluation,
    Pipeline,
    Run,
    UserError,
    load,
    references,
)
from engine.errors import collected
from engine.flat import differences, flatten
from pipelines.workers import workers

# What a stage of a kind computes; raised when the same config and data would give other results.
VERSIONS = {"network": 1, "gate": 4, "evaluate": 5, "classifier": 3, "evaluate classifiers": 5}
StageConfig = Run | Evaluation | Classification | ClassifierEvaluation
# Keys that say where and how fast, not what: they don't belong to the key of a stage.
PLACES = (
    "name",
    "output",
    "data.root",
    "data.cache_dir",
    "data.workers",
    "train.tensorboard",
    "train.wandb",
    "train.save_steps",
    "train.start_from",  # its weights' hash does
)


@dataclass(frozen=True)
class Stage:
    """One step: its config with the run folder set, and the stages whose weights it takes in."""

    name: str
    config: StageConfig
    needs: tuple[str, ...]

    @property
    def kind(self) -> str:
        if isinstance(self.config, Run):
            return "train" if self.config.train and self.config.ensemble is None else "evaluate"
        return "train" if isinstance(self.config, Classification) else "evaluate"

    @property
    def classifies(self) -> bool:
        return isinstance(self.config, Classification | ClassifierEvaluation)

    @property
    def command(self) -> str:
        """What runs it, as pipelines.cli names it."""
        return f"{self.kind}_cnn_moe" if self.classifies else self.kind

    @property
    def work(self) -> str:
        """What it computes, as VERSIONS names it."""
        if self.classifies:
            return "classifier" if self.kind == "train" else "evaluate classifiers"
        if self.kind == "evaluate":
            return self.kind
        return "gate" if self.config.experts or self.config.shared_encoder else "network"

    @property
    def weights(self) -> dict[str, str | Component]:
        """Role -> run folder, checkpoint file or external network: all networks that the stage takes in."""
        config = self.config
        if isinstance(config, Run):
            return {**config.experts, **config.starts}
        if isinstance(config, Classification):
            return {"start_from": config.train.start_from} if config.train.start_from else {}
        if isinstance(config, ClassifierEvaluation):
            return dict(config.models)
        return {**config.baselines, **config.experts, **config.gates}


@dataclass(frozen=True)
class State:
    """What is known of a stage: done, or why it has to run."""

    name: str
    done: bool
    reasons: tuple[str, ...] = ()
    resumable: bool = False


def run(config: Pipeline, options) -> None:
    """Run the stages that are not done, then write the report; --status and --why only tell."""
    stages = build_stages(config)
    folder = Path(config.output) / config.name
    records = Records(folder / "stages.json")
    for flag, name in (("--only", options.only), ("--force", options.force)):
        if name is not None and name not in stages:
            raise UserError(
                f"{flag} {name}: there is no such stage; stages of {config.name}: {', '.join(stages)}"
            )
    if options.status or options.why:
        print(describe(stages, records, options.why))
        return
    chosen = [stages[options.only]] if options.only else list(stages.values())
    if options.dry_run:
        dry_run(chosen)
        return

    started = time.perf_counter()
    ran = run_stages(chosen, records, options, config.jobs)
    if config.report and not options.only:
        write_pipeline_report(config, stages, folder, rewrite=bool(ran))
    print(
        f"{config.name}: {len(ran)} of {len(chosen)} stages ran in {(time.perf_counter() - started) / 60:.1f} min"
    )


def run_stages(chosen: Sequence[Stage], records: "Records", options, jobs: int) -> list[str]:
    """Run what is not done, at most `jobs` stages at a time, each after those that it needs; names of what ran.

    After a failure no further stage starts; those that run are finished and recorded first."""
    waiting, ran, failure = list(chosen), [], None
    running: dict[Future, tuple[Stage, dict]] = {}
    with workers(jobs) as submit:
        while running or (waiting and failure is None):
            unfinished = {stage.name for stage in waiting} | {stage.name for stage, _ in running.values()}
            ready = [stage for stage in waiting if not unfinished & set(stage.needs)]
            skipped = False
            for stage in ready[: jobs - len(running)] if failure is None else ():
                waiting.remove(stage)
                state = state_of(stage, records, forced=options.force == stage.name)
                if state.done:
                    print(f"{stage.name}: done already", flush=True)
                    skipped = True
                    continue
                print(f"{stage.name}: {'; '.join(state.reasons)}", flush=True)
                record = start_record(stage, records)
                future = submit(stage.name, run_stage, stage, state.resumable, options.device)
                running[future] = (stage, record)
                ran.append(stage.name)
            if skipped:
                continue  # there is a place for another one
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                stage, record = running.pop(future)
                try:
                    seconds = future.result()
                except Exception as error:
                    failure = failure or error
                    continue
                print(f"{stage.name}: finished in {seconds:.0f} s", flush=True)
                records.write(stage.name, {**record, "done": True, "result": result_hash(stage)})
    if failure is not None:
        raise failure
    return ran


def start_record(stage: Stage, records: "Records") -> dict:
    """Notes that the stage was started with today's key. UserError where the weights it takes in are not there."""
    missing = [role for role, path in stage.weights.items() if weights_hash(path) is None]
    if missing:
        role = missing[0]
        raise UserError(
            f"stage {stage.name} needs the weights of {role} ({stage.weights[role]}): train that first"
        )
    ingredients = ingredients_of(stage)
    record = {"key": key_of(ingredients), "ingredients": ingredients, "done": False}
    records.write(stage.name, record)
    return record


def run_stage(stage: Stage, resume: bool, device: str) -> float:
    """Train or evaluate; returns seconds. An evaluation that goes on overwrites its tables, not what it had done."""
    from pipelines.cli import Options, function_of

    start, overwrite = time.perf_counter(), not resume or stage.kind == "evaluate"
    function_of(stage.command)(stage.config, Options(device=device, resume=resume, overwrite=overwrite))
    return time.perf_counter() - start


def build_stages(config: Pipeline) -> dict[str, Stage]:
    """Stages by name, in order, each with its own config: the file, then the pipeline's `set`, then the stage's."""

    def stage(name: str) -> Stage:
        entry = config.stages[name]
        needs = tuple(dict.fromkeys(references(entry.set)))
        folders = {f"@{needed}": f"{config.output}/{config.name}/{needed}" for needed in needs}
        settings = {
            **replace_references(entry.set, folders),
            "name": f"{config.name}/{name}",
            "output": config.output,
        }
        return Stage(name, with_shared(config, entry.config, settings, f"stages.{name}.set"), needs)

    return collected({name: partial(stage, name) for name in config.stages})


def with_shared(config: Pipeline, file: str, settings: dict, origin: str) -> StageConfig:
    """A stage's config with the pipeline's `set` and `seed`, without `train` where nothing is trained."""
    stage = load(file, settings, origin=origin)
    if isinstance(stage, Pipeline):
        key = origin.removesuffix("set") + "config"
        raise UserError(f"{key}: {file} is a pipeline; name the config of a training or an evaluation")
    trains = getattr(stage, "train", None) is not None
    changes = {
        key: value for key, value in config.set.items() if trains or not key.startswith("train.")
    } | settings
    if trains:
        changes["train.seed"] = stage.train.seed + config.seed
    return load(file, changes, origin=origin)


def replace_references(value, folders: dict[str, str]):
    """The value with "@stage" and "@stage/gate", at any depth, replaced by the folders they stand for."""
    if isinstance(value, dict):
        return {key: replace_references(item, folders) for key, item in value.items()}
    if isinstance(value, list):
        return [replace_references(item, folders) for item in value]
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    stage, *rest = value.split("/")
    return "/".join([folders[stage], *rest])


# Keys


def ingredients_of(stage: Stage) -> dict[str, object]:
    """All that the result depends on, flat: config values, code version, data manifest, hashes of weights."""
    config = {
        key: value for key, value in flatten(stage.config.resolved()).items() if matters(key, stage.kind)
    }
    return {
        **{f"config.{key}": value for key, value in config.items()},
        "version": VERSIONS[stage.work],
        "data": data_hash(stage.config),
        **pretrained_hash(stage.config),
        **attack_file_hashes(stage),
        **{f"weights.{role}": weights_hash(path) for role, path in stage.weights.items()},
    }


def matters(key: str, kind: str) -> bool:
    """Whether a config key belongs to a stage's key: what it takes in stands there as hashes, and what is
    evaluated how is nothing to a training, but for the classes that its validation counts."""
    section = key.split(".")[0]
    if (
        key in PLACES
        or section in ("experts", "baselines", "models")
        or (section == "gates" and kind == "evaluate")
    ):
        return False
    return section != "evaluate" or kind == "evaluate" or key == "evaluate.absent"


def key_of(ingredients: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def data_hash(config: StageConfig) -> str:
    if isinstance(config, Classification | ClassifierEvaluation):
        images = config.data.build(config.data.cache_dir)
        return key_of({split: images.manifest(split) for split in images.splits})
    index = config.data.build()
    return index.manifest(index.frames)


def weights_hash(source: str | Component) -> str | None:
    """SHA-256 of a trained network's tensors, None where it is not trained yet; of an external network one over its
    section, with the contents of the files that are named there."""
    from pipelines.models import contents_of, weights_file

    if isinstance(source, Component):
        return key_of(contents_of(source))
    file = weights_file(source)
    return load_metadata(file)["tensors_sha256"] if file.exists() else None


def pretrained_hash(config: StageConfig) -> dict[str, str]:
    """{"weights.pretrained": SHA-256 of the file that a network starts from}, nothing where it is no file."""
    network = getattr(config, "network", None)
    file = Path(str(network.args.get("pretrained"))) if network else Path()
    return {"weights.pretrained": file_sha256(file)} if file.is_file() else {}


def attack_file_hashes(stage: Stage) -> dict[str, str | None]:
    """{"weights.<file>": SHA-256} of the perturbations that an evaluation takes from files; None where none is."""
    if stage.kind != "evaluate":
        return {}
    settings = stage.config.evaluate
    attacks = [*settings.attacks, getattr(settings, "transfer", None)]
    files = [Path(attack.args["file"]) for attack in attacks if attack and "file" in attack.args]
    return {f"weights.{file}": file_sha256(file) if file.is_file() else None for file in files}


def result_hash(stage: Stage) -> str | None:
    """Hash of what the stage leaves behind, to notice that it was removed or changed by hand."""
    if stage.kind == "train":
        hashes = [weights_hash(str(folder)) for folder in run_folders(stage)]
        return hashes[0] if len(hashes) == 1 else None if None in hashes else key_of(dict(enumerate(hashes)))
    results = evaluation_folder(stage) / "results.csv"
    return file_sha256(results) if results.exists() else None


def evaluation_folder(stage: Stage) -> Path:
    """The folder that an evaluation writes into."""
    return Path(stage.config.output) / stage.config.name / "evaluation" / stage.config.evaluate.split


def run_folders(stage: Stage) -> list[Path]:
    """The folders that a stage trains in: its own, or one for each of its gates."""
    from pipelines.gates import runs_in

    if stage.classifies:
        return [Path(stage.config.output) / stage.config.name]
    return [Path(run.output) / run.name for run in runs_in(stage.config)]


def state_of(stage: Stage, records: "Records", forced: bool = False) -> State:
    """Done where the recorded key is today's key and the result is untouched."""
    record = records.read(stage.name)
    if forced:
        return State(stage.name, False, ("forced",))
    if record is None:
        return State(stage.name, False, ("never run",))
    reasons = changes(record["ingredients"], ingredients_of(stage))
    if reasons:
        return State(stage.name, False, tuple(reasons))
    if not record["done"]:
        return State(stage.name, False, ("was interrupted, goes on",), resumable=True)
    if record.get("result") != result_hash(stage):
        return State(stage.name, False, ("its result is missing or was changed",))
    return State(stage.name, True)


def changes(old: dict[str, object], new: dict[str, object]) -> list[str]:
    """One line for each ingredient that differs: "config.train.epochs changed from 5 to 10"."""
    lines = []
    for key, was, now in differences(old, new):
        if is_unset(was) and is_unset(now):
            continue
        if key == "data" or key.startswith("weights."):
            lines.append(f"{key} changed ({short(was)} -> {short(now)})")
        elif key not in old:
            lines.append(f"{key} is new: {now}")
        elif key not in new:
            lines.append(f"{key} is gone, was {was}")
        else:
            lines.append(f"{key} changed from {was} to {now}")
    return lines


def is_unset(value) -> bool:
    """A key that is not there, or says that something is not there: one that a newer version added, unused."""
    return value in (None, "none", {}, [])


def short(digest) -> str:
    return "not trained" if digest is None else str(digest)[:8]


def describe(stages: dict[str, Stage], records: "Records", why: bool) -> str:
    """A line for each stage: done, or to run and (--why) what changed or runs before it."""
    lines, pending = [], set()
    for stage in stages.values():
        state = state_of(stage, records)
        waiting = [name for name in stage.needs if name in pending]
        if state.done and not waiting:
            lines.append(f"{stage.name}: done")
            continue
        pending.add(stage.name)
        reasons = [*([] if state.done else state.reasons), *(f"{name} runs before it" for name in waiting)]
        if why:
            lines += [f"{stage.name}: to run", *(f"    {reason}" for reason in reasons)]
        else:
            more = f" (and {len(reasons) - 1} more; --why)" if len(reasons) > 1 else ""
            lines.append(f"{stage.name}: to run: {reasons[0]}{more}")
    return "\n".join(lines)


def dry_run(stages: list[Stage]) -> None:
    """Validate every stage; one whose inputs are not trained yet is checked as far as that goes."""
    from pipelines.cli import Options, function_of

    for stage in stages:
        print(f"--- {stage.name}")
        missing = [role for role, path in stage.weights.items() if weights_hash(path) is None]
        if missing:
            print(f"waits for the weights of {', '.join(missing)}")
        else:
            function_of(stage.command)(stage.config, Options(dry_run=True))


class Records:
    """stages.json in the pipeline's folder: key, ingredients and result of every stage that was started."""

    def __init__(self, path: Path):
        self.path, self.entries = path, {}
        if not path.exists():
            return
        try:
            self.entries = json.loads(path.read_text(encoding="utf-8"))
            sound = all({"ingredients", "done"} <= record.keys() for record in self.entries.values())
        except (OSError, ValueError, AttributeError):
            sound = False
        if not sound:
            raise UserError(
                f"{path}: damaged; put back an earlier copy, or delete it, and every stage runs again from the start"
            )

    def read(self, stage: str) -> dict | None:
        return self.entries.get(stage)

    def write(self, stage: str, record: dict) -> None:
        self.entries[stage] = record
        atomic_write(self.path, json.dumps(self.entries, indent=1).encode())


def write_pipeline_report(config: Pipeline, stages: dict[str, Stage], folder: Path, rewrite: bool) -> None:
    from reports.report import write_report

    page = folder / "report.html"
    evaluations = [stage for stage in stages.values() if stage.kind == "evaluate"]
    if not evaluations or (page.exists() and not rewrite):
        return
    write_report(
        [evaluation_folder(stage) for stage in evaluations],
        [folder for stage in stages.values() if stage.kind == "train" for folder in run_folders(stage)],
        page,
    )
    print(f"report: {page}")
