"""The commands, one module each; `cli.COMMANDS` lists them.

A module has `configure(parser)`, which adds the command's flags, and `run(arguments) -> int`, which returns the exit
status and raises errors of `errors.py`: the command line turns those into one line, or into JSON. What is heavy to
import is imported by `run`, so that help and refusals answer at once.
"""
