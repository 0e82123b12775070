"""Training: one step, the loop around it, and what is recorded of both."""
