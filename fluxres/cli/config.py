"""`fluxres config check PATH`: whether a broker would take this configuration."""

from __future__ import annotations

from fluxres.cli.common import parser, subcommands


def main(argv: list[str]) -> int:
    """Run the command."""
    made = parser("config", "Check configuration files", connects=False)
    check = subcommands(made).add_parser("check", help="check a TOML file, or a directory of them")
    check.add_argument("path", metavar="PATH")
    args = made.parse_args(argv)
    from fluxres.broker.config import load  # late: it takes longer to import than --help should

    load(args.path)
    print(f"{args.path}: no errors")
    return 0
