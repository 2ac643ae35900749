"""The commands of `fastkd`: one command, one file, each with `run(arguments)`."""
