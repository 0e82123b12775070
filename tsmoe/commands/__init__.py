"""The sub-commands of `tsmoe`: each module adds its parser; heavy imports wait until it runs."""
