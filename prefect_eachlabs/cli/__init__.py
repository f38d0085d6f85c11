"""The command line: `main.COMMANDS` names the commands, each a function in a module of its own name.

A command's signature is its flags, its docstring its help, what it returns its exit status; it raises errors of
`errors.py`, which `main` turns into one line, or into JSON. What is heavy to import it imports when it runs, so that
help and refusals answer at once.
"""
