"""Corpus building: sources of series, quality steps, and memory-mapped Arrow shards. No torch."""
