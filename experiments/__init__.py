"""One folder per measurement, and what they share: `pool` (drafts of many arms on one set of chats) and `results` (rows).

A numbered folder is run by its `run.sh`, or a script of it as a module from the repository's root:
`python -m experiments.014_selection.tables`.
"""
