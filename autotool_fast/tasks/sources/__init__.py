"""Readers of public tool-calling data sets: local files to `tasks.example.Example`, one module per data set."""
