"""The command line. Torch, MLflow and the components are imported only by the commands that need them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from cl_sim import __version__
from cl_sim.errors import ClSimError, UnknownName

STORE = Path("runs")
DEFAULT_URI = "sqlite:///mlflow.db"
KINDS = ("strategies", "streams", "encoders", "memories", "data", "augmentations", "presets", "runs")


class Mistake(click.ClickException):
    """A user's mistake where exit status 1 already means something else."""

    exit_code = 2


class Group(click.Group):
    """A command group that prints a user's mistake as one line and suggests the nearest command."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a ClSimError becomes its one line."""
        try:
            return super().invoke(ctx)
        except ClSimError as error:
            raise click.ClickException(str(error)) from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which one was probably meant."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise click.ClickException(str(UnknownName("command", args[0], self.list_commands(ctx), "cl-sim --help")))
        return super().resolve_command(ctx, args)


def example(*lines: str) -> str:
    """An epilog with example commands, kept as typed."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def usual_uri() -> str:
    """The MLflow store if none is named: MLFLOW_TRACKING_URI, else a SQLite file here."""
    return os.environ.get("MLFLOW_TRACKING_URI", DEFAULT_URI)


store_option = click.option(
    "--store", type=click.Path(path_type=Path), default=STORE, show_default=True, help="Folder that holds the runs."
)
uri_option = click.option(
    "--tracking-uri",
    default=usual_uri,
    help=f"MLflow store or server; 'none' for no MLflow.  [default: MLFLOW_TRACKING_URI, else {DEFAULT_URI}]",
)
data_option = click.option(
    "--data", default="", help="Folder with the data sets.  [default: CL_SIM_DATA, else the user's cache folder]"
)
set_option = click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="One setting; may be repeated.")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="cl-sim")
def main() -> None:
    """Replay data once, in order, through continual-learning strategies, and compare them."""


@main.command(
    epilog=example(
        "cl-sim run er split-digits",
        "cl-sim run finetune er er_ace joint split-cifar10 --seeds 0-2 --set strategy.capacity=500",
        "cl-sim run --preset er-cifar10-m200 --seeds 0-4 --data ~/data",
        "cl-sim run --preset pcr-cifar10-m200 --seeds 0-4 --precision bf16",
        "cl-sim run er split-folder:photos --set stream.tasks=3 --set encoder.name=resnet18",
    )
)
@click.argument("names", nargs=-1, metavar="[STRATEGY... STREAM]")
@click.option("--preset", default="", help="Start from a preset: cl-sim list presets.")
@click.option("--config", "file", type=click.Path(path_type=Path), help="Settings in a TOML file.")
@set_option
@click.option("--seeds", default="", help="One run each, e.g. 0-4 or 0,3,7.  [default: 0]")
@click.option("--device", default="", help="auto, cpu, cuda or cuda:N.  [default: auto]")
@click.option(
    "--precision", type=click.Choice(["float32", "bf16"]), help="What the encoder computes in.  [default: float32]"
)
@click.option("--capture", is_flag=True, help="On a GPU: replay steady steps as one CUDA graph (not yet run on one).")
@data_option
@click.option("--workers", type=click.IntRange(1), help="Processes at a time.  [default: cores on a CPU, 1 on a GPU]")
@click.option("--stack", type=click.IntRange(1), help="Seeds trained as one, side by side.  [default: by network]")
@click.option(
    "--abreast",
    type=click.IntRange(1),
    help="Stacks that a process trains in turns, on a GPU each on a stream of its own (not yet run on one).  [default: 1]",
)
@click.option("--encoder-frozen", is_flag=True, help="Do not train the encoder, only what stands on it.")
@click.option("--system-metrics", is_flag=True, help="Let MLflow record CPU, memory and GPU use as well.")
@click.option("--dry-run", is_flag=True, help="Check everything and show the settings, train nothing.")
@store_option
@uri_option
def run(names: tuple[str, ...], **options: Any) -> None:
    """Train strategies on a stream, one run per seed, and print the comparison.

    The last name is the stream, every name before it a strategy. Settings come from the preset, then the file, then the
    options, then --set; the later one wins. A --set strategy.KEY applies to the strategies that have it.
    """
    from cl_sim import commands

    raise SystemExit(commands.run(names, **options))


@main.command(epilog=example("cl-sim resume last", "cl-sim resume er-split-digits-1124-101500"))
@click.argument("runs", nargs=-1, required=True)
@click.option("--workers", type=click.IntRange(1), help="Processes at a time.  [default: cores]")
@store_option
@click.option("--tracking-uri", default="", help="MLflow store or server; 'none' for no MLflow.  [default: as before]")
def resume(runs: tuple[str, ...], workers: int | None, store: Path, tracking_uri: str) -> None:
    """Continue interrupted runs from their last checkpoint, bit for bit.

    RUNS are folders, ids or beginnings of ids; 'last' stands for every run of the newest command.
    """
    from cl_sim import commands

    raise SystemExit(commands.resume(runs, workers, store, tracking_uri))


@main.command("list", epilog=example("cl-sim list strategies", "cl-sim list runs"))
@click.argument("kind", type=click.Choice(KINDS))
@store_option
def list_command(kind: str, store: Path) -> None:
    """List what can be named: strategies, streams, encoders, memories, data, augmentations, presets or runs."""
    from cl_sim import commands

    commands.list_names(kind, store)


@main.command(
    epilog=example(
        "cl-sim describe split-digits",
        "cl-sim describe er",
        "cl-sim describe split-cifar10 --png days.png",
        "cl-sim describe sprites --png clip.png",
    )
)
@click.argument("name")
@set_option
@click.option("--seed", default=0, show_default=True, help="Whose order to show.")
@click.option(
    "--png",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the class timeline, or of a stream of clips the first clip, into this file; .gif makes it move.",
)
@data_option
@store_option
def describe(name: str, sets: tuple[str, ...], seed: int, png: Path | None, data: str, store: Path) -> None:
    """Show a stream (fields, counts, tasks, class timeline), a strategy's settings, a preset or a run."""
    from cl_sim import commands

    commands.describe(name, sets, seed, png, data, store)


