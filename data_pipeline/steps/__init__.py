"""Steps between a source and the shards: what is measured, changed, kept, and split in time."""
