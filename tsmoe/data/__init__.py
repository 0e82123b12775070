"""From a corpus to batches: which windows, in which order, and how they are cut and loaded."""