@main.command(
    epilog=example(
        "cl-sim compare last",
        "cl-sim compare er-split-digits finetune-split-digits",
        "cl-sim compare a b --format latex > table.tex",
    )
)
@click.argument("runs", nargs=-1, required=True)
@click.option(
    "--format", "form", type=click.Choice(["text", "markdown", "csv", "latex"]), default="text", show_default=True
)
@click.option("--metric", "metrics", multiple=True, help="A column; may be repeated.  [default: the usual ones]")
@click.option("--baseline", default="", help="The run that differences are taken to.  [default: the first]")
@store_option
def compare(runs: tuple[str, ...], form: str, metrics: tuple[str, ...], baseline: str, store: Path) -> None:
    """Compare finished runs: means with 95 % intervals, and paired differences over the seeds they share.

    RUNS are folders, ids or beginnings of ids; 'last' stands for every run of the newest command.
    """
    from cl_sim import commands

    commands.compare(runs, form, metrics, baseline, store)


@main.command(
    epilog=example(
        "cl-sim report",
        "cl-sim report er-split-cifar10-1124-101500 --note 'JPEG copies'",
        "cl-sim report saa-split-cifar10-1124-101500 --as er-saa --against er",
        "cl-sim report er-split-cifar10-1124-151500 --add",
        "cl-sim report --folder results --page README.md",
    )
)
@click.argument("runs", nargs=-1)
@click.option("--folder", type=click.Path(path_type=Path), default=Path("results"), show_default=True)
@click.option("--note", default="", help="A remark on the data, kept with the added runs.")
@click.option("--as", "title", default="", help="File one run under NAME or FOLDER/NAME.  [default: its strategy]")
@click.option("--against", default="", help="The row of the table that the added runs are compared with.")
@click.option("--add", is_flag=True, help="Add the seeds of RUNS to what is filed under their names.")
@click.option("--page", default="", help="A page that shows the tables in brief, between two marks.")
@store_option
def report(
    folder: Path, runs: tuple[str, ...], note: str, title: str, against: str, add: bool, page: str, store: Path
) -> None:
    """Copy the numbers of RUNS into the results folder, then make the tables of its README.md."""
    from cl_sim import commands

    commands.report(folder, runs, note, store, title, against, page, add)


