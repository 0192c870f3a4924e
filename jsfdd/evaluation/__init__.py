"""Measure a draft: acceptance, speed and their intervals, by decoding or by replaying recorded answers."""
