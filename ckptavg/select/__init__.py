"""Choose which checkpoints of a run are averaged, and in which order."""
