"""Run checkpoints that fit any number of ranks, and portable packages. No pickle anywhere."""
