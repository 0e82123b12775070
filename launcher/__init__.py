"""Starts a command of `tsmoe` on machines; imports no torch, no deepspeed and nothing of tsmoe."""
