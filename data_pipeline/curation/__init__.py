"""What curation saw: a table of every series that came in, and a report made of it."""
