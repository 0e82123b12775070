"""Steps between a source and the shards: which series stay, and where each is split in time."""
