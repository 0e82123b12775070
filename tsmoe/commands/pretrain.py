"""`tsmoe pretrain`, `tsmoe config` and `tsmoe export`."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the three sub-commands."""
    pretrain = subparsers.add_parser(
        "pretrain",
        help="pretrain a model, or go on with an interrupted run",
        description="Pretrain a model. With one process as it is, with many under deepspeed "
        "(--module tsmoe pretrain ..), torchrun (-m tsmoe pretrain ..), accelerate or srun.",
    )
    add_run_arguments(pretrain)
    pretrain.set_defaults(run=_pretrain, stops_on_request=True)

    config = subparsers.add_parser("config", help="print the resolved configuration of a run")
    _add_config_arguments(config)
    config.add_argument("--json", action="store_true", help="print JSON instead of YAML")
    config.set_defaults(run=_config)

    export = subparsers.add_parser(
        "export", help="turn a checkpoint of any number of ranks into one portable package"
    )
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="run folder or checkpoint folder")
    export.add_argument("package", metavar="PACKAGE", help="folder to write")
    export.add_argument("--json", action="store_true", help="print the package's card")
    export.set_defaults(run=_export)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes that runs on the ranks of a pretraining run."""
    _add_config_arguments(parser)
    # DeepSpeed's launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("preset", metavar="PRESET|FILE.yaml", help="name of a preset, or a file")
    parser.add_argument(
        "settings", metavar="KEY=VALUE", nargs="*", help="such as training.steps=500"
    )


def _pretrain(args: argparse.Namespace) -> int:
    from tsmoe.launcher_watch import stop_without_launcher

    stop_without_launcher()  # before torch is imported, which takes seconds
    from tsmoe.ranks import launched_world_size, stop
    from tsmoe.train.loop import Outcome, pretrain
    from tsmoe.train.run_config import resolve

    config = resolve(args.preset, args.settings)
    outcome = pretrain(config)
    stop()
    if outcome is Outcome.STOPPED and launched_world_size() == 1:
        return 75
    # Launchers take any other code for a failure; the markers DONE and REQUEUE tell the rest.
    return 0


def _config(args: argparse.Namespace) -> int:
    import json

    import yaml

    from tsmoe.commands.finetune import resolve_run
    from tsmoe.config import encode
    from tsmoe.train.run_config import FINE_TUNING, preset_names, read_preset, resolve

    is_file = args.preset.endswith((".yaml", ".yml"))
    keys = set(read_preset(args.preset)) if is_file else set()
    if (
        args.preset in preset_names(FINE_TUNING)
        or {"table", "tasks", "start"} & keys
        or any(text.startswith("data=") for text in args.settings)
    ):
        values = encode(resolve_run(args.preset, args.settings))
    else:
        values = encode(resolve(args.preset, args.settings))
    if args.json:
        print(json.dumps(values, indent=1))
    else:
        print(yaml.safe_dump(values, sort_keys=False), end="")
    return 0


def _export(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from tsmoe.train.export import export_package

    card = export_package(Path(args.checkpoint), Path(args.package))
    if args.json:
        print(json.dumps(card, indent=1))
    else:
        print(f"{args.package}: step {card['step']}, {card['parameters']['total']:,} parameters")
    return 0
