"""The `fluxres` command: one module a subcommand, each with `main(argv) -> exit status`."""
