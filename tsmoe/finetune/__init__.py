"""Fine-tuning on a table: stage two of decoupled training (Time Tracker, arXiv 2505.15151)."""
