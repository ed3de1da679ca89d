"""The subcommands of `resps`."""
