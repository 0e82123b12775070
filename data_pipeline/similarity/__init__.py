"""Series that are alike: copies within a corpus, and overlap of a corpus with evaluation tables."""