VERDICTS = """\b
Verdicts:
  identical    every new seed is among the stored ones, and no seed's number differs
  agrees       the same, but numbers differ: the 95 % interval of the paired differences contains 0;
               with other seeds: |difference| <= sqrt(half1^2 + half2^2) of the two 95 % intervals
  differs      the difference is larger
  cannot tell  an interval is needed, but one seed gives none

"""


@main.command(
    epilog=VERDICTS
    + example(
        "cl-sim reproduce er-cifar10-m500",
        "cl-sim reproduce er-cifar10-m500 finetune-cifar10 --data ~/data",
        "cl-sim reproduce er-cifar10-m500 --seeds 0,1 --workers 2",
    )
)
@click.argument("names", nargs=-1, required=True, metavar="PRESET...")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder that holds the stored results.",
)
@click.option("--seeds", default="", help="One run each, e.g. 0-4 or 0,3,7.  [default: the stored ones]")
@click.option("--device", default="", help="auto, cpu, cuda or cuda:N.  [default: the stored one]")
@data_option
@click.option("--workers", type=click.IntRange(1), help="Processes at a time.  [default: cores on a CPU, 1 on a GPU]")
@store_option
@uri_option
def reproduce(names: tuple[str, ...], folder: Path, **options: Any) -> None:
    """Rerun presets and say whether they give the numbers stored in the results folder.

    A preset runs as it is now, with the seeds, device, stacking and threads of the stored result; what else has changed
    since is listed first. Then acc_end, acc_aaa and forgetting_chaudhry are compared.

    Exit status: 0 if every number is identical or agrees, 1 if not (or if a run failed), 2 for a mistake in the command.
    """
    from cl_sim import commands

    try:
        status = commands.reproduce(names, folder, options)
    except ClSimError as error:
        raise Mistake(str(error)) from None
    raise SystemExit(status)


@main.command(
    name="export",
    epilog=example("cl-sim export ctvis-video-1124 results.zip", "cl-sim export last results.zip --seed 3"),
)
@click.argument("run_name", metavar="RUN")
@click.argument("path", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--seed", type=int, help="Which seed of the run.  [default: its first]")
@store_option
def export_command(run_name: str, path: Path, seed: int | None, store: Path) -> None:
    """Track the test videos of a trained RUN and write FILE, an archive that the servers of YouTube-VIS and OVIS take.

    The stream must be one of annotated videos, the run must have learned classes (--set strategy.w_class=1).
    """
    from cl_sim import commands

    commands.export(run_name, path, seed, store)


@main.command(epilog=example("cl-sim ui", "cl-sim ui --port 5001"))
@click.option("--port", default=5000, show_default=True)
@uri_option
def ui(port: int, tracking_uri: str) -> None:
    """Open the MLflow UI on the store that holds the runs."""
    from cl_sim import commands

    raise SystemExit(commands.ui(port, tracking_uri))


@main.command(epilog=example("cl-sim sync last", "cl-sim sync last --tracking-uri http://tracking.example:5000"))
@click.argument("runs", nargs=-1, required=True)
@store_option
@uri_option
def sync(runs: tuple[str, ...], store: Path, tracking_uri: str) -> None:
    """Bring runs to an MLflow store or server, from their local records; doing it twice changes nothing."""
    from cl_sim import commands

    commands.sync(runs, store, tracking_uri)


if __name__ == "__main__":
    main()
