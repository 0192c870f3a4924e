"""One HTML page of a run."""
