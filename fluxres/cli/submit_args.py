"""The options that describe a job, for `fluxres submit` and `fluxres run`, and the request they make."""

from __future__ import annotations

import os
from argparse import REMAINDER
from typing import TYPE_CHECKING, Final

from fluxres.cli.common import UsageError, argument, positive, whole_number
from fluxres.job.build import Facts, build_jobspec

if TYPE_CHECKING:
    from argparse import Namespace

    from fluxres.base.json import JsonObject, JsonValue
    from fluxres.cli.common import Parser
    from fluxres.wire.payload import WireMap

URGENCIES: Final = {"hold": 0, "default": 16, "expedite": 31}
URGENCY_MAX: Final = 31
FLAGS: Final = {"debug": 2, "waitable": 4, "novalidate": 8}
MAX_KEY: Final = 128
"""Characters of a submission's key."""
KEY_BYTES: Final = 16
CC_PLACE: Final = "{cc}"
"""What --cc replaces by its id, wherever it stands in the job's options and command."""
_CC_TEXTS: Final = ("job_name", "cwd", "input", "output", "error", "queue")
_CC_LISTS: Final = ("command", "env", "setopt", "setattr", "dependency")


def add_job_options(options: Parser) -> None:
    """Add the options that describe a job, and its command."""
    add = options.add_argument
    add("-N", "--nodes", metavar="N", type=positive, help="number of nodes")
    add("-n", "--ntasks", metavar="N", type=positive, help="number of tasks (1)")
    add("-c", "--cores-per-task", metavar="N", type=positive, default=1, help="cores for each task (1)")
    add("-g", "--gpus-per-task", metavar="N", type=whole_number, default=0, help="GPUs for each task (0)")
    add("-x", "--exclusive", action="store_true", help="with -N: take whole nodes")
    add("-t", "--time-limit", metavar="MIN|FSD", help="time limit: minutes, or a duration such as 30s or 2h")
    add("-q", "--queue", metavar="NAME", help="queue to submit to")
    add("-B", "--bank", metavar="NAME", help="bank to account to")
    add("--urgency", metavar="N", type=argument(parse_urgency), default=16, help="0 (hold) to 31 (16)")
    add("--job-name", metavar="NAME", help="the job's name (the command's)")
    add("--cwd", metavar="DIR", help="working directory (this one)")
    add("--env", metavar="RULE", action="append", default=[], help="set, keep or (-PATTERN) drop variables")
    add(
        "--env-remove",
        metavar="PATTERN",
        dest="env",
        action="append",
        type="-{}".format,
        help="drop variables",
    )
    add(
        "--env-file",
        metavar="FILE",
        dest="env",
        action="append",
        type="^{}".format,
        help="read rules from FILE",
    )
    add("--dependency", metavar="URI", action="append", default=[], help="wait for what URI says (RFC 26)")
    add(
        "--requires",
        metavar="CONSTRAINT",
        action="append",
        default=[],
        help="run only where it holds (RFC 35)",
    )
    add("--input", metavar="FILE", help="read stdin from FILE")
    add("--output", metavar="FILE", help="write stdout to FILE")
    add("--error", metavar="FILE", help="write stderr to FILE")
    add("-l", "--label-io", action="store_true", help="put each line's task rank before it")
    add("-u", "--unbuffered", action="store_true", help="do not wait for whole lines")
    add("-o", "--setopt", metavar="KEY[=VAL]", action="append", default=[], help="set a shell option")
    add("-S", "--setattr", metavar="KEY[=VAL]", action="append", default=[], help="set a jobspec attribute")
    add("--flags", metavar="FLAGS", type=argument(parse_flags), default=0, help=",".join(FLAGS))
    add(
        "--key",
        metavar="TEXT",
        type=argument(parse_key),
        help="submit only once, however often this is repeated",
    )
    add("--dry-run", action="store_true", help="print the jobspec and submit nothing")
    add("command", metavar="COMMAND", nargs=REMAINDER, help="the command and its arguments")


def parse_urgency(text: str) -> int:
    """An urgency (RFC 30) from its number or name. Raises ValueError."""
    if text in URGENCIES:
        return URGENCIES[text]
    if text.isascii() and text.isdigit() and int(text) <= URGENCY_MAX:
        return int(text)
    raise ValueError(f"urgency {text!r} is not 0 to {URGENCY_MAX}, hold, default or expedite")


