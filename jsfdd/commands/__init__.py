"""The command line. `jsfdd X` is x.py, which holds the command's options, `prepare`, `run` and `describe`."""
