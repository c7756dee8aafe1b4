"""Code that is not ours, in processes of its own: benchmark checkers, simulators, a user's tools.

    host       the trainer's side: a server per service, a session per episode
    worker     the server's side: one keeper and one confined process per session
    contain    what the kernel is asked for: limits, namespaces, the end of a whole family of processes
    functions  a service: a file of plain functions, called by name with checked arguments
    schemas    JSON schemas out of type hints and docstrings

docs/security.md says what this covers and what it does not.
"""
