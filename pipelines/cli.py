"""The command line of every entry script: loads and checks the config before anything heavy is imported."""

import argparse
import importlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from engine.command import run
from engine.config import (
    DEVICE_NAMES,
    Classification,
    ClassifierEvaluation,
    Config,
    Evaluation,
    Pipeline,
    Run,
    UserError,
    load,
)

# The networks that a family's train and evaluate scripts take; those of other makers go with the first.
FAMILIES = {"deeplab": ("deeplabv3plus", "smp", "external"), "frrn": ("frrn",)}

# What a command runs, imported when the config is known to be right.
COMMANDS = {
    "train": "pipelines.segmentation:train",
    "evaluate": "pipelines.evaluation:evaluate",
    "pipeline": "pipelines.stages:run",
    "train_cnn_moe": "pipelines.classification:train",
    "evaluate_cnn_moe": "pipelines.classifier_evaluation:evaluate",
}
SCRIPTS = {  # those of no family
    "pipeline": "run_pipeline.py", "train_cnn_moe": "train_cnn_moe.py", "evaluate_cnn_moe": "evaluate_cnn_moe.py",
}  # fmt: skip
# What becomes of a folder that is there already, by the first word of the command.
FOLDER_FLAGS = {
    "train": {
        "resume": "go on where the run folder's last.pt stands",
        "overwrite": "empty the run folder first",
    },
    "evaluate": {
        "resume": "go on with an evaluation that was stopped; it does so without this flag, too",
        "overwrite": "evaluate again, also by another config: tables are written anew, passes under corruptions made "
        "anew, and of the ledger of attacks those records are used that fit",
    },
}


@dataclass(frozen=True)
class Options:
    """What the command line says beside the config; status, why, only and force concern pipelines alone."""

    dry_run: bool = False
    resume: bool = False
    overwrite: bool = False
    device: str = "auto"
    status: bool = False
    why: bool = False
    only: str | None = None
    force: str | None = None


def main(doc: str, command: str, family: str | None = None, argv: list[str] | None = None) -> int:
    """Runs a command of COMMANDS; returns the exit code, see engine.command.run."""

    def start(argv: Sequence[str]) -> int:
        arguments = _parser(doc, command).parse_intermixed_args(argv)
        config = load(arguments.config, arguments.overrides)
        check(config, command, family, arguments.config)
        if arguments.print_config:
            print(config.render_with_sources(), end="")
            return 0
        refuse_ranks(command)
        given = {
            field.name: getattr(arguments, field.name) for field in fields(Options) if field.name in arguments
        }
        function_of(command)(config, Options(**given))
        return 0

    return run(start, argv)


def function_of(command: str) -> Callable:
    """The function of COMMANDS that runs a command."""
    module, function = COMMANDS[command].split(":")
    return getattr(importlib.import_module(module), function)


def refuse_ranks(command: str) -> None:
    """UserError for a training that torchrun started in several processes: each would do all of it in one folder. An
    evaluation shares its attacks between them."""
    world = os.environ.get("WORLD_SIZE", "1")
    if not command.startswith("evaluate") and world.isdigit() and int(world) > 1:
        raise UserError(
            f"WORLD_SIZE: {world} processes would each do the whole training in one folder; start one, without "
            "torchrun (an evaluation shares its attacks between several)"
        )


def check(config: Config, command: str, family: str | None, path: str) -> None:
    """UserError where the config is for another script, naming the command that takes it."""
    fitting, what = _fitting(config, family)
    if command not in fitting:
        raise UserError(f"{path}: {what}; run: python {_script(fitting[0], config, family)} {path}")
    network = config.network.name if isinstance(config, Run) and config.network else None
    if family and network and network not in FAMILIES[family]:
        others = [other for other, names in FAMILIES.items() if network in names]
        hint = f"; run: python {command}_{others[0]}.py {path}" if others else ""
        allowed = ", ".join(FAMILIES[family])
        raise UserError(f"{path}: network.name: {command}_{family}.py takes {allowed}, not {network}{hint}")


def _fitting(config: Config, family: str | None) -> tuple[tuple[str, ...], str]:
    """The commands that take a config, and what it is."""
    if isinstance(config, Pipeline):
        return ("pipeline",), "this is a pipeline of stages"
    if isinstance(config, Classification):
        return ("train_cnn_moe", "evaluate_cnn_moe"), "this is a classifier"
    if isinstance(config, ClassifierEvaluation):
        return ("evaluate_cnn_moe",), "this evaluates trained classifiers, there is nothing to train"
    if isinstance(config, Evaluation):
        return ("evaluate",), "this evaluates finished runs, there is nothing to train"
    if config.ensemble:
        return ("evaluate",), "an ensemble has nothing to train"
    if config.train is None:
        return (
            "evaluate",
        ), "train: missing, so there is nothing to train (train: {epochs: ...} would say how)"
    return ("train", "evaluate"), "this is a single run"


def _script(command: str, config: Config, family: str | None) -> str:
    if command in SCRIPTS:
        return SCRIPTS[command]
    network = getattr(config, "network", None)
    families = [name for name, networks in FAMILIES.items() if network and network.name in networks]
    return f"{command}_{family or (families or list(FAMILIES))[0]}.py"


def _device(text: str) -> str:
    if not re.fullmatch(DEVICE_NAMES, text):
        raise argparse.ArgumentTypeError(f"{text!r} is wrong; allowed: auto, cpu, cuda, cuda:N")
    return text


def _parser(doc: str, command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides",
        metavar="a.b=c",
        nargs="*",
        default=[],
        help="values of the config to change, such as train.epochs=3",
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print every value with the file:line it came from"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check config, data, experts and shapes; train and evaluate nothing",
    )
    parser.add_argument("--device", type=_device, default="auto", help="auto (default), cpu, cuda or cuda:N")
    if command == "pipeline":
        parser.add_argument("--status", action="store_true", help="tell which stages are done")
        parser.add_argument(
            "--why", action="store_true", help="tell what changed for every stage that is to run"
        )
        parser.add_argument("--only", metavar="STAGE", help="run this stage alone")
        parser.add_argument("--force", metavar="STAGE", help="run this stage even if it is done")
    else:
        told = FOLDER_FLAGS[command.split("_")[0]]
        folder = parser.add_mutually_exclusive_group()
        for flag, what in told.items():
            folder.add_argument(f"--{flag}", action="store_true", help=what)
    return parser
