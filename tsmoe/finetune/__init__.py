"""Fine-tuning on a table: the second stage of decoupled training (Time Tracker, arXiv 2505.15151)."""
