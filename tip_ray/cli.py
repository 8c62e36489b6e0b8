"""argv -> the same public functions that anyone can call.

Nothing heavy is imported before a command has been chosen, so that `--help` is instant.
Exit codes: 0 done, 1 the run failed, 2 a bad spec or argument, 3 not found, 130 cancelled or
SIGINT, 143 SIGTERM.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn, TypeAlias

from tip_ray import __version__

SIGINT_EXIT = 130
USAGE_EXIT = 2
LAST_PORT = 65_535


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE_EXIT, f"error: {message}; see `{self.prog} --help`\n")


# argparse has no public name for it
_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help(sys.stderr)
        return USAGE_EXIT
    module, _, function = options.function.partition(":")
    try:
        command = getattr(importlib.import_module(f"tip_ray.commands.{module}"), function)
        code = int(command(options))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of a pipe has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _report("interrupted", SIGINT_EXIT, options.debug)
    except Exception as error:  # noqa: BLE001 - the one place that turns errors into lines and codes
        return _report(_line(error), getattr(error, "exit_code", 1), options.debug)


def _report(line: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {line}", file=sys.stderr)
    return code


def _line(error: Exception) -> str:
    """One line; an error that is not ours is a bug, and says which."""
    from tip_ray.commands.output import printable
    from tip_ray.contract.errors import TipRayError

    text = " ".join(printable(str(error)).split())
    if isinstance(error, TipRayError):
        return text
    return f"{type(error).__name__}: {text}; --debug shows where"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tip-ray",
        description="On-policy distillation on Ray that drops tokens before they travel.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tip-ray {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_begin(commands)
    _add_look(commands)
    _add_student(commands)
    _add_serve(commands)
    return parser


def _command(commands: _Commands, name: str, home: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.set_defaults(function=home)
    # SUPPRESS: without the option here, one given before the command stands.
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
    )
    return parser


def _add_begin(commands: _Commands) -> None:
    init = _command(commands, "init", "begin:init", "write a commented spec to start from")
    kinds = ("quickstart", "gsm8k", "math")
    init.add_argument("kind", nargs="?", default=kinds[0], choices=kinds, help="which one")
    init.add_argument("file", nargs="?", metavar="FILE", help="default: KIND.yaml")

    run = _command(commands, "run", "begin:run", "the whole run, with this process as its driver")
    _add_spec(run)
    run.add_argument("--run-id", metavar="ID", help="default: NAME-YYMMDD-HHMMSS-4HEX")
    run.add_argument("--ray-address", metavar="ADDR", help="a cluster; default: one of its own")
    run.add_argument("--dry-run", action="store_true", help="validate, and start nothing")

    submit = _command(
        commands, "submit", "submit:submit", "the whole run, as a job of a Ray cluster"
    )
    _add_spec(submit)
    submit.add_argument("--run-id", metavar="ID", help="default: NAME-YYMMDD-HHMMSS-4HEX")
    submit.add_argument(
        "--address",
        metavar="URL",
        help="the cluster's dashboard; default: $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS, else "
        "http://127.0.0.1:8265",
    )
    submit.add_argument(
        "--token-file", metavar="F", help="the cluster's token; default: where Ray looks for it"
    )
    submit.add_argument(
        "--wait", action="store_true", help="follow it to its end; exits with its exit code"
    )

    validate = _command(
        commands, "validate", "begin:validate", "check a spec and show the plan; starts nothing"
    )
    _add_spec(validate)
    _command(commands, "schema", "begin:schema", "print the spec's JSON Schema, for editors")


def _add_look(commands: _Commands) -> None:
    status = _command(commands, "status", "look:status", "what a run is doing")
    _add_run(status)
    status.add_argument("--json", action="store_true", help="every field, as JSON")

    watch = _command(
        commands, "watch", "follow:watch", "follow a run to its end; exits with its exit code"
    )
    _add_run(watch)

    runs = _command(commands, "list", "look:list_all", "all runs, newest first")
    _add_run_root(runs)
    _add_status_api(runs)

    metrics = _command(commands, "metrics", "look:metrics", "the numbers of every step")
    _add_run(metrics)
    metrics.add_argument("--format", choices=("table", "csv", "json"), default="table")

    samples = _command(commands, "samples", "look:samples", "real rollouts, kept tokens marked")
    _add_run(samples)
    _add_step(samples, "default: the newest")

    report = _command(commands, "report", "look:report", "an HTML page with plots")
    report.add_argument("run", nargs="+", metavar="RUN", help="one run, or several to compare")
    _add_run_root(report)
    _add_status_api(report)
    report.add_argument("--output", metavar="PATH", help="default: report.html of the one run")

    logs = _command(commands, "logs", "follow:logs", "what the driver logged")
    _add_run(logs)

    cancel = _command(
        commands, "cancel", "look:cancel", "ask a run to stop after its step and a checkpoint"
    )
    _add_run(cancel)


def _add_student(commands: _Commands) -> None:
    evaluate = _command(
        commands, "eval", "student:evaluate", "a spec's evaluations alone, without training"
    )
    _add_spec(evaluate)
    which = evaluate.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="PATH", help="a path, a hub id or any fsspec URL")
    which.add_argument("--run", metavar="RUN", help="a run's student: its export, or a checkpoint")
    _add_status_api(evaluate)
    _add_step(evaluate, "default: the run's export, else its newest checkpoint")
    evaluate.add_argument("--json", action="store_true", help="every number, as JSON")

    export = _command(commands, "export", "student:export", "a checkpoint as a Hugging Face model")
    _add_run(export)
    _add_step(export, "default: the newest checkpoint")
    export.add_argument("--output", metavar="DIR", required=True, help="a new directory or a URL")


def _add_serve(commands: _Commands) -> None:
    serve = _command(commands, "serve", "serve:run", "a status API and web page of all runs")
    serve.add_argument("--run-root", metavar="URL", required=True, help="where the runs are")
    serve.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    serve.add_argument("--port", type=_port, default=8420, help="default: %(default)s; 0: any")
    serve.add_argument(
        "--token-file", metavar="F", help="default: a token of its own, which is printed"
    )


def _port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) > LAST_PORT:
        raise argparse.ArgumentTypeError(f"found {text[:20]!r}, expected 0 to {LAST_PORT}")
    return int(text)


def _add_step(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--step", type=int, metavar="N", help=text)


def _add_spec(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help="a path or fsspec URL")
    parser.add_argument(
        "--set",
        dest="assignments",
        action="append",
        default=[],
        metavar="A.B=V",
        help="set a field; may be given several times",
    )
    parser.add_argument("--run-root", metavar="URL", help="overrides the spec's run_root")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run id, or a run directory's path or URL")
    _add_run_root(parser)
    _add_status_api(parser)


def _add_status_api(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", metavar="URL", help="a status API that has the run, as an id")
    parser.add_argument("--token-file", metavar="F", help="the status API's token")


def _add_run_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run-root", metavar="URL", help="where runs are; default: $TIP_RAY_RUN_ROOT, else runs"
    )


if __name__ == "__main__":
    sys.exit(main())