def parse_flags(text: str) -> int:
    """Submission flags from their names. Raises ValueError."""
    flags = 0
    for name in text.split(","):
        if name not in FLAGS:
            raise ValueError(f"flag {name!r} is none of {', '.join(FLAGS)}")
        flags |= FLAGS[name]
    return flags


def parse_key(text: str) -> str:
    """A submission's key. Raises ValueError."""
    if not text or len(text) > MAX_KEY:
        raise ValueError(f"a key has 1 to {MAX_KEY} characters, not {len(text)}")
    return text


def check(args: Namespace, options: Parser) -> None:
    """Exit with a usage error for what no jobspec can be made of."""
    if args.command and args.command[0] == "--":
        args.command = args.command[1:]
    if not args.command:
        options.error("there is no command to run")


def jobspec_of(args: Namespace, cc: int | None = None) -> JsonObject:
    """The jobspec that the options describe, for one id of --cc where given. Raises UsageError."""
    try:
        return _build(args if cc is None else _for_cc(args, cc))
    except ValueError as error:
        raise UsageError(str(error)) from error


def uses_cc(args: Namespace) -> bool:
    """Whether anything but FLUX_JOB_CC differs between the ids of --cc."""
    texts = [getattr(args, name) or "" for name in _CC_TEXTS]
    return any(CC_PLACE in text for text in (*texts, *(item for name in _CC_LISTS for item in getattr(args, name))))


def with_cc(jobspec: JsonObject, cc: int) -> JsonObject:
    """A copy of `jobspec` with FLUX_JOB_CC set; all but the path to it is shared."""
    attributes = _object(jobspec["attributes"])
    system = _object(attributes["system"])
    environment = {**_object(system["environment"]), "FLUX_JOB_CC": str(cc)}
    return {**jobspec, "attributes": {**attributes, "system": {**system, "environment": environment}}}


def submit_request(args: Namespace, jobspec: JsonObject, key: str) -> WireMap:
    """The payload of `job-ingest.submit`; whoever repeats it gets the same jobid."""
    return {"jobspec": jobspec, "urgency": args.urgency, "flags": args.flags, "key": key}


def draw_key() -> str:
    """A key that nobody else has."""
    return os.urandom(KEY_BYTES).hex()


def _build(args: Namespace) -> JsonObject:
    duration, environment, expand = 0.0, dict(os.environ), dict[str, str]()
    dependencies: list[JsonObject] = []
    constraint: JsonObject | None = None
    shell_options: list[tuple[str, JsonValue]] = []
    attributes: list[tuple[str, JsonValue]] = []
    if args.time_limit or args.env or args.dependency or args.setopt or args.setattr:
        from fluxres.job import options

        if args.time_limit:
            duration = options.parse_time_limit(args.time_limit)
        if args.env:
            environment, expand = options.filter_environment(args.env, os.environ, _read_file)
        dependencies = [options.parse_uri(text, "dependency") for text in args.dependency]
        shell_options = [options.parse_keyval(text, _read_file) for text in args.setopt]
        attributes = [options.parse_keyval(text, _read_file) for text in args.setattr]
    if args.requires:
        from fluxres.job.requires import parse_all_requires

        constraint = parse_all_requires(args.requires)
    return build_jobspec(
        Facts(
            command=args.command,
            environment=environment,
            cwd=args.cwd or os.getcwd(),
            env_expand=expand,
            nodes=args.nodes,
            ntasks=args.ntasks,
            cores_per_task=args.cores_per_task,
            gpus_per_task=args.gpus_per_task,
            exclusive=args.exclusive,
            duration=duration,
            name=args.job_name,
            queue=args.queue,
            bank=args.bank,
            input=args.input,
            output=args.output,
            error=args.error,
            label_io=args.label_io,
            unbuffered=args.unbuffered,
            dependencies=dependencies,
            constraint=constraint,
            shell_options=shell_options,
            attributes=attributes,
        )
    )


def _for_cc(args: Namespace, cc: int) -> Namespace:
    from argparse import Namespace

    replaced = Namespace(**vars(args))
    for name in _CC_TEXTS:
        text = getattr(args, name)
        setattr(replaced, name, text and text.replace(CC_PLACE, str(cc)))
    for name in _CC_LISTS:
        setattr(replaced, name, [text.replace(CC_PLACE, str(cc)) for text in getattr(args, name)])
    return replaced


def _object(value: JsonValue) -> JsonObject:
    if not isinstance(value, dict):
        raise TypeError("a part of the jobspec is no object")
    return value


def _read_file(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()
