"""Steps between a source and the shards: what is measured, which series stay, what is made of them."""
