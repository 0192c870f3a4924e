"""Draw a run as one HTML page, and print evaluations as tables."""
